from __future__ import annotations

from types import SimpleNamespace

import pytest

from fintune.config import AdapterOptions, TrainOptions
from fintune.errors import ConfigError, FintuneError
from fintune.models import load as models
from fintune.training import evaluate, lora, metrics, sft, trainers
from fintune.training.batches import make_schedule
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")


@pytest.fixture
def rows(tmp_path, tiny_model):
    from datasets import load_from_disk

    return load_from_disk(str(prepared(tmp_path / "prepare", tiny_model) / "tokens" / "train"))


def run(
    tiny_model,
    rows,
    folder,
    *,
    callbacks=(),
    spoil=None,
    kind="lora",
    dropout=0.1,
    dtype="float32",
    compute=None,
    **options,
):
    """Train from scratch or resume; gives the adapter's weights."""
    from transformers import set_seed

    folder.mkdir(exist_ok=True)
    ref = models.fetch(str(tiny_model))
    set_seed(5)
    model = lora.attach_adapter(
        models.load_model(ref, dtype=dtype, device="cpu"),
        AdapterOptions(kind=kind, r=4, lora_alpha=8, lora_dropout=dropout),
    )
    if spoil:
        spoil(model)
    defaults = {"per_device_train_batch_size": 4, "max_steps": 8, "save_steps": 3, "learning_rate": 1e-2}
    sft.train_model(
        model,
        models.load_tokenizer(ref),
        rows,
        TrainOptions(**(defaults | options)),
        compute=compute or dtype,
        seed=5,
        folder=folder,
        extra_callbacks=callbacks,
    )
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def history(folder):
    lines = metrics.read(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def stop_at(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Stop()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_resumed_run_equals_the_uninterrupted_one(tiny_model, rows, tmp_path):
    whole = run(tiny_model, rows, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, rows, tmp_path / "cut", callbacks=[stop_at(5)])
    assert [line["step"] for line in history(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    resumed = run(tiny_model, rows, tmp_path / "cut")
    assert same(whole, resumed)
    assert history(tmp_path / "whole") == history(tmp_path / "cut")


def test_the_loss_falls(tiny_model, rows, tmp_path):
    run(tiny_model, rows, tmp_path / "run", dropout=0.0, max_steps=40, learning_rate=5e-2, save_steps=99)
    losses = [line["loss"] for line in history(tmp_path / "run")]
    # The tiny model's small tied embeddings bound its logits: uniform is 5.99, and much below 5.6 it cannot go.
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.15


def test_eight_examples_at_once_equal_eight_accumulated(tiny_model, rows, tmp_path):
    at_once = run(tiny_model, rows, tmp_path / "a", dropout=0.0, per_device_train_batch_size=8, max_steps=3)
    accumulated = run(
        tiny_model,
        rows,
        tmp_path / "b",
        dropout=0.0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        max_steps=3,
    )
    for a, b in zip(history(tmp_path / "a"), history(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["tokens"] == b["tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert max(float((at_once[n] - accumulated[n]).abs().max()) for n in at_once) < 1e-3


def test_label_only_head_equals_trl(tiny_model, rows, tmp_path, monkeypatch):
    own = run(tiny_model, rows, tmp_path / "own", dropout=0.0, max_steps=2)
    monkeypatch.setattr(trainers, "use_label_only_head", lambda *_arguments, **_options: "trl")
    trl = run(tiny_model, rows, tmp_path / "trl", dropout=0.0, max_steps=2)
    for a, b in zip(history(tmp_path / "own"), history(tmp_path / "trl"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert max(float((own[n] - trl[n]).abs().max()) for n in own) < 1e-3


def test_stored_bfloat16_weights_equal_autocast(tiny_model, rows, tmp_path, monkeypatch):
    cast_once = run(tiny_model, rows, tmp_path / "once", compute="bfloat16")
    monkeypatch.setattr(trainers, "store_frozen_weights", lambda _model, _dtype: 0)
    cast_always = run(tiny_model, rows, tmp_path / "always", compute="bfloat16")
    assert same(cast_once, cast_always)
    assert history(tmp_path / "once") == history(tmp_path / "always")


def test_store_frozen_weights_changes_lora_layers_only(tiny_model):
    for kind, stored in (("lora", torch.bfloat16), ("dora", torch.float32)):
        base = models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")
        model = lora.attach_adapter(base, AdapterOptions(kind=kind, r=4, lora_alpha=8))
        assert lora.store_frozen_weights(model, "bfloat16") == (14 if kind == "lora" else 0)
        types = {name: weight.dtype for name, weight in model.named_parameters()}
        assert {dtype for name, dtype in types.items() if "base_layer" in name} == {stored}
        assert {dtype for name, dtype in types.items() if "base_layer" not in name} == {torch.float32}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_bfloat16_trains_float32_adapters_close_to_float32(tiny_model, rows, tmp_path, kind):
    weights = run(tiny_model, rows, tmp_path / "bf16", dropout=0.0, dtype="bfloat16", kind=kind)
    run(tiny_model, rows, tmp_path / "fp32", dropout=0.0, kind=kind)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for a, b in zip(history(tmp_path / "bf16"), history(tmp_path / "fp32"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_fused_layers_train_like_transformers(tiny_model, rows, tmp_path, kind, gradient_checkpointing):
    common = {
        "dropout": 0.0,
        "kind": kind,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    own = run(
        tiny_model,
        rows,
        tmp_path / "own",
        fused_layers="always",
        gradient_checkpointing=gradient_checkpointing,
        **common,
    )
    theirs = run(tiny_model, rows, tmp_path / "theirs", fused_layers="never", **common)
    for a, b in zip(history(tmp_path / "own"), history(tmp_path / "theirs"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert own.keys() == theirs.keys()
    assert max(float((own[n] - theirs[n]).abs().max()) for n in own) < 1e-3


def test_fused_run_with_dropout_resumes_exactly(tiny_model, rows, tmp_path):
    fused = {"dropout": 0.1, "kind": "dora", "fused_layers": "always"}
    whole = run(tiny_model, rows, tmp_path / "whole", **fused)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, rows, tmp_path / "cut", callbacks=[stop_at(5)], **fused)
    resumed = run(tiny_model, rows, tmp_path / "cut", **fused)
    assert same(whole, resumed)
    assert history(tmp_path / "whole") == history(tmp_path / "cut")


def test_unsupported_fused_layers_are_refused(tiny_model, rows, tmp_path):
    def attend_through_a_window(model):
        model.get_base_model().config.use_sliding_window = True
        model.get_base_model().config.sliding_window = 64

    with pytest.raises(ConfigError, match=r"fused_layers: always is not possible: it attends through a sliding window"):
        run(tiny_model, rows, tmp_path / "run", spoil=attend_through_a_window, fused_layers="always")


def test_the_magnitude_of_dora_moves(tiny_model, rows, tmp_path):
    start = run(tiny_model, rows, tmp_path / "a", kind="dora", max_steps=1, learning_rate=1e-12)
    end = run(tiny_model, rows, tmp_path / "b", kind="dora")
    moved = [not torch.equal(start[name], end[name]) for name in start if "magnitude" in name]
    assert len(moved) == 14
    assert all(moved)


@pytest.mark.parametrize("fused_layers", ["never", "always"])
@pytest.mark.parametrize(("compute", "wider"), [("float32", ""), ("bfloat16", ", or set train.dtype to float32")])
def test_non_finite_loss_names_step_and_examples(tiny_model, rows, tmp_path, fused_layers, compute, wider):
    def spoil(model):
        next(weight for name, weight in model.named_parameters() if "lora_A" in name).data.fill_(float("nan"))

    with pytest.raises(
        FintuneError, match=r"the loss is not finite at step 1; examples x\d+, x\d+, x\d+, x\d+: lower"
    ) as raised:
        run(tiny_model, rows, tmp_path / "run", spoil=spoil, dropout=0.0, compute=compute, fused_layers=fused_layers)
    assert not list((tmp_path / "run").glob("checkpoints/*/complete"))
    assert raised.value.hint == f"lower train.learning_rate{wider}"  # no word of checkpoints


def test_last_step_is_always_logged(tiny_model, rows, tmp_path):
    run(tiny_model, rows, tmp_path / "run", logging_steps=4, max_steps=6, save_steps=99)
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 4, 6]


def test_resumed_run_logs_equal_losses_with_sparse_log(tiny_model, rows, tmp_path):
    options = {"logging_steps": 4, "max_steps": 5, "per_device_train_batch_size": 2}
    run(tiny_model, rows, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, rows, tmp_path / "cut", callbacks=[stop_at(3)], **options)
    run(tiny_model, rows, tmp_path / "cut", **options)
    assert [line["step"] for line in history(tmp_path / "whole")] == [1, 3, 4, 5]
    assert history(tmp_path / "whole") == history(tmp_path / "cut")


def test_two_checkpoints_are_kept_while_training(tiny_model, rows, tmp_path):
    run(tiny_model, rows, tmp_path / "run", save_steps=2)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["checkpoint-6", "checkpoint-8"]


def test_unknown_target_module_is_refused(tiny_model):
    model = models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")
    with pytest.raises(ConfigError, match=r"no linear layer 'q_prj': use some of down_proj, .*q_proj"):
        lora.attach_adapter(model, AdapterOptions(target_modules=("q_prj",)))


@pytest.mark.parametrize("fused_layers", ["never", "always"])
def test_non_finite_gradient_names_the_examples(tiny_model, rows, tmp_path, fused_layers):
    """The loss is finite all the time; a hook spoils the gradient of one matrix in the second step."""
    calls = []

    def spoil(model):
        def hook(gradient):
            calls.append(gradient)
            return gradient * float("inf") if len(calls) == 2 else gradient

        next(weight for name, weight in model.named_parameters() if "lora_B" in name).register_hook(hook)

    options = {"fused_layers": fused_layers, "dropout": 0.0, "per_device_train_batch_size": 3}
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = make_schedule(lengths, TrainOptions(max_steps=8, per_device_train_batch_size=3), 5).order
    ids = ", ".join(rows[index]["id"] for index in order[3:6])
    with pytest.raises(FintuneError, match=f"the gradient is not finite at step 2; examples {ids}: lower"):
        run(tiny_model, rows, tmp_path / "run", spoil=spoil, **options)
    assert [line["step"] for line in history(tmp_path / "run")] == [1]


def test_non_finite_error_counts_many_examples():
    told = str(
        evaluate.non_finite_error("the loss", [f"x{i}" for i in range(40)], SimpleNamespace(bf16=True, fp16=False))
    )
    assert "x31 and 8 more: lower" in told
    assert "x32" not in told
