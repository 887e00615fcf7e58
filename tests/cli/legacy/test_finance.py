"""The two commands of the finance guide on a tiny model: run, skipped, resumed, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import pytest

from fintune.cli.legacy import finance
from fintune.errors import ArtifactError, ConfigError, FintuneError, ResourceError
from support.checkout_stand_in import CONVERTER, calls, make_checkout
from support.tiny import make_tiny_model

DEFAULTS = {
    "lora_r": 32,
    "lora_alpha": 64,
    "max_seq_length": 4096,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-5,
    "num_train_epochs": 3.0,
    "quantization_target": "Q4_K_M",
    "lora_output_dir": Path("financial_lora"),
    "merged_model_dir": Path("merged_financial_fp16"),
    "gguf_fp16_path": Path("financial_model_fp16.gguf"),
    "gguf_q4_path": Path("financial_model_q4_k_m.gguf"),
}
OTHERS = {"llama_cpp_path", "model_name", "dataset_folder", "skip_dataset_prep", "skip_training", "skip_merge"} | {
    *("skip_quantization", "merge_device_map", "resume_from_checkpoint", "training_quantization", "extra_train_args")
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("finance") / "model", hidden_size=256, num_layers=1)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    rows = [{"prompt": f"size {n}?", "chosen": f"risk {n} bp", "rejected": "all in"} for n in range(12)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "datasets" / "trader_dpo_data.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def call(command: click.Command, *words: object) -> None:
    command.main([str(word) for word in words], standalone_mode=False)


def run(model: Path | str, *words: object) -> None:
    small = ("--max_seq_length", 256, "--extra_train_args", "train.max_steps=2 train.logging_steps=1")
    call(finance.PIPELINE, "--model_name", model, "--investopedia", "none", *small, *words)


def manifests(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (folder / "financial_lora" / "run").glob("*/manifest.json")}


def test_flags_of_the_guide_have_its_defaults():
    defaults = {option.name: option.default for option in finance.PIPELINE.params}
    assert {name: defaults[name] for name in DEFAULTS} == DEFAULTS
    assert set(defaults) >= OTHERS


def test_flags_become_the_configuration(here, monkeypatch):
    configs = []
    monkeypatch.setattr(finance, "_run", lambda config, *_: configs.append(config) or False)
    words = ("--model_name", finance.GUIDE_MODEL, "--learning_rate", "8e-6", "--llama_cpp_path", "tools")
    call(finance.PIPELINE, *words, "--investopedia_rows", "7", "train.weight_decay=0.1", "adapter.r=8")
    (config,) = configs
    assert config.model.name == "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"
    assert (config.train.lr_scheduler_type, config.run.seed) == ("cosine", 3407)
    assert (config.train.save_steps, config.train.save_total_limit) == (500, 3)
    assert (config.train.learning_rate, config.train.gradient_accumulation_steps) == (8e-6, 8)
    assert (config.train.weight_decay, config.adapter.r, config.export.llama_cpp_path) == (0.1, 8, Path("tools"))
    assert [(source.path, source.max_rows) for source in config.data.sources][1:] == [(finance.INVESTOPEDIA, 7)]


def test_changed_setting_keeps_outputs_until_they_are_replaced(here, model, capsys):
    words = ("--skip_merge", "--skip_quantization")
    run(model, *words)
    adapter = here / "financial_lora" / "adapter_model.safetensors"
    before, made = adapter.read_bytes(), manifests(here)
    # Training on from the adapter's folder must not write into the run.
    assert (here / "financial_lora" / "adapter_config.json").stat().st_nlink == 1
    run(model, *words, "--skip_training", "--skip_dataset_prep")
    resumed = ("--model_name", model, "--output_dir", "financial_lora", "--resume_from_checkpoint", "latest")
    call(finance.TRAIN, *resumed, "--max_seq_length", 256, "train.max_steps=2")
    assert manifests(here) == made
    capsys.readouterr()
    # What the flag resumes is said when other settings cannot stop the command any more.
    with pytest.raises(ArtifactError, match=r"train\.learning_rate"):
        call(finance.TRAIN, *resumed, "--max_seq_length", 256, "--learning_rate", "2e-5", "train.max_steps=2")
    assert "--resume_from_checkpoint" not in capsys.readouterr().err
    assert adapter.read_bytes() == before
    run(model, *words, "--learning_rate", "1e-2", "--redo", "train")
    assert adapter.read_bytes() != before
    assert (here / "financial_lora" / "tokenizer.json").is_file()


def test_checkout_converts_and_quantizes_once(here, model):
    tools = make_checkout(here / "llama.cpp")
    words = ("--llama_cpp_path", tools, "--quantization_target", "q5_k_m", "--gguf_q4_path", "out/small.gguf")
    run(model, *words)
    made = ["convert F16 vocabulary", "convert F16", "quantise Q5_K_M"]
    assert calls(tools) == made
    exported = here / "financial_lora" / "run" / "export"
    for name, kind in (("financial_model_fp16.gguf", "F16"), ("out/small.gguf", "Q5_K_M")):
        assert (here / name).samefile(exported / f"run-{kind}.gguf")
    run(model, *words)
    assert calls(tools) == made
    # A file that the user moved away appears again without the tools.
    (here / "out/small.gguf").unlink()
    shutil.rmtree(tools)
    run(model, *words)
    assert (here / "out/small.gguf").is_file()
    assert not list(here.rglob("*.part*"))


def test_misleading_file_name_is_reported(here, model, capsys):
    run(model, "--quantization_target", "q5_k_m", "--dry_run")
    assert "financial_model_q4_k_m.gguf will hold Q5_K_M" in capsys.readouterr().err
    for words in (("--gguf_q4_path", "small.gguf"), ("--skip_quantization",)):
        run(model, "--quantization_target", "q5_k_m", *words, "--dry_run")
        assert "will hold" not in capsys.readouterr().err


def test_skipped_export_ignores_the_checkout(here, model):
    run(model, "--llama_cpp_path", "nowhere", "--skip_quantization", "--dry_run")


@pytest.mark.parametrize("spoiled", ["folder", "converter", "quantizer", "quantizer mode", "import"])
def test_unusable_checkout_is_refused_before_training(here, model, spoiled):
    tools = make_checkout(here / "tools")
    if spoiled == "folder":
        shutil.rmtree(tools)
    elif spoiled == "converter":
        (tools / "convert_hf_to_gguf.py").unlink()
    elif spoiled == "quantizer":
        (tools / "build/bin/llama-quantize").unlink()
    elif spoiled == "quantizer mode":
        (tools / "build/bin/llama-quantize").chmod(0o644)
    else:
        (tools / "convert_hf_to_gguf.py").write_text("import nothing_such")
    with pytest.raises(ResourceError, match=r"tools|convert_hf_to_gguf|llama-quantize") as caught:
        run(model, "--llama_cpp_path", tools)
    assert caught.value.hint
    assert not (here / "financial_lora").exists()


def test_incomplete_converter_is_refused_before_training(here, model):
    lacks = "import sys\nif '--vocab-only' in sys.argv: import sentencepeace\n"
    tools = make_checkout(here / "tools", converter=lacks + CONVERTER)
    with pytest.raises(ResourceError, match="sentencepeace"):
        run(model, "--llama_cpp_path", tools)
    assert not manifests(here)


def test_foreign_checkpoint_is_refused(here, model):
    (here / "elsewhere" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--resume_from_checkpoint elsewhere/checkpoint-5"):
        run(model, "--resume_from_checkpoint", "elsewhere/checkpoint-5")


@pytest.mark.parametrize(
    ("value", "word", "message"),
    [
        ("./nowhere", "resume from step 16", "step 16"),
        ("run/.work/train/checkpoints/checkpoint-10", "resume from step 16", "step 16"),
        ("run/.work/train/checkpoints/checkpoint-16/", "resume from step 16", ""),
        ("./financial_lora/checkpoint-latest", "resume from step 16", ""),
        ("True", "resume from step 16", ""),
        ("last", "run", "no checkpoint"),
        ("last", "up to date", "up to date"),
    ],
)
def test_other_checkpoint_than_named_is_reported(capsys, value, word, message):
    finance._check_checkpoint(Path("run"), Path(value), word)
    lines = " ".join(capsys.readouterr().err.split())
    assert (message in lines) if message else not lines


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (("--skip_dataset_prep",), "--skip_dataset_prep"),
        (("--skip_training", "--skip_quantization"), "--skip_training"),
        (("--extra_train_args", "export.types=[Q8_0]"), "--quantization_target"),
        (("--lora_r", "0"), "--lora_r"),
        (("--training_quantization", "8bit"), "--training_quantization"),
    ],
)
def test_mistake_names_its_flag(here, model, words, flag):
    with pytest.raises((ConfigError, click.UsageError)) as caught:
        run(model, *words)
    error = caught.value
    assert flag in (error.format_message() if isinstance(error, click.UsageError) else error.message)


def test_device_to_merge_on_is_ignored(here, capsys):
    for device in ("auto", "cuda:1", "cpu"):
        run("builtin:smollm2-135m", "--merge_device_map", device, "--dry_run")
        assert ("is ignored" in capsys.readouterr().err) == (device != "cpu")


def test_missing_dataset_folder_is_refused(here, model):
    with pytest.raises(FintuneError, match="nowhere"):
        run(model, "--dataset_folder", "nowhere")


def test_unreachable_dataset_is_refused_first(here, model, monkeypatch):
    monkeypatch.setattr("fintune.util.hub._resolves", lambda _: False)
    monkeypatch.setattr("fintune.util.hub.urllib.request.getproxies", dict)
    with pytest.raises(ResourceError) as caught:
        run(model, "--investopedia", "hub:FinLang/none-such")
    assert "--investopedia none" in caught.value.hint
    assert not (here / "financial_lora").exists()
