"""A signal while training: the step is finished and kept, and the next attempt is the uninterrupted one's rest."""

from __future__ import annotations

import os
import signal

import pytest

from fintune.config import AdapterOptions, Config, TrainOptions
from fintune.models import load as models
from fintune.pipeline.steps import build_steps
from fintune.training import checkpoints, lora, metrics, sft
from fintune.training.interrupt import StopAfterStep, stopping_after_step
from fintune.util.signals import Terminated
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_model):
    from datasets import load_from_disk

    return load_from_disk(str(prepared(tmp_path_factory.mktemp("rows") / "prepare", tiny_model) / "tokens" / "train"))


def run(tiny_model, rows, folder, *, callbacks=(), kind="lora", **options):
    """Train from scratch or resume; gives the adapter's weights."""
    from transformers import set_seed

    folder.mkdir(exist_ok=True)
    ref = models.fetch(str(tiny_model))
    set_seed(5)
    base = models.load_model(ref, dtype="float32", device="cpu")
    model = lora.attach_adapter(base, AdapterOptions(kind=kind, r=4, lora_alpha=8, lora_dropout=0.1))
    asked = TrainOptions(
        **({"per_device_train_batch_size": 4, "max_steps": 8, "save_steps": 3, "learning_rate": 1e-2} | options)
    )
    tokenizer = models.load_tokenizer(ref)
    sft.train_model(model, tokenizer, rows, asked, compute="float32", seed=5, folder=folder, extra_callbacks=callbacks)
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def history(folder):
    lines = metrics.read(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def signalled(step, number, times=1):
    """Sends this process a signal in the middle of a step, as the user does."""
    from transformers import TrainerCallback

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == step:
                for _ in range(times):
                    os.kill(os.getpid(), number)

    return Signal()


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGINT, {}),
        (signal.SIGTERM, {"fused_layers": "always", "kind": "dora", "gradient_accumulation_steps": 2}),
    ],
)
def test_signal_writes_a_checkpoint_that_resumes_exactly(tiny_model, rows, tmp_path, number, options):
    options = {"save_steps": 100, **options}
    whole = run(tiny_model, rows, tmp_path / "whole", **options)
    before = signal.getsignal(number)
    with pytest.raises(
        KeyboardInterrupt, match=r"^interrupted; rerun the same command to resume from step 5$"
    ) as ended:
        run(tiny_model, rows, tmp_path / "cut", callbacks=[signalled(4, number)], **options)
    assert isinstance(ended.value, Terminated) == (number == signal.SIGTERM), "the process ends with its status"
    assert signal.getsignal(number) is before
    assert [line["step"] for line in history(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    resumed = run(tiny_model, rows, tmp_path / "cut", **options)
    assert same(whole, resumed)
    assert history(tmp_path / "whole") == history(tmp_path / "cut")


def test_second_signal_stops_at_once(tiny_model, rows, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="before the first checkpoint"):
        run(tiny_model, rows, tmp_path / "cut", callbacks=[signalled(4, signal.SIGINT, 2)], save_steps=100)
    assert not checkpoints.complete_checkpoints(tmp_path / "cut" / "checkpoints")
    with pytest.raises(KeyboardInterrupt, match="resume from step 3"):
        run(tiny_model, rows, tmp_path / "cut", callbacks=[signalled(4, signal.SIGINT, 2)])


def test_signal_logs_the_losses_since_the_last_line(tiny_model, rows, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, rows, tmp_path / "cut", callbacks=[signalled(4, signal.SIGINT)], logging_steps=3)
    assert [line["step"] for line in history(tmp_path / "cut")] == [1, 3, 5]


def test_signals_of_several_processes_are_not_handled(tmp_path, monkeypatch):
    monkeypatch.setattr("fintune.training.distributed.world_size", lambda: 2)
    before = signal.getsignal(signal.SIGTERM)
    with stopping_after_step(StopAfterStep(), tmp_path):
        assert signal.getsignal(signal.SIGTERM) is before


def test_plan_names_the_step_to_resume_from(tmp_path):
    word = next(step.resume_word for step in build_steps(Config()) if step.name == "train")
    assert word(tmp_path) == "run"
    for name in ("checkpoint-2", "checkpoint-16", "checkpoint-20"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in ("checkpoint-2", "checkpoint-16"):
        checkpoints.mark_complete(tmp_path / "checkpoints" / name)
    assert word(tmp_path) == "resume from step 16"
    (tmp_path / "adapter").mkdir()
    assert word(tmp_path) == "resume"
