from __future__ import annotations

import random

import pytest

from fintune.inference.prefix_cache import group_by_prefix, make_batches, num_shared_tokens, split_prefixes


def page(number, num_tokens):
    return [1000 * number + place for place in range(num_tokens)]


def heads_of(prompts, plan):
    """The head of each prompt, checked to be its beginning."""
    own = [prompt[: len(prompt) - plan.num_tail] for prompt in prompts]
    for head, place in zip(own, plan.head_of, strict=True):
        assert plan.heads[place][: len(head)] == head
    return own


def computed(prompts, plan):
    return sum(map(len, plan.heads)) + sum(min(len(prompt), plan.num_tail) for prompt in prompts)


def test_questions_on_a_page_share_all_but_their_own_words():
    prompts = [[*page(p, 200), 7, q, *[8] * (q + 3)] for p in (1, 2) for q in range(4)]
    plan = split_prefixes(prompts)
    heads_of(prompts, plan)
    assert len(plan.heads) == 2
    assert plan.head_of in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)
    # What the second-longest question does not have in common; the longest one's head may be longer.
    assert plan.num_tail == 6
    assert computed(prompts, plan) < sum(map(len, prompts)) / 3


def test_prompts_with_nothing_in_common_keep_their_last_token():
    prompts = [page(number, 50 + number) for number in range(5)]
    plan = split_prefixes(prompts)
    assert plan.num_tail == 1
    assert heads_of(prompts, plan) == [prompt[:-1] for prompt in prompts]


def test_the_last_token_is_never_in_a_head():
    same = page(1, 100)
    plan = split_prefixes([same, same, same])
    assert (plan.num_tail, plan.heads) == (1, [same[:-1]])


def test_a_prompt_that_begins_another_shares_its_head():
    long, short = page(1, 300), page(1, 120)
    plan = split_prefixes([short, long])
    assert (plan.num_tail, plan.heads) == (1, [long[:-1]])


def test_a_tail_is_no_longer_than_the_shortest_prompt():
    prompts = [[*page(1, 300), *page(2, 40)], [*page(1, 300), *page(3, 40)], page(4, 5)]
    plan = split_prefixes(prompts)
    assert plan.num_tail <= 5
    assert [len(head) for head in heads_of(prompts, plan)] == [340 - plan.num_tail] * 2 + [5 - plan.num_tail]


def test_no_cut_computes_fewer_tokens():
    chance = random.Random(5)
    for _ in range(30):
        prompts = [
            [*page(chance.randrange(3), chance.randrange(30, 90)), *(chance.randrange(9) for _ in range(20))]
            for _ in range(7)
        ]
        plan, width = split_prefixes(prompts), max(map(len, prompts))
        heads_of(prompts, plan)
        costs = []
        for num_tail in range(1, min(map(len, prompts)) + 1):
            own = {tuple(prompt[: len(prompt) - num_tail]) for prompt in prompts}
            distinct = [h for h in own if not any(h != other and other[: len(h)] == h for other in own)]
            costs.append(len(distinct) * (width - num_tail) + 14 * num_tail)
        assert len(plan.heads) * (width - plan.num_tail) + 14 * plan.num_tail == min(costs)


def test_a_wide_batch_is_cut_too():
    prompts = [[*page(p, 100 + p), *page(900 + q, 5 + q)] for p in range(40) for q in range(6)]
    plan = split_prefixes(prompts)
    heads_of(prompts, plan)
    assert len(plan.heads) == 40


def test_questions_on_a_page_stand_together_and_lengths_rise():
    prompts = [[*page(p, 100 + 40 * (p % 3)), *page(50 + q, 5)] for q in range(3) for p in range(5)]
    groups = group_by_prefix(prompts)
    assert sorted(place for group in groups for place in group) == list(range(15))
    assert [len({prompts[place][0] for place in group}) for group in groups] == [1] * 5
    assert [len(group) for group in groups] == [3] * 5
    longest = [max(len(prompts[place]) for place in group) for group in groups]
    assert longest == sorted(longest)


def test_a_system_message_alone_makes_no_family():
    prompts = [page(0, 40) + page(number, 100) for number in range(1, 6)]
    assert [len(group) for group in group_by_prefix(prompts)] == [1] * 5


@pytest.mark.parametrize(("one", "other", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3], 1)])
def test_common_beginnings_are_counted(one, other, length):
    assert num_shared_tokens(one, other) == num_shared_tokens(other, one) == length


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([[0, 1], [2, 3], [4]], [[0, 1], [2, 3, 4]]),
        ([[0, 1, 2, 3, 4, 5, 6, 7], [8]], [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        ([[0], [1, 2, 3]], [[0], [1, 2, 3]]),
        ([], []),
    ],
)
def test_a_family_is_cut_only_where_no_batch_has_room_for_it(groups, expected):
    assert make_batches(groups, 3) == expected


def test_a_batch_has_as_many_tokens_as_it_may():
    groups = [[0, 1], [2], [3, 4, 5], [6]]
    assert make_batches(groups, 9, [10, 9, 12, 20, 18, 18, 90], max_tokens=40) == [[0, 1, 2], [3, 4, 5], [6]]
