"""Evaluations while training: exact, without a trace in the training, and right after an interruption."""

from __future__ import annotations

import re

import pytest

from fintune.config import AdapterOptions, Config, TrainOptions
from fintune.errors import FintuneError
from fintune.models import load as models
from fintune.training import checkpoints, full, lora, metrics, sft
from fintune.training.evaluate import Evaluation
from fintune.training.metrics import best_step, is_out_of_patience, training_facts
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def splits(tmp_path_factory, tiny_model):
    from datasets import load_from_disk

    rows = load_from_disk(str(prepared(tmp_path_factory.mktemp("rows") / "prepare", tiny_model) / "tokens" / "train"))
    return rows.select(range(7)), rows.select(range(7, 12))


def run(
    tiny_model,
    splits,
    folder,
    *,
    accuracy=None,
    callbacks=(),
    kind="lora",
    quantization="none",
    compute="float32",
    after_epoch=None,
    **opts,
):
    """Train from scratch or resume; gives the model and the kept step."""
    from transformers import set_seed

    folder.mkdir(exist_ok=True)
    ref = models.fetch(str(tiny_model))
    set_seed(5)
    model = models.load_model(ref, dtype="float32", device="cpu", quantization=quantization, compute=compute)
    dropout = 0.0 if opts.get("fused_layers") == "always" else 0.1
    if kind == "full":
        model = full.train_all_weights(model)
    else:
        model = lora.attach_adapter(model, AdapterOptions(kind=kind, r=4, lora_alpha=8, lora_dropout=dropout))
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 8,
        "save_steps": 3,
        "learning_rate": 2e-2,
        "eval_steps": 2,
    }
    kept = sft.train_model(
        model,
        models.load_tokenizer(ref),
        splits[0],
        TrainOptions(**(defaults | opts)),
        compute=compute,
        seed=5,
        folder=folder,
        evaluation=Evaluation(splits[1], accuracy),
        after_epoch=after_epoch,
        extra_callbacks=callbacks,
    )
    return model, kept


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics.read(folder / "metrics.jsonl")]


def losses(folder, key):
    return {line["step"]: line[key] for line in lines(folder) if key in line}


def loss_by_hand(model, rows):
    """Mean over all trained tokens, an example at a time through the plain forward pass."""
    total, num = 0.0, 0
    model.eval()
    for row in rows:
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["completion_mask"])
        with torch.no_grad():
            hidden = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        picked = hidden.gather(1, ids[1:, None])[:, 0][mask[1:] == 1]
        total, num = total - float(picked.sum()), num + len(picked)
    return total / num


