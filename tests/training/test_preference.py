"""Batches of pairs and the losses on them, by themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fintune.config import TrainOptions
from fintune.errors import ArtifactError, DataError
from fintune.training.batches import IGNORED, PreferenceCollator, make_schedule
from fintune.training.preference import (
    Scores,
    count_labels,
    label_weights,
    preference_figures,
    preference_lengths,
    preference_losses,
)

torch = pytest.importorskip("torch")


def row(id_: str, prompt: list[int], chosen: list[int], rejected: list[int]) -> dict[str, object]:
    mask = [0] * len(prompt) + [1] * len(chosen)
    return {"id": id_, "input_ids": prompt + chosen, "completion_mask": mask, "rejected_ids": rejected}


ROWS = [row("a", [1, 2], [3], [4, 5, 6]), row("b", [7], [8, 9], [10])]


def completions(batch):
    """The trained tokens of each answer."""
    return [ids[ids != IGNORED].tolist() for ids in batch["labels"]]


def one_pass(rows, **options):
    (batch,) = PreferenceCollator(0, 99, **options)(rows)["passes"]
    return batch


def test_collator_puts_chosen_above_rejected():
    batch = one_pass(ROWS, multiple=8)
    answers = batch["answers"]
    assert batch["ids"] == ["a", "b"]
    assert answers["input_ids"].shape == (4, 8)
    assert answers["input_ids"][:, :5].tolist() == [[1, 2, 3, 0, 0], [7, 8, 9, 0, 0], [1, 2, 4, 5, 6], [7, 10, 0, 0, 0]]
    assert completions(answers) == [[3], [8, 9], [4, 5, 6], [10]]
    assert answers["attention_mask"].sum(1).tolist() == [3, 3, 5, 2]
    assert batch["desired"].tolist() == [True, True, False, False]


def test_collator_divides_a_step_into_passes():
    rows = [row(str(n), [20 + n], [n], [n, n]) for n in range(1, 6)]
    first, second, third = PreferenceCollator(0, 2, unpaired=True)(rows)["passes"]
    assert [batch["ids"] for batch in (first, second, third)] == [["1", "2"], ["3", "4"], ["5"]]
    assert completions(second["answers"]) == [[3], [4], [3, 3], [4, 4]]
    assert completions(third["answers"]) == [[5], [5, 5]]
    # The other answers come from the whole step: 5 chosen ones, then 5 rejected ones, each moved by one.
    assert completions(first["mismatched"]) == [[5, 5], [1], [5], [1, 1]]
    assert completions(third["mismatched"]) == [[4], [4, 4]]


def answer(id_: str, prompt: list[int], completion: list[int], label: bool) -> dict[str, object]:
    return {**row(id_, prompt, completion, []), "label": label}


def test_collator_keeps_labels_of_unpaired_answers():
    rows = [answer("a", [1, 2], [3], True), answer("b", [1, 2], [4, 5], False), answer("c", [7], [8], True)]
    batch = one_pass([*rows, {**ROWS[0], "label": True}], unpaired=True)
    assert batch["desired"].tolist() == [True, False, True, True, False]
    assert batch["answers"]["input_ids"][1:3, :4].tolist() == [[1, 2, 4, 5], [7, 8, 0, 0]]
    assert batch["answers"]["input_ids"][4, :5].tolist() == [1, 2, 4, 5, 6]


def test_collator_shifts_past_answers_to_one_prompt():
    rows = [answer(f"{p}{n}", [p], [10 * p + n], n > 0) for p in (1, 2, 3) for n in (0, 1)]
    mismatched = one_pass(rows, unpaired=True)["mismatched"]["input_ids"]
    assert [int(own[0]) for own in mismatched] == [1, 1, 2, 2, 3, 3]
    assert all(int(ids[1]) // 10 != int(ids[0]) for ids in mismatched)


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
    options = TrainOptions(objective="kto", **given)
    found = label_weights(options, *counts)
    assert found == pytest.approx(weights)
    if len(given) < 2:
        assert 1 - 1e-9 <= found[0] * counts[0] / (found[1] * counts[1]) <= 4 / 3 + 1e-9


def scores(rewards, logps, labels):
    """Scores whose gains over the reference are ten times the rewards (beta is 0.1)."""
    policy = torch.tensor(logps)
    return Scores(policy, policy - 10 * torch.tensor(rewards), torch.ones(len(labels)), torch.tensor(labels))


def test_answer_figures_by_label():
    options = TrainOptions(objective="kto", desirable_weight=1, undesirable_weight=1)
    both = scores([0.2, -0.1, -0.3, 0.1], [-1.0, -2.0, -3.0, -5.0], [True, True, False, False])
    assert preference_figures(options, both, 0.2, paired=False) == pytest.approx(
        {
            "kl": 0.2,
            "rewards/chosen": 0.05,
            "rewards/chosen_right": 0.5,
            "logps/chosen": -1.5,
            "rewards/rejected": -0.1,
            "rewards/rejected_right": 0.5,
            "logps/rejected": -4.0,
            "rewards/margins": 0.15,
        },
        abs=1e-6,
    )
    one = preference_figures(options, scores([0.0], [-5.0], [False]), 0.0, paired=False)
    assert one == {"kl": 0.0, "rewards/rejected": 0.0, "rewards/rejected_right": 0.0, "logps/rejected": -5.0}


def test_collator_refuses_rows_that_train_nothing():
    with pytest.raises(DataError, match="id a: no token of this example is trained"):
        one_pass([{**ROWS[0], "completion_mask": [0, 0, 0]}])


def test_pair_length_counts_the_prompt_twice():
    from datasets import Dataset

    assert preference_lengths(Dataset.from_list(ROWS)) == [3 + 2 + 3, 3 + 1 + 1]
    alone = Dataset.from_list([answer("a", [1, 2], [3], True), {**ROWS[0], "label": True}])
    assert preference_lengths(alone) == [3, 3 + 2 + 3]
    assert count_labels(alone) == (2, 1)
    assert count_labels(Dataset.from_list(ROWS)) == (2, 2)
    with pytest.raises(ArtifactError, match="not preference pairs"):
        preference_lengths(Dataset.from_list([{"input_ids": [1], "completion_mask": [1]}]))


def test_kto_fills_the_last_step():
    plans = [
        make_schedule([5] * 9, TrainOptions(objective=name, num_train_epochs=1, per_device_train_batch_size=4), 1)
        for name in ("dpo", "kto")
    ]
    assert [(plan.steps, len(plan.order)) for plan in plans] == [(3, 9), (3, 12)]


def mean_scores(means, lengths):
    """Scores of two pairs with these mean log-probabilities of a token."""
    lengths = torch.tensor(lengths)
    return Scores(means * lengths, torch.zeros(4), lengths, torch.tensor([True, True, False, False]))


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_orpo_loss_equals_trl(monkeypatch, scale):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    options = TrainOptions(objective="orpo", beta=0.25)
    means = -scale * torch.rand(4, generator=torch.Generator().manual_seed(0))
    found = mean_scores(means, [1, 2, 3, 1])
    trl = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    weighed, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(trl, means[:2], means[2:])
    assert torch.allclose(preference_losses(options, found), -means[:2] - weighed, rtol=1e-5)
    figures = preference_figures(options, found, 0.0, paired=True)
    assert figures["rewards/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-5)
    assert figures["rewards/margins"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4, abs=1e-7)


def test_orpo_stays_finite_for_an_answer_that_is_certain():
    sure = torch.zeros(4, requires_grad=True)
    loss = preference_losses(TrainOptions(objective="orpo"), mean_scores(sure, [1, 2, 3, 1])).mean()
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(sure.grad.isfinite().all())
