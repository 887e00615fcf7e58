from __future__ import annotations

import pytest

from fintune.errors import ResourceError
from fintune.inference.endpoint import parse
from fintune.inference.openai import OpenAIEngine
from support.served import Scripted, said

LLAMA = {"id": "m", "owned_by": "llamacpp", "meta": {"n_params": 1000, "size": 2000, "n_ctx": 512}, "created": 1}
PROPS = {"model_path": "/models/m.gguf", "build_info": "b1", "chat_template": "{{ x }}", "total_slots": 1}
VLLM = {"id": "m", "owned_by": "vllm", "root": "/models/m", "created": 1}


def told(models, props=None):
    """What stands behind the address and the name."""
    with Scripted((200, said()), models=models, props=props) as served:
        address, _, rest = OpenAIEngine(parse(f"{served.url}#m")).fingerprint().partition(" ")
        assert address == f"{served.url}#m"
    return rest


@pytest.mark.parametrize(
    ("entry", "props"),
    [
        (LLAMA | {"meta": {"n_params": 1000, "size": 1500}}, PROPS),
        (LLAMA, PROPS | {"model_path": "/models/n.gguf"}),
        (LLAMA, PROPS | {"build_info": "b2"}),
        (LLAMA, PROPS | {"chat_template": "{{ y }}"}),
        (LLAMA, None),
        (VLLM, None),
    ],
)
def test_another_file_template_or_build_is_told_apart(entry, props):
    assert told([entry], props) not in ("", told([LLAMA], PROPS))


def test_how_and_when_a_server_was_started_is_no_part_of_it():
    started = LLAMA | {"created": 2, "meta": LLAMA["meta"] | {"n_ctx": 1024}}
    assert told([started], PROPS | {"total_slots": 4}) == told([LLAMA], PROPS)
    assert told([VLLM | {"created": 2}]) == told([VLLM])


def test_another_folder_under_a_name_of_vllm_is_told_apart():
    assert told([VLLM | {"root": "/models/n"}]) != told([VLLM])


@pytest.mark.parametrize("models", [None, [{"id": "m", "owned_by": "library", "root": "x", "meta": {"size": 1}}]])
def test_of_other_servers_nothing_is_known_but_address_and_name(models):
    assert told(models, PROPS) == ""


def test_a_server_that_breaks_off_meanwhile_is_one_line():
    with Scripted((200, said()), models=[LLAMA]) as served:
        engine = OpenAIEngine(parse(f"{served.url}#m"), retries=0, timeout_seconds=5)
    with pytest.raises(ResourceError, match="refuses the connection"):
        engine.fingerprint()
