"""The guide's two commands, with its flags: run whole on a tiny model, skipped, resumed, refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest

from fintune.cli.legacy import finance as cli_finance
from fintune.errors import ConfigError, FintuneError, ResourceError
from fintune.training.checkpoints import mark_complete
from support.checkout_stand_in import CONVERTER, calls, make_checkout
from support.paths import ROOT
from support.tiny import make_tiny_model

GUIDE = """
python train_financial_model.py --llama_cpp_path ./llama.cpp
python train_financial_model.py --lora_output_dir ./outputs/lora --merged_model_dir ./outputs/merged_fp16 \
  --gguf_q4_path ./outputs/finance_q4.gguf
python train_financial_model.py --learning_rate 8e-6 --num_train_epochs 5 --max_seq_length 6144 \
  --gradient_accumulation_steps 12
python train.py --model_name DSR1/DSR1-Distill-Qwen-14B --dataset_folder datasets/ --output_dir ./financial_lora \
  --resume_from_checkpoint ./financial_lora/checkpoint-latest
"""
"""Every command line of the guide; `test_the_guide_holds_no_other_command` compares."""

FLAGS = (
    "--llama_cpp_path",
    "--lora_output_dir",
    "--merged_model_dir",
    "--gguf_fp16_path",
    "--gguf_q4_path",
    "--quantization_target",
    "--learning_rate",
    "--num_train_epochs",
    "--max_seq_length",
    "--gradient_accumulation_steps",
    "--per_device_train_batch_size",
    "--lora_r",
    "--lora_alpha",
    "--model_name",
    "--dataset_folder",
    "--skip_dataset_prep",
    "--skip_training",
    "--skip_merge",
    "--skip_quantization",
    "--merge_device_map",
    "--resume_from_checkpoint",
    "--training_quantization",
    "--extra_train_args",
)


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


def finance(model: Path, *words: object) -> None:
    small = ["--max_seq_length", 256, "--extra_train_args", "train.max_steps=2 --logging_steps 1"]
    call(cli_finance.pipeline_command(), "--model_name", model, "--investopedia", "none", *small, *words)


def test_every_flag_of_the_guide_is_there_with_its_default():
    command = cli_finance.pipeline_command()
    defaults = {f"--{option.name}": option.default for option in command.params}
    assert set(FLAGS) <= set(defaults)
    expected = {
        "--lora_r": 32,
        "--lora_alpha": 64,
        "--max_seq_length": 4096,
        "--per_device_train_batch_size": 1,
        "--gradient_accumulation_steps": 8,
        "--learning_rate": 1e-5,
        "--num_train_epochs": 3.0,
        "--quantization_target": "Q4_K_M",
        "--lora_output_dir": Path("financial_lora"),
        "--merged_model_dir": Path("merged_financial_fp16"),
        "--gguf_fp16_path": Path("financial_model_fp16.gguf"),
        "--gguf_q4_path": Path("financial_model_q4_k_m.gguf"),
    }
    assert {flag: defaults[flag] for flag in expected} == expected


@pytest.mark.parametrize("line", GUIDE.replace("\\\n", "").strip().splitlines())
def test_the_guides_commands_are_understood(line, here, monkeypatch):
    words = shlex.split(line)[1:]
    runs: list[object] = []
    monkeypatch.setattr(cli_finance, "_run", lambda config, flags, **_: runs.append((config, flags)) or False)
    command = cli_finance.train_command() if words[0] == "train.py" else cli_finance.pipeline_command()
    call(command, *words[1:])
    (config, flags), *_ = runs
    assert config.model.name == "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"
    assert (config.train.lr_scheduler_type, config.run.seed) == ("cosine", 3407)
    assert (config.train.save_steps, config.train.save_total_limit) == (500, 3)
    assert config.train.gradient_accumulation_steps == flags["gradient_accumulation_steps"]
    assert config.export.llama_cpp_path == flags.get("llama_cpp_path")


def test_the_guide_holds_no_other_command():
    guides = ROOT.parent / "shared" / "guides"
    if not guides.is_dir():
        pytest.skip("the guides are not beside this checkout")
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(guides.glob("0*.txt")))
    lines = text.replace("\r", "").replace("\\\n", " ")
    found = re.findall(r"^python (?:train_financial_model|train)\.py.*$", lines, re.MULTILINE)
    plain = {" ".join(line.split()) for line in found}
    assert plain == {" ".join(line.split()) for line in GUIDE.replace("\\\n", " ").strip().splitlines()}


def test_the_whole_command_writes_what_the_guide_names_and_a_second_one_does_nothing(here, model, capsys):
    finance(model)
    files = {
        "financial_lora": {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"},
        "merged_financial_fp16": {"config.json", "model.safetensors", "tokenizer.json"},
    }
    for folder, names in files.items():
        assert names <= {path.name for path in (here / folder).iterdir()}
    for name in ("financial_model_fp16.gguf", "financial_model_q4_k_m.gguf"):
        assert (here / name).read_bytes()[:4] == b"GGUF"
    assert "financial_model_q4_k_m.gguf" in (here / "financial_model_q4_k_m.gguf.Modelfile").read_text()
    manifests = {path: path.read_bytes() for path in (here / "financial_lora" / "run").glob("*/manifest.json")}
    assert len(manifests) == 8
    capsys.readouterr()
    finance(model)
    assert {path: path.read_bytes() for path in manifests} == manifests
    # Training on from the adapter's folder must not write into the run.
    assert (here / "financial_lora" / "adapter_config.json").stat().st_nlink == 1
    finance(model, "--skip_training", "--skip_merge", "--skip_dataset_prep")
    call(
        cli_finance.train_command(),
        *("--model_name", model, "--output_dir", here / "financial_lora", "--resume_from_checkpoint", "latest"),
        *("--max_seq_length", 256, "--extra_train_args", "train.max_steps=2"),
    )
    assert {path: path.read_bytes() for path in manifests} == manifests


def test_a_checkout_of_llama_cpp_converts_and_quantises_once(here, model):
    tools = make_checkout(here / "llama.cpp")
    words = ("--llama_cpp_path", tools, "--quantization_target", "q5_k_m", "--gguf_q4_path", "out/small.gguf")
    finance(model, *words)
    made = ["convert F16 vocabulary", "convert F16", "quantise Q5_K_M"]
    assert calls(tools) == made
    exported = here / "financial_lora" / "run" / "export"
    for name, kind in (("financial_model_fp16.gguf", "F16"), ("out/small.gguf", "Q5_K_M")):
        assert (here / name).samefile(exported / f"run-{kind}.gguf")
    assert "small.gguf" in (here / "out/small.gguf.Modelfile").read_text()
    finance(model, *words)
    assert calls(tools) == made
    # A file that the user moved away is laid out again, and nothing is asked of the tools.
    (here / "out/small.gguf").unlink()
    shutil.rmtree(tools)
    finance(model, *words)
    assert (here / "out/small.gguf").is_file()
    assert not list(here.rglob("*.part*"))


def test_a_file_named_after_another_type_than_it_will_hold_is_told(here, model, capsys):
    line = "financial_model_q4_k_m.gguf will hold Q5_K_M: --gguf_q4_path gives it another name"
    finance(model, "--quantization_target", "q5_k_m", "--dry_run")
    assert line in capsys.readouterr().err
    fitting = (), ("--quantization_target", "q5_k_m", "--gguf_q4_path", "small.gguf")
    for words in (*fitting, ("--quantization_target", "q5_k_m", "--skip_quantization")):
        finance(model, *words, "--dry_run")
        assert "will hold" not in capsys.readouterr().err


def test_a_checkout_is_not_looked_at_where_quantising_is_skipped(here, model, capsys):
    finance(model, "--llama_cpp_path", "nowhere", "--skip_quantization", "--dry_run")
    assert "export: skipped" in capsys.readouterr().out


def test_a_checkout_that_cannot_work_is_refused_before_anything_is_trained(here, model):
    for spoil, told in (
        (lambda tools: (tools / "convert_hf_to_gguf.py").unlink(), "there is no convert_hf_to_gguf.py"),
        (lambda tools: (tools / "build/bin/llama-quantize").unlink(), "cmake -B build -S ."),
        (lambda tools: (tools / "build/bin/llama-quantize").chmod(0o644), "llama-quantize does not run"),
        (lambda tools: (tools / "convert_hf_to_gguf.py").write_text("import nothing_such"), "No module named"),
    ):
        tools = make_checkout(here / f"tools-{len(list(here.iterdir()))}")
        spoil(tools)
        with pytest.raises(ResourceError) as caught:
            finance(model, "--llama_cpp_path", tools)
        assert told in str(caught.value)
    assert not (here / "financial_lora").exists()


def test_what_the_converter_lacks_for_this_model_alone_shows_before_anything_is_trained(here, model):
    lacks = "import sys\nif '--vocab-only' in sys.argv: import sentencepeace\n"
    tools = make_checkout(here / "tools", converter=lacks + CONVERTER)
    with pytest.raises(ResourceError, match=r"convert_hf_to_gguf.py failed .*No module named 'sentencepeace'"):
        finance(model, "--llama_cpp_path", tools)
    assert not list((here / "financial_lora" / "run").glob("*/manifest.json"))


def test_a_checkpoint_of_another_program_is_refused(here, model):
    (here / "elsewhere" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(ConfigError, match="this checkpoint is none of the run in financial_lora/run"):
        finance(model, "--resume_from_checkpoint", "elsewhere/checkpoint-5")


@pytest.mark.parametrize(
    ("given", "steps", "told"),
    [
        ("./nowhere", (10, 16), "./nowhere: training goes on from the newest, step 16"),
        ("checkpoint-10", (10, 16), "checkpoint-10: training goes on from the newest, step 16"),
        ("{checkpoints}/checkpoint-10", (10, 16), "checkpoint-10: training goes on from the newest, step 16"),
        ("{checkpoints}/checkpoint-16/", (10, 16), ""),
        ("./financial_lora/checkpoint-latest", (10, 16), ""),
        ("True", (16,), ""),
        ("", (16,), ""),
        ("last", (), "last: there is no whole checkpoint yet, so training starts at the beginning"),
    ],
)
def test_what_becomes_of_a_checkpoint_that_is_named_is_told(here, capsys, given, steps, told):
    checkpoints = here / "financial_lora" / "run" / ".work" / "train" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for step in steps:
        (checkpoints / f"checkpoint-{step}").mkdir()
        mark_complete(checkpoints / f"checkpoint-{step}")
    words = ("--resume_from_checkpoint", given.format(checkpoints=checkpoints), "--dry_run")
    finance("builtin:smollm2-135m", *words)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if "--resume_from_checkpoint" in line]
    assert [line.removesuffix(" (financial_lora/run)").endswith(told) for line in lines] == [True] * bool(told)


def test_types_that_leave_out_a_file_of_the_guides_are_refused(here, model):
    with pytest.raises(ConfigError, match="--extra_train_args leaves out F16 and Q4_K_M: the GGUF files are F16 and"):
        finance(model, "--extra_train_args", "export.types=[Q8_0]")


def test_a_device_to_merge_on_is_taken_with_a_word_and_an_unknown_one_refused(here, capsys):
    model = ("--model_name", "builtin:smollm2-135m", "--dry_run")
    said = "merging is done on the CPU all the same, in memory bounded by the largest tensor"
    for device in ("auto", "cuda", "cuda:1", "balanced", "sequential", "cpu"):
        call(cli_finance.pipeline_command(), *model, "--merge_device_map", device)
        assert (f"--merge_device_map {device}: {said}" in capsys.readouterr().err) == (device != "cpu")
    for device in ("bogus", "cuda:", "CUDA:x", ""):
        with pytest.raises(ConfigError, match=f"--merge_device_map {device}: not known: known are cpu, auto, cuda"):
            call(cli_finance.pipeline_command(), *model, "--merge_device_map", device)


def test_every_stage_that_can_be_made_anew_is_named(here, monkeypatch):
    plans: list[object] = []
    monkeypatch.setattr("fintune.pipeline.runner.Pipeline.preview", lambda pipeline: plans.append(pipeline) or [])
    for command in (cli_finance.pipeline_command(), cli_finance.train_command()):
        call(command, "--model_name", "builtin:smollm2-135m", "--dry_run")
        (help_,) = (option.help for option in command.params if option.name == "redo")
        plan = plans.pop()
        chosen = [step.name for step in plan.steps if step.name in plan.chosen]
        assert help_ == f"Make a stage anew: {', '.join(chosen)}."


def test_a_missing_dataset_folder_is_named(here, model):
    with pytest.raises(FintuneError, match="no such file or folder"):
        finance(model, "--dataset_folder", "nowhere")
