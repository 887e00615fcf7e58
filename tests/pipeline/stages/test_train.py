from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from fintune.config import Config
from fintune.models import load as models
from fintune.pipeline.stages.train import train
from fintune.training import metrics
from support.paths import ROOT
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")


def config(model, **options) -> Config:
    return Config.model_validate(
        {
            "model": {"name": str(model)},
            "adapter": {"r": 4, "lora_dropout": 0.1},
            "train": {"dtype": "float32", "per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 2, **options},
        }
    )


@pytest.fixture
def inputs(tmp_path, tiny_model):
    return {"prepare": prepared(tmp_path / "prepare", tiny_model)}


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_train_adapter_loads_with_peft(tiny_model, inputs, tmp_path):
    from peft import PeftModel

    from fintune.util.console import quiet_libraries

    (tmp_path / "train").mkdir()
    facts = train(config(tiny_model, learning_rate=1e-2), inputs, tmp_path / "train")
    base = models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")
    ids = torch.arange(5, 25)[None]
    before = base(ids).logits.detach().clone()
    with quiet_libraries():
        adapted = PeftModel.from_pretrained(base, tmp_path / "train" / "adapter")
    assert float((adapted(ids).logits - before).abs().max()) > 1e-4
    written = json.loads((tmp_path / "train/adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tiny_model)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["adapter", "metrics.jsonl"]
    assert facts["num_steps"] == 6
    assert facts["num_trainable"] == sum(w.numel() for w in weights(tmp_path / "train").values())
    assert facts["num_tokens"] == metrics.read(tmp_path / "train/metrics.jsonl")[-1]["tokens"] > 0


def test_train_only_finishes_an_attempt_with_an_adapter(tiny_model, inputs, tmp_path):
    (tmp_path / "train").mkdir()
    first = train(config(tiny_model), inputs, tmp_path / "train")
    stamp = (tmp_path / "train/adapter/adapter_model.safetensors").stat().st_mtime_ns
    assert train(config(tiny_model), inputs, tmp_path / "train") == first
    assert (tmp_path / "train/adapter/adapter_model.safetensors").stat().st_mtime_ns == stamp


def test_train_killed_once_equals_uninterrupted(tiny_model, inputs, tmp_path):
    asked = config(tiny_model, max_steps=60, save_steps=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    code = (
        "import sys; from pathlib import Path; from fintune.config import Config\n"
        "from fintune.pipeline.stages.train import train\n"
        "train(Config.model_validate_json(sys.argv[1]), {'prepare': Path(sys.argv[2])}, Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, asked.model_dump_json(), str(inputs["prepare"]), str(cut)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while len(metrics.read(cut / "metrics.jsonl")) < 5 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    assert not (cut / "adapter").exists()
    train(asked, inputs, cut)
    train(asked, inputs, whole)
    resumed, expected = weights(cut), weights(whole)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert [line["loss"] for line in metrics.read(cut / "metrics.jsonl")] == [
        line["loss"] for line in metrics.read(whole / "metrics.jsonl")
    ]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_train_killed_repeatedly_equals_uninterrupted(tiny_model, inputs, tmp_path, seed):
    asked = config(
        tiny_model,
        max_steps=24,
        save_steps=2,
        eval_steps=3,
        select_checkpoint="best_loss",
        learning_rate=2e-2,
        threads=1,
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    script = ROOT / "tests/support/killed_training.py"
    done = subprocess.run(
        [sys.executable, str(script), asked.model_dump_json(), str(inputs["prepare"]), str(cut), str(seed)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ways = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("killed")}
    assert len(ways) >= 4, done.stdout
    train(asked, inputs, whole)
    lines = [
        [
            {key: value for key, value in line.items() if key != "seconds"}
            for line in metrics.read(place / "metrics.jsonl")
        ]
        for place in (whole, cut)
    ]
    assert lines[0] == lines[1]
    resumed, expected = weights(cut), weights(whole)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert sorted(path.name for path in cut.iterdir()) == ["adapter", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            {"per_device_train_batch_size": 8},
            "set train.per_device_train_batch_size=4 train.gradient_accumulation_steps=2, or "
            "train.gradient_checkpointing=true, or model",
        ),
        (
            {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
            "train.per_device_train_batch_size=1 train.gradient_accumulation_steps=6, or",
        ),
        (
            {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
            "set model.quantization=nf4, or prompt.max_length below 2048",
        ),
    ],
)
def test_out_of_memory_is_one_line_with_options(tiny_model, inputs, tmp_path, monkeypatch, options, advice):
    from fintune.errors import ResourceError
    from fintune.training import sft

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore lines")

    monkeypatch.setattr(sft, "train_model", full)
    (tmp_path / "train").mkdir()
    with pytest.raises(ResourceError) as raised:
        train(config(tiny_model, **options), inputs, tmp_path / "train")
    assert str(raised.value).startswith("out of memory (CUDA out of memory. Tried to allocate 20.00 MiB.): ")
    assert advice in str(raised.value)
    assert "\n" not in str(raised.value)


def test_out_of_memory_on_a_cpu_has_the_same_advice(tiny_model, inputs, tmp_path, monkeypatch):
    """The allocator is really asked for more than there is: 2^50 bytes."""
    from fintune.errors import ResourceError
    from fintune.training import sft

    monkeypatch.setattr(sft, "train_model", lambda *_, **__: torch.empty(1 << 50, dtype=torch.uint8))
    (tmp_path / "train").mkdir()
    with pytest.raises(ResourceError, match=r"^out of memory \(DefaultCPUAllocator: can't allocate memory") as raised:
        train(config(tiny_model, per_device_train_batch_size=8), inputs, tmp_path / "train")
    assert "set train.per_device_train_batch_size=4 train.gradient_accumulation_steps=2, or" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_model_too_large_for_memory_has_a_hint(tiny_model, inputs, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from fintune.errors import ResourceError

    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: torch.empty(1 << 50, dtype=torch.uint8)
    )
    (tmp_path / "train").mkdir()
    with pytest.raises(ResourceError, match=r"^out of memory while loading .*: load it in 4 bits, or take a smaller"):
        train(config(tiny_model), inputs, tmp_path / "train")


def test_out_of_memory_on_a_gpu_names_fitting_overrides(tiny_model, inputs, tmp_path, monkeypatch):
    from fintune.errors import ResourceError
    from fintune.training import sft
    from fintune.training.memory import planner

    def full(*_, **__):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        # The tiny model's need beyond the planner's reserve.
        monkeypatch.setattr(planner, "free_bytes", lambda *_: planner.RESERVE_BYTES + 2_500_000)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sft, "train_model", full)
    (tmp_path / "train").mkdir()
    with pytest.raises(
        ResourceError,
        match=r"out of memory .*: add train\.per_device_train_batch_size=\d+ train\.gradient_accumulation_steps=\d+ ",
    ) as raised:
        train(config(tiny_model, per_device_train_batch_size=8), inputs, tmp_path / "train")
    assert "the same examples a step), and --redo train" in str(raised.value)


@pytest.mark.parametrize("fused_layers", ["never", "always"])
def test_best_accuracy_selects_by_generated_programs(tiny_model, inputs, tmp_path, monkeypatch, fused_layers):
    """Gold results are set to what the model's own greedy programs give, so that some evaluation finds them."""
    from fintune.evaluation.questions import GoldQuestion

    asked = config(
        tiny_model,
        max_steps=4,
        eval_steps=2,
        select_checkpoint="best_accuracy",
        eval_new_tokens=8,
        fused_layers=fused_layers,
    )
    asked = asked.model_copy(update={"adapter": asked.adapter.model_copy(update={"lora_dropout": 0.0})})
    said = []
    monkeypatch.setattr(GoldQuestion, "is_correct", lambda self, text: said.append(text) or len(said) > 12 + 6)
    (tmp_path / "train").mkdir()
    facts = train(asked, inputs, tmp_path / "train")
    assert len(said) == 24
    found = {
        line["step"]: line["eval_accuracy"]
        for line in metrics.read(tmp_path / "train/metrics.jsonl")
        if "eval_loss" in line
    }
    assert found == {2: 0.0, 4: 0.5}
    assert (facts["kept_step"], facts["eval_accuracy"]) == (4, 0.5)


def test_question_is_correct_if_it_executes_to_gold(inputs):
    from fintune.evaluation.questions import read_questions

    path = inputs["prepare"] / "gold.json"
    gold = json.loads(path.read_text())
    gold[0]["qa"]["exe_ans"] = 3.0
    path.write_text(json.dumps(gold))
    questions = read_questions(inputs["prepare"], {"x0", "x3", "unknown"})
    assert [question.record.id for question in questions] == ["x0", "x3"]
    assert questions[0].is_correct("add(1, 2)")
    assert not questions[0].is_correct("add(1, 3)")
    assert not questions[0].is_correct("nonsense")


def test_evaluation_samples_are_repeatable(tiny_model, inputs, tmp_path):
    losses = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train(config(tiny_model, max_steps=2, eval_steps=1, max_eval_samples=5), inputs, tmp_path / name)
        losses.append(
            [line["eval_loss"] for line in metrics.read(tmp_path / name / "metrics.jsonl") if "eval_loss" in line]
        )
    (tmp_path / "all").mkdir()
    train(config(tiny_model, max_steps=2, eval_steps=1), inputs, tmp_path / "all")
    whole = [line["eval_loss"] for line in metrics.read(tmp_path / "all" / "metrics.jsonl") if "eval_loss" in line]
    assert losses[0] == losses[1] != whole
