from __future__ import annotations

from collections import Counter

import pytest

from fintune.config import TrainOptions
from fintune.errors import DataError
from fintune.training.batches import IGNORED, CompletionCollator, make_schedule, training_order

LENGTHS = [5 + (i * 7) % 40 for i in range(100)]


def test_every_pass_sees_every_example_once():
    order = training_order(LENGTHS, 300, 8, seed=1)
    assert Counter(order) == Counter(dict.fromkeys(range(100), 3))


def test_a_part_of_a_pass_repeats_nothing():
    order = training_order(LENGTHS, 50, 8, seed=1)
    assert len(set(order)) == len(order) == 50


@pytest.mark.parametrize("batch_size", [8, 16, 64, 100])
@pytest.mark.parametrize("mixes", [False, True])
def test_steps_repeat_no_example_within_a_pass(batch_size, mixes):
    labels = [index % 3 == 0 for index in range(100)] if mixes else None
    order = training_order(LENGTHS, 400, batch_size, seed=1, labels=labels)
    steps = [order[at : at + batch_size] for at in range(0, 400, batch_size)]
    assert all(len(set(step)) == len(step) for step in steps)
    assert all(sorted(order[at : at + 100]) == list(range(100)) for at in range(0, 400, 100))


def test_the_step_between_two_passes_mixes_labels_too():
    labels = [index % 4 == 0 for index in range(100)]
    order = training_order(LENGTHS, 400, 16, seed=1, labels=labels)
    for at in range(0, 400, 16):
        assert 3 <= sum(labels[index] for index in order[at : at + 16]) <= 5


def test_fewer_examples_than_a_step_repeat_evenly():
    order = training_order([5, 6, 7], 24, 8, seed=1)
    assert [order.count(index) for index in range(3)] == [8, 8, 8]
    assert all(len(set(order[at : at + 8])) == 3 for at in (0, 8, 16))


def test_the_order_depends_on_the_seed_alone():
    assert training_order(LENGTHS, 200, 8, seed=1) == training_order(LENGTHS, 200, 8, seed=1)
    assert training_order(LENGTHS, 200, 8, seed=1) != training_order(LENGTHS, 200, 8, seed=2)


def test_batches_hold_similar_lengths():
    order = training_order(LENGTHS, 100, 10, seed=1)
    spreads = [max(b) - min(b) for b in ([LENGTHS[i] for i in order[at : at + 10]] for at in range(0, 100, 10))]
    assert sum(spreads) / len(spreads) < 8


def test_the_batches_of_a_window_are_not_in_order_of_length():
    order = training_order(LENGTHS, 100, 10, seed=1)
    means = [sum(LENGTHS[i] for i in order[at : at + 10]) for at in range(0, 100, 10)]
    assert means != sorted(means)


@pytest.mark.parametrize("share", [2, 5, 10])
def test_batches_mix_labels_that_go_with_lengths(share):
    labels = [index % share == 0 for index in range(100)]
    lengths = [length + 100 * label for length, label in zip(LENGTHS, labels, strict=True)]
    order = training_order(lengths, 200, 10, seed=1, labels=labels)
    assert Counter(order) == Counter(dict.fromkeys(range(100), 2))
    found = [sum(labels[i] for i in order[at : at + 10]) for at in range(0, 200, 10)]
    assert all(abs(number - 10 / share) < 1 for number in found)


def test_equal_labels_do_not_change_the_order():
    assert training_order(LENGTHS, 200, 8, seed=1, labels=[True] * 100) == training_order(LENGTHS, 200, 8, seed=1)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(1, None, (10, 3)), (1.5, None, (15, 4)), (3, 2, (8, 2)), (0.01, None, (1, 1))],
)
def test_schedule_counts_examples_and_steps(epochs, max_steps, expected):
    options = TrainOptions(num_train_epochs=epochs, max_steps=max_steps, per_device_train_batch_size=4)
    schedule = make_schedule([5] * 10, options, 1)
    assert (len(schedule.order), schedule.steps) == expected


@pytest.mark.parametrize(
    ("num_rows", "size", "epochs", "expected"),
    [
        (9, 8, 10, {2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 8: 7, 9: 8, 11: 9, 12: 10}),
        (8, 8, 3, {1: 1, 2: 2, 3: 3}),
        (100, 8, 2, {13: 1, 25: 2}),
        (3, 8, 1, {1: 1}),
        (3, 8, 6, {1: 2, 2: 5, 3: 6}),
        (10, 4, 2.5, {3: 1, 5: 2}),
        (10, 4, 0.5, {}),
    ],
)
def test_epochs_end_with_the_step_that_completes_them(num_rows, size, epochs, expected):
    options = TrainOptions(num_train_epochs=epochs, per_device_train_batch_size=size)
    schedule = make_schedule([5] * num_rows, options, 1)
    found = {step: schedule.completed_epoch(step) for step in range(1, schedule.steps + 1)}
    assert {step: epoch for step, epoch in found.items() if epoch is not None} == expected
    # Independently: the first step after which every row was seen k times.
    for step, epoch in expected.items():
        seen = schedule.order[: step * size]
        assert min(seen.count(row) for row in range(num_rows)) >= epoch or num_rows < size


def test_padding_and_prompt_are_never_trained():
    batch = CompletionCollator(0)(
        [
            {"id": "a", "input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]},
            {"id": "b", "input_ids": [8, 9], "completion_mask": [0, 1]},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED, 9, IGNORED]]


@pytest.mark.parametrize(
    ("mask", "message"), [([0, 0], "no token"), ([1, 1], "every token"), ([0], "2 tokens but a mask of 1")]
)
def test_a_wrong_mask_names_the_example(mask, message):
    with pytest.raises(DataError, match=f"id bad: {message}"):
        CompletionCollator(0)([{"id": "bad", "input_ids": [1, 2], "completion_mask": mask}])


def test_batch_width_is_rounded_up_with_padding():
    row = {"id": "a", "input_ids": [5, 6, 7, 8, 9], "completion_mask": [0, 0, 0, 1, 1]}
    batch = CompletionCollator(3, multiple=4)([row])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 3]
    assert batch["labels"].tolist() == [[IGNORED] * 3 + [8, 9] + [IGNORED] * 3]
