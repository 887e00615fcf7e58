from __future__ import annotations

import json
from pathlib import Path

import pytest

from fintune.config.load import load
from fintune.errors import ModelError, ResourceError
from fintune.inference.endpoint import OWN_KEY
from fintune.inference.open_model import Named, engine_of, open_model
from fintune.inference.protocol import Decoding, in_order
from fintune.records import Message
from support import fake_vllm
from support.served import Scripted, llama_cpp_server, said

TURNS = [Message(role="system", content="Answer."), Message(role="user", content="the net revenue in 2019 ?")]


@pytest.mark.parametrize(
    ("name", "asked", "engine"),
    [
        ("builtin:smollm2-135m", "auto", "transformers"),
        ("org/model", "auto", "transformers"),
        ("org/model", "vllm", "vllm"),
        ("runs/x/export/x-F16.GGUF", "auto", "llama.cpp"),
        ("http://127.0.0.1:8080/v1#m", "auto", "openai"),
        ("https://host/v1", "openai", "openai"),
    ],
)
def test_the_name_decides_the_engine(name, asked, engine):
    assert engine_of(Named(name, engine=asked)) == engine


def test_a_gguf_file_is_known_by_its_content(tmp_path):
    (tmp_path / "blob").write_bytes(b"GGUF\3\0\0\0")
    assert engine_of(Named(str(tmp_path / "blob"))) == "llama.cpp"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (Named("m.gguf", engine="vllm"), r"the engine vllm cannot run m\.gguf: it needs a Hugging Face folder"),
        (Named("org/model", engine="llama.cpp"), "cannot run org/model: it needs a GGUF file"),
        (Named("org/model", engine="openai"), "it needs an address such as http"),
        (Named("http://h/v1#m", adapter=Path("a")), "takes no adapter: name the adapter as the server does"),
        (Named("m.gguf", load_in_4bit=True), "is not loaded in 4 bits"),
    ],
)
def test_what_does_not_go_together_is_refused(named, message):
    with pytest.raises(ModelError, match=message):
        engine_of(named)


@pytest.mark.parametrize("trained_on", ["org/other", "builtin:other"])
def test_an_adapter_of_another_base_is_refused_by_name(tmp_path, trained_on):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": trained_on}))
    with pytest.raises(ModelError, match=rf"was trained on {trained_on}, not on org/model: use it with {trained_on}"):
        open_model(Named("org/model", adapter=tmp_path))


def test_every_engine_counts_and_answers_the_same_conversation(tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    from fintune.export.gguf.writer import write_gguf
    from inference.test_openai import KEY
    from support.synthetic import write_folder

    fake_vllm.install(monkeypatch)
    monkeypatch.setenv(OWN_KEY, KEY)
    folder = write_folder(tmp_path / "model", num_layers=1)
    write_gguf(folder, {"F16": tmp_path / "m.gguf"})
    names = [
        (str(tiny_model), "auto"),
        (str(tiny_model), "vllm"),
        (str(folder), "auto"),
        (str(tmp_path / "m.gguf"), "auto"),
    ]
    counts = {}
    for name, engine in names:
        opened = open_model(Named(name, engine=engine, context_tokens=256, precision="float32"))
        (found,) = in_order(opened.complete([TURNS], Decoding(3)))
        assert opened.count(TURNS) == found.num_prompt_tokens
        assert 0 < opened.count_text("the revenue") < opened.count(TURNS)
        counts[name, engine] = found.num_prompt_tokens
        opened.close()
    assert counts[names[0]] == counts[names[1]]
    assert counts[names[2]] == counts[names[3]]
    with llama_cpp_server(tmp_path / "m.gguf") as url:
        opened = open_model(Named(url))
        (found,) = in_order(opened.complete([TURNS], Decoding(3)))
        assert found.num_prompt_tokens == counts[names[3]]
        opened.close()


def test_a_server_is_waited_for_as_long_as_the_options_say():
    with Scripted((200, said()), seconds=1) as served:
        config = load(None, ["predict.timeout_seconds=0.3"]).config
        opened = open_model(Named.with_options(f"{served.url}#m", config))
        with pytest.raises(ResourceError, match=r"gave no answer in 0\.3 seconds"):
            in_order(opened.complete([TURNS], Decoding(3)))


def test_models_and_adapters_have_fingerprints_of_their_own(tiny_model):
    with Scripted((200, said())) as served:
        prints = [open_model(Named(f"{served.url}#{name}")).fingerprint for name in "aba"]
    assert prints[0] == prints[2] != prints[1]
    whole, quantised = open_model(Named(str(tiny_model))), Named(str(tiny_model), load_in_4bit=True)
    assert whole.fingerprint
    assert engine_of(quantised) == "transformers"
