from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fintune
from fintune.config import Config
from fintune.config.load import load
from fintune.errors import ModelError, ResourceError
from fintune.inference.http_pool import OWN_KEY
from fintune.inference.open_model import ModelSpec, open_model
from fintune.inference.protocol import Decoding, sorted_by_prompt
from fintune.models.folder import model_fingerprint
from fintune.records import Message
from support import fake_vllm
from support.served import Scripted, llama_cpp_server, said

TURNS = [Message(role="system", content="Answer."), Message(role="user", content="the net revenue in 2019 ?")]


@pytest.mark.parametrize(
    ("name", "choice", "engine"),
    [
        ("builtin:smollm2-135m", "auto", "transformers"),
        ("org/model", "auto", "transformers"),
        ("org/model", "vllm", "vllm"),
        ("runs/x/export/x-F16.GGUF", "auto", "llama.cpp"),
        ("http://127.0.0.1:8080/v1#m", "auto", "openai"),
        ("https://host/v1", "openai", "openai"),
    ],
)
def test_engine_name_follows_the_name(name, choice, engine):
    assert ModelSpec(name, engine=choice).engine_name == engine


def test_engine_name_of_gguf_content(tmp_path):
    (tmp_path / "blob").write_bytes(b"GGUF\3\0\0\0")
    assert ModelSpec(str(tmp_path / "blob")).engine_name == "llama.cpp"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec("m.gguf", engine="vllm"), r"the engine vllm cannot run m\.gguf: it needs a Hugging Face folder"),
        (ModelSpec("org/model", engine="llama.cpp"), "cannot run org/model: it needs a GGUF file"),
        (ModelSpec("org/model", engine="openai"), "it needs an address such as http"),
        (ModelSpec("http://h/v1#m", adapter=Path("a")), "takes no adapter: name the adapter as the server does"),
        (ModelSpec("m.gguf", load_in_4bit=True), "4 bits"),
    ],
)
def test_engine_name_refuses_combination(spec, message):
    with pytest.raises(ModelError, match=message):
        _ = spec.engine_name


@pytest.mark.parametrize("base", ["org/other", "builtin:other"])
def test_open_model_refuses_adapter_of_other_base(tmp_path, base):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ModelError, match=rf"was trained on {base}, not on org/model: use it with {base}"):
        open_model(ModelSpec("org/model", adapter=tmp_path))


def test_every_engine_counts_and_completes_alike(tiny_model, tmp_path, monkeypatch):
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
        with open_model(ModelSpec(name, engine=engine, context_tokens=256, dtype="float32")) as model:
            (completion,) = sorted_by_prompt(model.complete([TURNS], Decoding(3)))
            assert model.count_tokens(TURNS) == completion.num_prompt_tokens
            assert 0 < model.count_text_tokens("the revenue") < model.count_tokens(TURNS)
            counts[name, engine] = completion.num_prompt_tokens
    assert counts[names[0]] == counts[names[1]]
    assert counts[names[2]] == counts[names[3]]
    with llama_cpp_server(tmp_path / "m.gguf") as url, open_model(ModelSpec(url)) as model:
        (completion,) = sorted_by_prompt(model.complete([TURNS], Decoding(3)))
        assert completion.num_prompt_tokens == counts[names[3]]
        with pytest.raises(ModelError):
            model.complete_rendered(["rendered"], Decoding(3))


def test_from_options_sets_the_timeout():
    with Scripted((200, said()), seconds=1) as served:
        config = load(None, ["predict.timeout_seconds=0.3"]).config
        with (
            open_model(ModelSpec.from_options(f"{served.url}#m", config)) as model,
            pytest.raises(ResourceError, match=r"0\.3 seconds"),
        ):
            sorted_by_prompt(model.complete([TURNS], Decoding(3)))


def test_fingerprint_identifies_the_model(tiny_model):
    with Scripted((200, said())) as served:
        fingerprints = [open_model(ModelSpec(f"{served.url}#{name}")).fingerprint for name in "aba"]
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]
    whole, packed = (open_model(ModelSpec(str(tiny_model), load_in_4bit=is_4bit)) for is_4bit in (False, True))
    assert whole.fingerprint == model_fingerprint(tiny_model)
    assert packed.fingerprint == f"{whole.fingerprint} 4bit"


@pytest.mark.parametrize(
    ("kind", "name", "adapter", "is_4bit"),
    [
        ("base", "builtin:x", None, False),
        ("adapter", "builtin:x", "train/adapter", False),
        ("adapter_4bit", "builtin:x", "train/adapter", True),
        ("merged_4bit", "merge", None, True),
        ("Q4_K_M", "export/r-Q4_K_M.gguf", None, False),
        ("endpoint", "http://h/v1", None, False),
    ],
)
def test_from_config_of_each_kind(tmp_path, kind, name, adapter, is_4bit):
    config = Config.model_validate(
        {"run": {"name": "r"}, "model": {"name": "builtin:x"}, "predict": {"endpoint": "http://h/v1"}}
    )
    inputs = {stage: tmp_path / stage for stage in ("train", "merge", "export")}
    spec = ModelSpec.from_config(config, kind, inputs)
    assert spec.name in (name, str(tmp_path / name))
    assert spec.adapter == (None if adapter is None else tmp_path / adapter)
    assert spec.load_in_4bit == is_4bit


def test_from_config_of_full_fine_tuning(tmp_path):
    (tmp_path / "train" / "model").mkdir(parents=True)
    spec = ModelSpec.from_config(Config(), "adapter", {"train": tmp_path / "train"})
    assert (spec.name, spec.adapter) == (str(tmp_path / "train" / "model"), None)


# --- fintune.open_model


def test_public_open_model_generates_answers(tiny_model):
    with fintune.open_model(str(tiny_model)) as model:
        first, second = model.generate(["the net revenue ?", TURNS], max_new_tokens=4)
        assert [first] == model.generate(["the net revenue ?"], max_new_tokens=4)
        sampled = [model.generate(["the ?"], max_new_tokens=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert isinstance(second, str)


def test_public_open_model_of_a_runs_merged_model(tiny_model, tmp_path):
    import shutil

    run = tmp_path / "runs" / "x"
    (run / "train" / "adapter").mkdir(parents=True)
    (run / "train" / "adapter" / "adapter_config.json").write_text("{}")
    shutil.copytree(tiny_model, run / "merge")
    with fintune.open_model(run) as model:
        assert model.fingerprint == model_fingerprint(tiny_model)


def test_public_open_model_of_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError):
        fintune.open_model(tmp_path)


def test_import_fintune_is_light():
    code = "import sys, fintune; fintune.open_model; print({'torch', 'transformers', 'httpx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
