"""N passes of M rows are one pass of N x M rows, in every step, and an evaluation does not depend on the batch size.

Each objective is compared with a loop in plain torch that reads one answer at a time.
"""

from __future__ import annotations

import random

import pytest

from fintune.config import AdapterOptions, TrainOptions
from fintune.models import load as models
from fintune.training import full, lora, metrics, sft
from fintune.training.batches import make_schedule
from fintune.training.evaluate import Evaluation
from fintune.training.preference import preference_lengths, row_labels
from support.plain_training import step_loss, train_plainly

torch = pytest.importorskip("torch")

RATE = 1e-3
OBJECTIVES = {
    "sft": {},
    "dpo": {},
    "dpo with rpo_alpha": {"rpo_alpha": 1.0},
    "orpo": {},
    "kto pairs": {"desirable_weight": 1.0, "undesirable_weight": 1.0},
    "kto answers": {"desirable_weight": 3.0, "undesirable_weight": 0.5},
    "kto mixture": {"desirable_weight": 1.0, "undesirable_weight": 2.0},
}
METHODS = {
    "lora": {},
    "dora": {"kind": "dora"},
    "nf4": {},
    "pissa": {"init_lora_weights": "pissa"},
    "loftq": {"init_lora_weights": "loftq"},
    "full": {"kind": "full"},
}


def make_rows(name: str, number: int, seed: int):
    """Rows of very unequal answers; no prompt occurs twice."""
    from datasets import Dataset

    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(3, 390) for _ in range(draw.randrange(low, high))]

    rows = []
    for at in range(number):
        prompt, answer = [10 + at, *tokens(2, 9)], tokens(1, draw.choice((3, 40)))
        mask = [0] * len(prompt) + [1] * len(answer)
        row = {"id": f"r{at}", "input_ids": prompt + answer, "completion_mask": mask}
        if name != "sft":
            row["rejected_ids"] = tokens(1, draw.choice((3, 40)))
        if name in ("kto answers", "kto mixture"):
            row["label"] = at % 3 != 0
            row["rejected_ids"] = row["rejected_ids"] if name == "kto mixture" and row["label"] and at % 2 else []
        rows.append(row)
    return Dataset.from_list(rows)


def make_model(tiny_model, method: str):
    from transformers import set_seed

    set_seed(7)
    ref = models.fetch(str(tiny_model))
    quantization = "nf4" if method in ("nf4", "loftq") else "none"
    base = models.load_model(ref, dtype="float32", device="cpu", quantization=quantization, compute="float32")
    if method == "full":
        return full.train_all_weights(base)
    model = lora.attach_adapter(base, AdapterOptions(r=4, lora_alpha=8, **METHODS[method]))
    if method == "loftq":
        lora.init_from_quantization_error(model, ref.path)
    return model


def trained_weights(model):
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def run(tiny_model, folder, name, method, shape, rows, eval_rows):
    folder.mkdir(parents=True)
    model = make_model(tiny_model, method)
    options = TrainOptions(
        objective=name.split()[0],
        per_device_train_batch_size=shape[0],
        gradient_accumulation_steps=shape[1],
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_ratio=0,
        eval_steps=99,
        **OBJECTIVES[name],
    )
    tokenizer = models.load_tokenizer(models.fetch(str(tiny_model)))
    evaluation = Evaluation(eval_rows)
    sft.train_model(model, tokenizer, rows, options, compute="float32", seed=5, folder=folder, evaluation=evaluation)
    lines = metrics.read(folder / "metrics.jsonl")
    return [line for line in lines if "loss" in line], lines[-1]["eval_loss"], trained_weights(model), options


def check_against_plain_torch(tiny_model, tmp_path, name, method, shapes, number):
    rows, eval_rows = make_rows(name, number, 1), make_rows(name, 5, 2)
    before = make_model(tiny_model, method)
    reference = None
    for shape in shapes:
        lines, eval_loss, weights, options = run(
            tiny_model, tmp_path / f"{shape[0]}x{shape[1]}", name, method, shape, rows, eval_rows
        )
        if reference is None:
            lengths = [len(ids) for ids in rows["input_ids"]] if name == "sft" else preference_lengths(rows)
            schedule = make_schedule(lengths, options, 5, labels=row_labels(rows))
            order, size = [rows[index] for index in schedule.order], schedule.step_size
            steps = [order[at : at + size] for at in range(0, len(order), size)]
            extra = {"alpha": options.rpo_alpha}
            if options.objective == "kto":
                extra = {"weights": (options.desirable_weight, options.undesirable_weight)}
            figures, trained = train_plainly(before, steps, options.objective, learning_rate=RATE, **extra)
            longest_first = sorted(eval_rows, key=lambda row: -len(row["input_ids"]))
            with torch.no_grad():
                reference = figures, trained, float(step_loss(trained, longest_first, options.objective, **extra))
        figures, trained, held_out = reference
        assert len(lines) == len(figures) > 1
        for line, (loss, norm) in zip(lines, figures, strict=True):
            assert line["loss"] == pytest.approx(loss, rel=3e-6, abs=3e-6), (shape, line["step"])
            assert line["grad_norm"] == pytest.approx(norm, rel=1e-4), (shape, line["step"])
        assert eval_loss == pytest.approx(held_out, rel=3e-6), shape
        expected = trained_weights(trained)
        assert max(float((weights[key] - expected[key]).abs().max()) for key in expected) < 2e-5, shape


@pytest.mark.parametrize("name", OBJECTIVES)
def test_passes_of_a_step_equal_plain_torch(tiny_model, tmp_path, name):
    check_against_plain_torch(tiny_model, tmp_path, name, "lora", [(4, 1), (2, 2)], 7)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("dora", "dpo with rpo_alpha"),
        ("dora", "kto mixture"),
        ("nf4", "orpo"),
        ("nf4", "dpo"),
        ("pissa", "sft"),
        ("loftq", "sft"),
        ("full", "sft"),
    ],
)
def test_passes_equal_plain_torch_with_method(tiny_model, tmp_path, method, name):
    check_against_plain_torch(tiny_model, tmp_path, name, method, [(2, 2)], 7)
