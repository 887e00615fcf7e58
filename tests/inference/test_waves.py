from __future__ import annotations

from fintune.inference.waves import waves


def test_a_family_keeps_its_slot_until_it_is_through():
    found = list(waves([[0, 1, 2], [3, 4], [5, 6, 7]], 2))
    assert found == [[0, 3], [1, 4], [2, 5], [6], [7]]


def test_prompts_whose_family_has_a_slot_come_first():
    assert list(waves([[0, 1], [2, 3, 4], [5, 6]], 2)) == [[0, 2], [1, 3], [4, 5], [6]]


def test_prompts_without_a_family_fill_the_waves_and_the_rest_goes_together():
    assert list(waves([[0], [1], [2, 3, 4], [5], [6], [7]], 2)) == [[2, 0], [3, 1], [4, 5], [6, 7]]
    assert list(waves([[place] for place in range(10)], 2)) == [list(range(8)), [8, 9]]


def test_every_prompt_is_asked_once():
    groups = [list(range(at, at + 1 + at % 4)) for at in range(0, 100, 4)]
    asked = [place for wave in waves(groups, 3) for place in wave]
    assert sorted(asked) == sorted(place for group in groups for place in group)


def test_no_prompts_need_no_request():
    assert list(waves([], 4)) == []
