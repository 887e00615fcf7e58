"""The optimiser and the warm-up that were chosen are those that train, and go on after an interruption."""

from __future__ import annotations

import importlib.util

import pytest

from fintune.config import AdapterOptions, Config, TrainOptions
from fintune.errors import ConfigError, ResourceError
from fintune.models import load as models
from fintune.pipeline.stages.train import check_training
from fintune.training import lora, metrics, optimizers, sft
from fintune.training.memory.model import AdapterMethod, DecoderShape, StepSetting, static_bytes
from fintune.util.console import quiet_libraries
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_model):
    from datasets import load_from_disk

    return load_from_disk(str(prepared(tmp_path_factory.mktemp("rows") / "prepare", tiny_model) / "tokens" / "train"))


def run(tiny_model, rows, folder, *, stop=None, **options):
    """Train, or go on; gives the adapter's weights and the optimiser."""
    from transformers import TrainerCallback, set_seed

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **_):
            self.optimizer = getattr(optimizer, "optimizer", optimizer)
            if state.global_step == stop:
                raise KeyboardInterrupt

    look, ref = Look(), models.fetch(str(tiny_model))
    folder.mkdir(exist_ok=True)
    set_seed(5)
    model = lora.attach_adapter(
        models.load_model(ref, dtype="float32", device="cpu"), AdapterOptions(r=64, lora_alpha=64)
    )
    defaults = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    chosen = TrainOptions(**(defaults | options))
    tokenizer = models.load_tokenizer(ref)
    sft.train_model(model, tokenizer, rows, chosen, compute="float32", seed=5, folder=folder, extra_callbacks=[look])
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}, look.optimizer


@pytest.mark.parametrize(
    ("name", "kind", "state"),
    [
        ("adamw_torch", "AdamW", torch.float32),
        ("adamw_8bit", "AdamW", torch.uint8),
        ("lion_8bit", "Lion", torch.uint8),
        ("adafactor", "Adafactor", torch.float32),
        ("sgd", "SGD", None),
    ],
)
def test_the_chosen_optimizer_trains(tiny_model, rows, tmp_path, name, kind, state):
    weights, used = run(tiny_model, rows, tmp_path / "run", optim=name, max_steps=2)
    assert type(used).__name__ == kind
    kept = {
        moment.dtype
        for weight, moments in used.state.items()
        for moment in moments.values()
        if torch.is_tensor(moment) and moment.shape == weight.shape
    }
    assert (state in kept) or (name == "adafactor" and not kept) or (state is None and not kept)
    assert any(bool(weight.any()) for part, weight in weights.items() if "lora_B" in part)


def optimizer_of(options, folder, shape=(64, 64)):
    """What the trainer's arguments make of the options, on one matrix of ones."""
    from transformers import Trainer

    from fintune.training.trainers import make_arguments

    matrix = torch.nn.Linear(*shape, bias=False)
    torch.nn.init.ones_(matrix.weight)
    with quiet_libraries():
        args = make_arguments(matrix, options, 3, "float32", 0, folder)
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(args, matrix)
    group = {"params": [matrix.weight], "weight_decay": args.weight_decay}
    return kind([group], **keywords), matrix.weight


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "lion_8bit", "adafactor", "sgd"])
def test_weight_decay_means_the_same_in_each_optimizer(tmp_path, name):
    """Without a gradient, a step takes the share learning rate x weight decay off each weight."""
    options = TrainOptions(optim=name, learning_rate=0.1, weight_decay=0.25)
    optimizer, weight = optimizer_of(options, tmp_path)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.allclose(weight, torch.full_like(weight, 1 - 0.1 * 0.25), rtol=1e-5)


@pytest.mark.parametrize("name", ["lion_8bit", "adafactor", "sgd"])
def test_beta2_of_adam_is_for_adam_only(tmp_path, name):
    with pytest.raises(ValueError, match=f"train.adam_beta2 is not read with train.optim: {name}; remove it"):
        Config(train=TrainOptions(optim=name, adam_beta2=0.95))
    optimizer, _ = optimizer_of(TrainOptions(optim=name, adam_beta2=0.95), tmp_path)
    betas = optimizer.param_groups[0].get("betas")
    assert betas == ((0.9, 0.99) if name == "lion_8bit" else None)  # Lion's paper
    optimizer, _ = optimizer_of(TrainOptions(optim="adamw_8bit", adam_beta2=0.95), tmp_path)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_interrupted_run_with_8_bit_moments_resumes(tiny_model, rows, tmp_path):
    whole, _ = run(tiny_model, rows, tmp_path / "whole", optim="adamw_8bit")
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, rows, tmp_path / "cut", optim="adamw_8bit", stop=3)
    resumed, _ = run(tiny_model, rows, tmp_path / "cut", optim="adamw_8bit")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_warm_up_steps_override_the_ratio(tiny_model, rows, tmp_path, capsys):
    run(
        tiny_model,
        rows,
        tmp_path / "run",
        warmup_steps=2,
        warmup_ratio=0.9,
        lr_scheduler_type="constant_with_warmup",
        learning_rate=1e-3,
    )
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [line["learning_rate"] for line in lines] == [0.0, 5e-4, 1e-3, 1e-3]
    assert "never reached" not in capsys.readouterr().err


def test_warm_up_that_never_ends_is_reported(tiny_model, rows, tmp_path, capsys):
    run(tiny_model, rows, tmp_path / "run", warmup_steps=5, max_steps=2)
    told = " ".join(capsys.readouterr().err.split())
    assert "train.warmup_steps is 5 of 2 steps: train.learning_rate is never reached" in told


@pytest.mark.parametrize(
    ("name", "hint"), [("paged_adamw_8bit", "set it to adamw_8bit"), ("paged_adamw_32bit", "set it to adamw_torch,")]
)
def test_paged_optimizers_need_a_gpu(name, hint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"train.optim: {name} .*there is no GPU: {hint}"):
        check_training(Config(train=TrainOptions(optim=name)))
    optimizers.check_optimizer(name, cuda=True)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="adamw_8bit needs bitsandbytes: pip install bitsandbytes, or set it"):
        optimizers.check_optimizer("adamw_8bit", cuda=True)
    optimizers.check_optimizer("adafactor", cuda=False)


def test_optimizers_have_names_and_bytes():
    from transformers.training_args import OptimizerNames

    (choices,) = [TrainOptions.model_fields["optim"].annotation.__args__]
    assert set(choices) == set(optimizers.MOMENT_BYTES)
    assert set(choices) <= {each.value for each in OptimizerNames}


def test_the_planner_counts_the_moments_of_the_chosen_optimizer():
    shape = DecoderShape(5120, 13824, 48, 40, 8, 128, 152064, tied=False)
    setting, whole = StepSetting(48, False, 4096), AdapterMethod(32, four_bit=True)
    small = AdapterMethod(32, four_bit=True, moment_bytes=optimizers.MOMENT_BYTES["adamw_8bit"])
    spared = static_bytes(shape, whole, setting) - static_bytes(shape, small, setting)
    assert spared == pytest.approx(whole.num_trained(shape) * (8 - 2 * (1 + 4 / 256)), abs=2)
