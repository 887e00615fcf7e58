"""Batches of pairs and the losses on them, by themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fintune.errors import ArtifactError, DataError
from fintune.training.batches import PreferenceCollator, batch_preference_rows, num_steps
from fintune.training.metrics import format_correct_sides
from fintune.training.preference import (
    AnswerFigures,
    count_labels,
    label_weights,
    odds_ratio_loss,
    preference_lengths,
)

torch = pytest.importorskip("torch")


def row(id_: str, prompt: list[int], chosen: list[int], rejected: list[int]) -> dict[str, object]:
    mask = [0] * len(prompt) + [1] * len(chosen)
    return {"id": id_, "input_ids": prompt + chosen, "completion_mask": mask, "rejected_ids": rejected}


ROWS = [row("a", [1, 2], [3], [4, 5, 6]), row("b", [7], [8, 9], [10])]


def test_collator_puts_chosen_above_rejected():
    batch = PreferenceCollator(0, multiple=8)(ROWS)
    assert batch["ids"] == ["a", "b"]
    assert batch["input_ids"].shape == (4, 8)
    assert batch["input_ids"][:, :5].tolist() == [[1, 2, 3, 0, 0], [7, 8, 9, 0, 0], [1, 2, 4, 5, 6], [7, 10, 0, 0, 0]]
    assert batch["completion_mask"].sum(1).tolist() == [1, 2, 3, 1]
    assert batch["attention_mask"].sum(1).tolist() == [3, 3, 5, 2]


def test_collator_pairs_prompts_with_other_answers():
    batch = PreferenceCollator(0, unpaired=True)(ROWS)
    assert batch["label"].tolist() == [True, True, False, False]
    answers = {tuple(ROWS[n]["input_ids"][len(p) :]): n for n, p in enumerate(([1, 2], [7]))}
    answers |= {tuple(each["rejected_ids"]): n for n, each in enumerate(ROWS)}
    for at, (ids, mask) in enumerate(zip(batch["KL_input_ids"], batch["KL_completion_mask"], strict=True)):
        answer = tuple(ids[mask == 1].tolist())
        assert answers[answer] != at % 2, f"{answer} was given to prompt {at % 2}"


def answer(id_: str, prompt: list[int], completion: list[int], label: bool) -> dict[str, object]:
    return {**row(id_, prompt, completion, []), "label": label}


def test_collator_keeps_labels_of_unpaired_answers():
    rows = [answer("a", [1, 2], [3], True), answer("b", [1, 2], [4, 5], False), answer("c", [7], [8], True)]
    batch = PreferenceCollator(0, unpaired=True)([*rows, {**ROWS[0], "label": True}])
    assert batch["label"].tolist() == [True, False, True, True, False]
    assert batch["input_ids"][1:3, :4].tolist() == [[1, 2, 4, 5], [7, 8, 0, 0]]
    assert batch["input_ids"][4, :5].tolist() == [1, 2, 4, 5, 6]


def test_collator_shifts_past_answers_to_one_prompt():
    rows = [answer(f"{p}{n}", [p], [10 * p + n], n > 0) for p in (1, 2, 3) for n in (0, 1)]
    batch = PreferenceCollator(0, unpaired=True)(rows)
    assert [int(own[0]) for own in batch["KL_input_ids"]] == [1, 1, 2, 2, 3, 3]
    assert all(int(ids[1]) // 10 != int(ids[0]) for ids in batch["KL_input_ids"])


@pytest.mark.parametrize(
    ("counts", "given", "weights"),
    [
        ((40, 40), {}, (1, 1)),
        ((50, 40), {}, (1, 1)),
        ((10, 100), {}, (10, 1)),
        ((90, 10), {}, (1, 6.75)),
        ((90, 10), {"desirable_weight": 0.5}, (0.5, 3.375)),
        ((10, 100), {"desirable_weight": 12}, (12, 1)),
        ((10, 100), {"undesirable_weight": 0.5}, (5, 0.5)),
        ((10, 100), {"desirable_weight": 1, "undesirable_weight": 1}, (1, 1)),
    ],
)
def test_label_weights_follow_the_paper(counts, given, weights):
    from fintune.config import TrainOptions

    options = TrainOptions(objective="kto", **given)
    found = label_weights(options, *counts)
    assert found == pytest.approx(weights)
    if len(given) < 2:
        assert 1 - 1e-9 <= found[0] * counts[0] / (found[1] * counts[1]) <= 4 / 3 + 1e-9


def test_answer_figures_by_label():
    one, two = AnswerFigures(), AnswerFigures()
    one.add([True, True, False], [0.2, -0.1, -0.3], [-1.0, -2.0, -3.0], loss=0.4, kl=0.1)
    one.add([False], [0.1], [-5.0], loss=0.8, kl=0.5)
    assert one.figures() == pytest.approx(
        {
            "loss": 0.5,
            "kl": 0.2,
            "rewards/chosen": 0.05,
            "rewards/chosen_right": 0.5,
            "logps/chosen": -1.5,
            "rewards/rejected": -0.1,
            "rewards/rejected_right": 0.5,
            "logps/rejected": -4.0,
            "rewards/margins": 0.15,
        }
    )
    two.add([False], [0.0], [-5.0], loss=0.5, kl=0.0)
    assert two.figures() == {
        "loss": 0.5,
        "kl": 0.0,
        "rewards/rejected": 0.0,
        "rewards/rejected_right": 0.0,
        "logps/rejected": -5.0,
    }
    assert format_correct_sides({"desired": 0.5, "undesired": 1.0}) == (
        "50.0% of the desired answers above, 100.0% of the undesired answers below the reference"
    )


def test_collator_refuses_rows_that_train_nothing():
    with pytest.raises(DataError, match="id a: no token of this example is trained"):
        PreferenceCollator(0)([{**ROWS[0], "completion_mask": [0, 0, 0]}])


def test_pair_length_counts_the_prompt_twice():
    from datasets import Dataset

    assert preference_lengths(Dataset.from_list(ROWS)) == [3 + 2 + 3, 3 + 1 + 1]
    alone = Dataset.from_list([answer("a", [1, 2], [3], True), {**ROWS[0], "label": True}])
    assert preference_lengths(alone) == [3, 3 + 2 + 3]
    assert count_labels(alone) == (2, 1)
    assert count_labels(Dataset.from_list(ROWS)) == (2, 2)
    with pytest.raises(ArtifactError, match="not preference pairs"):
        preference_lengths(Dataset.from_list([{"input_ids": [1], "completion_mask": [1]}]))


@pytest.mark.parametrize(("num_rows", "size"), [(7, 3), (6, 3), (1, 2), (9, 2), (2, 4)])
def test_batches_have_no_single_last_row(num_rows, size):
    order = list(range(num_rows))[::-1]
    made = batch_preference_rows([{"n": n} for n in range(num_rows)], order, size)
    assert [each["n"] for batch in made for each in batch] == order
    assert all(len(batch) > 1 for batch in made) or num_rows == 1


def test_kto_fills_the_last_step():
    from fintune.config import TrainOptions
    from fintune.training.sft import make_schedule

    plans = [
        make_schedule([5] * 9, TrainOptions(objective=name, num_train_epochs=1, per_device_train_batch_size=4), 1)
        for name in ("dpo", "kto")
    ]
    assert num_steps(9, 1, 4, None) == (9, 3)
    assert [(plan.steps, len(plan.order)) for plan in plans] == [(3, 9), (3, 12)]


class Model:
    """Gives the log-probabilities that it was made with."""

    def __init__(self, log_probs):
        self.log_probs = log_probs

    def __call__(self, *, labels, **_):
        return SimpleNamespace(log_probs=self.log_probs.masked_fill(labels[:, 1:] == -100, 0))


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_orpo_loss_equals_trl(monkeypatch, scale):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    batch = PreferenceCollator(0)(ROWS)
    log_probs = -scale * torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    loss, figures = odds_ratio_loss(Model(log_probs), batch, 0.25)
    mask = batch["completion_mask"][:, 1:]
    means = (log_probs * mask).sum(1) / mask.sum(1)
    trl = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    weighed, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(trl, means[:2], means[2:])
    assert float(loss) == pytest.approx(float((-means[:2] - weighed).mean()), rel=1e-5)
    assert figures["rewards/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-5)
    assert figures["rewards/margins"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4, abs=1e-7)


def test_orpo_stays_finite_for_an_answer_that_is_certain():
    batch = PreferenceCollator(0)(ROWS)
    sure = torch.zeros(4, 4, requires_grad=True)
    loss, _ = odds_ratio_loss(Model(sure), batch, 0.1)
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(sure.grad.isfinite().all())