def stop_at(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Stop()


@pytest.mark.parametrize("fused_layers", ["never", "always"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_eval_loss_is_the_mean_over_trained_tokens(tiny_model, splits, tmp_path, kind, fused_layers):
    model, kept = run(tiny_model, splits, tmp_path / "run", kind=kind, max_steps=5, fused_layers=fused_layers)
    found = losses(tmp_path / "run", "eval_loss")
    assert sorted(found) == [2, 4, 5]
    assert kept == 5
    assert found[5] == pytest.approx(loss_by_hand(model, splits[1]), rel=1e-5)


@pytest.mark.parametrize("fused_layers", ["never", "always"])
def test_evaluations_do_not_change_the_training(tiny_model, splits, tmp_path, fused_layers):
    often, _ = run(tiny_model, splits, tmp_path / "often", eval_steps=1, fused_layers=fused_layers)
    never, _ = run(tiny_model, splits, tmp_path / "never", eval_steps=None, fused_layers=fused_layers)
    assert losses(tmp_path / "often", "loss") == losses(tmp_path / "never", "loss")
    assert same(weights(often), weights(never))
    assert losses(tmp_path / "never", "eval_loss") == {}


def test_evaluations_keep_4_bit_weights(tiny_model, splits, tmp_path):
    common = {"quantization": "nf4", "compute": "bfloat16", "max_steps": 4}
    run(tiny_model, splits, tmp_path / "often", eval_steps=1, accuracy=lambda _: 0.5, **common)
    run(tiny_model, splits, tmp_path / "never", eval_steps=None, **common)
    assert losses(tmp_path / "often", "loss") == losses(tmp_path / "never", "loss")


@pytest.mark.parametrize("fused_layers", ["never", "always"])
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_run_with_evaluations_resumes_bit_for_bit(tiny_model, splits, tmp_path, stop, fused_layers):
    common = {"select_checkpoint": "best_loss", "learning_rate": 0.2, "fused_layers": fused_layers, "kind": "dora"}
    whole, kept = run(tiny_model, splits, tmp_path / "whole", **common)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, splits, tmp_path / "cut", callbacks=[stop_at(stop)], **common)
    resumed, kept_too = run(tiny_model, splits, tmp_path / "cut", **common)
    assert kept == kept_too
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert same(weights(whole), weights(resumed))


def spoil_behind(step):
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == step:
                for weight in model.parameters():
                    if weight.requires_grad:
                        weight.data = -30 * weight.data

    return Spoil()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_best_loss_selects_the_lowest_eval_loss(tiny_model, splits, tmp_path, kind):
    spoil = [spoil_behind(4)]
    model, kept = run(tiny_model, splits, tmp_path / "run", kind=kind, select_checkpoint="best_loss", callbacks=spoil)
    found = losses(tmp_path / "run", "eval_loss")
    assert kept == min(found, key=lambda step: found[step])
    assert kept <= 4 < max(found)
    assert loss_by_hand(model, splits[1]) == pytest.approx(found[kept], rel=1e-5)


def test_best_accuracy_selects_the_first_of_equals(tiny_model, splits, tmp_path):
    seen = []

    def accuracy(model):
        seen.append(weights(model))
        assert not model.training
        return (0.1, 0.4, 0.4, 0.2)[len(seen) - 1]

    model, kept = run(tiny_model, splits, tmp_path / "run", accuracy=accuracy, select_checkpoint="best_accuracy")
    assert kept == 4
    assert same(weights(model), seen[1])
    assert list(losses(tmp_path / "run", "eval_accuracy").values()) == [0.1, 0.4, 0.4, 0.2]


def test_patience_ends_the_run_also_when_resumed(tiny_model, splits, tmp_path, monkeypatch):
    common = {"select_checkpoint": "best_accuracy", "early_stopping_patience": 2, "max_steps": 30}

    def once():
        scores = iter((0.1, 0.5, 0.2, 0.5, 0.9))
        return lambda _model: next(scores)

    whole, kept = run(tiny_model, splits, tmp_path / "whole", accuracy=once(), **common)
    assert kept == 4
    assert max(losses(tmp_path / "whole", "loss")) == 8
    # Killed behind the last checkpoint, before the result was written.
    monkeypatch.setattr(checkpoints, "load_best", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, splits, tmp_path / "cut", accuracy=once(), **common)
    monkeypatch.undo()
    resumed, kept = run(tiny_model, splits, tmp_path / "cut", accuracy=lambda _: pytest.fail("it was over"), **common)
    assert kept == 4
    assert same(weights(whole), weights(resumed))
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_patience_with_last_keeps_the_last_weights(tiny_model, splits, tmp_path):
    spoil = [spoil_behind(4)]
    model, kept = run(
        tiny_model, splits, tmp_path / "run", early_stopping_patience=1, max_steps=40, eval_steps=1, callbacks=spoil
    )
    found = losses(tmp_path / "run", "eval_loss")
    assert kept == max(found) < 40
    assert found[kept] >= found[kept - 1]
    assert loss_by_hand(model, splits[1]) == pytest.approx(found[kept], rel=1e-5)


@pytest.mark.parametrize("keep", ["last", "best_loss"])
def test_last_step_with_patience_has_a_logged_loss(tiny_model, splits, tmp_path, keep):
    common = {
        "select_checkpoint": keep,
        "early_stopping_patience": 1,
        "eval_steps": 3,
        "logging_steps": 10,
        "max_steps": 40,
    }
    run(tiny_model, splits, tmp_path / "run", callbacks=[spoil_behind(4)], **common)
    evaluated = losses(tmp_path / "run", "eval_loss")
    assert sorted(evaluated) == [3, 6]
    assert sorted(losses(tmp_path / "run", "loss"))[-1] == 6
    facts = training_facts(Config(train=common), tmp_path / "run", 1)
    kept = {"last": 6, "best_loss": 3}[keep]
    assert (facts["num_steps"], facts["kept_step"], facts["eval_loss"]) == (6, kept, evaluated[kept])
    assert facts["stopped_early"]
    assert facts["summary"].startswith(f"6 steps, step {kept} kept with eval loss {evaluated[kept]:.3f}, loss ")
    assert re.search(r"loss \d+\.\d\d \(first steps\) to \d+\.\d\d \(last\), \d+ tok/s$", facts["summary"])


def test_only_the_best_weights_are_kept_on_the_disk(tiny_model, splits, tmp_path):
    scores = iter((0.1, 0.2, 0.9, 0.3))
    run(
        tiny_model,
        splits,
        tmp_path / "run",
        accuracy=lambda _: next(scores),
        select_checkpoint="best_accuracy",
        save_steps=2,
    )
    assert [path.name for path in (tmp_path / "run" / "best").iterdir()] == ["step-6"]


def test_best_weights_stay_until_a_newer_checkpoint(tiny_model, splits, tmp_path):
    scores = iter((0.1, 0.9))
    with pytest.raises(KeyboardInterrupt):
        run(
            tiny_model,
            splits,
            tmp_path / "run",
            accuracy=lambda _: next(scores),
            select_checkpoint="best_accuracy",
            save_steps=3,
            callbacks=[stop_at(5)],
        )
    assert checkpoints.step_of(checkpoints.latest_checkpoint(tmp_path / "run" / "checkpoints")) == 3
    assert {path.name for path in (tmp_path / "run" / "best").iterdir()} == {"step-2", "step-4"}
    scores = iter((0.05, 0.05, 0.05))
    _, kept = run(
        tiny_model, splits, tmp_path / "run", accuracy=lambda _: next(scores), select_checkpoint="best_accuracy"
    )
    assert kept == 2


@pytest.mark.parametrize("fused_layers", ["never", "always"])
def test_non_finite_eval_loss_names_the_examples(tiny_model, splits, tmp_path, fused_layers):
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                next(w for name, w in model.named_parameters() if "lora_A" in name).data.fill_(float("nan"))

    longest = sorted(splits[1], key=lambda row: -len(row["input_ids"]))[:2]
    ids = ", ".join(row["id"] for row in longest)
    with pytest.raises(FintuneError, match=f"the evaluation loss is not finite after step 2; examples {ids}: lower"):
        run(tiny_model, splits, tmp_path / "run", callbacks=[Spoil()], fused_layers=fused_layers)
    assert "eval_loss" not in lines(tmp_path / "run")[-1]


@pytest.mark.parametrize(
    ("accuracies", "patience", "expected"),
    [([0.1], 1, False), ([0.2, 0.1], 1, True), ([0.2, 0.2], 1, True), ([0.2, 0.1, 0.3, 0.1], 2, False), ([], 1, False)],
)
def test_patience_counts_evaluations_after_the_best(accuracies, patience, expected):
    read = [{"step": step, "loss": 1.0} for step in range(1, 5)]
    read += [{"step": k, "eval_loss": 1.0, "eval_accuracy": right} for k, right in enumerate(accuracies, 1)]
    options = TrainOptions(eval_steps=1, select_checkpoint="best_accuracy", early_stopping_patience=patience)
    assert is_out_of_patience(read, options) is expected


def test_best_step_follows_select_checkpoint():
    read = [
        {"step": 2, "eval_loss": 0.5, "eval_accuracy": 0.1},
        {"step": 4, "eval_loss": 0.7, "eval_accuracy": 0.3},
        {"step": 6, "eval_loss": 0.5, "eval_accuracy": 0.3},
    ]
    assert (best_step(read, "best_loss"), best_step(read, "best_accuracy"), best_step(read, "last")) == (2, 4, 2)
    assert best_step([{"step": 1, "loss": 2.0}], "best_loss") is None


def test_epochs_are_evaluated_and_saved_when_a_pass_is_complete(tiny_model, splits, tmp_path):
    """7 rows in steps of 5: passes are complete after 7, 14 and 21 examples, in the steps 2, 3 and 5."""
    epochs, saved = [], []

    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **_):
            saved.append((state.global_step, state.epoch))

    options = {"per_device_train_batch_size": 5, "num_train_epochs": 3, "max_steps": None, "eval_steps": None}
    run(
        tiny_model,
        splits,
        tmp_path / "run",
        callbacks=[Look()],
        after_epoch=lambda *args: epochs.append(args),
        eval_strategy="epoch",
        save_strategy="epoch",
        **options,
    )
    assert losses(tmp_path / "run", "epoch") == {2: 1, 3: 2, 5: 3}
    assert sorted(losses(tmp_path / "run", "eval_loss")) == [2, 3, 5]
    assert saved == [(2, 10 / 7), (3, 15 / 7), (5, 3.0)]
    assert epochs == [(1, 2), (2, 3)]


def test_damaged_checkpoint_resumes_from_the_older_one_exactly(tiny_model, splits, tmp_path, capsys):
    """The best weights up to the older checkpoint are still there."""
    options = {"save_steps": 2, "select_checkpoint": "best_loss"}
    whole, kept = run(tiny_model, splits, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, splits, tmp_path / "cut", callbacks=[stop_at(6)], **options)
    damaged = tmp_path / "cut/checkpoints/checkpoint-6/adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + bytes(4))
    resumed, kept_after = run(tiny_model, splits, tmp_path / "cut", **options)
    assert "adapter_model.safetensors is damaged" in capsys.readouterr().err.replace("\n", " ")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert kept_after == kept
    assert same(weights(resumed), weights(whole))
