"""What the model card says was done, from manifests alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fintune.config.load import load
from fintune.publish import card as module
from fintune.publish.card import card_of, unstated_licences
from fintune.publish.files import Publication
from fintune.report.card import CardBase, CardSource
from support.example_run import manifest
from support.published_run import TRAIN_FACTS, TRAIN_OPTIONS


def training(options: dict[str, Any], facts: dict[str, Any], guard: dict[str, Any] | None = None) -> dict[str, str]:
    """The rows of the card on method and training."""
    made = manifest("train")
    key = made.key.model_copy(update={"options": TRAIN_OPTIONS | options})
    manifests = {"train": made.model_copy(update={"key": key, "facts": TRAIN_FACTS | facts})}
    if guard is not None:
        manifests["guard"] = manifest("guard").model_copy(update={"facts": guard})
    config = load(None, ["data.source=chat", "data.sources=[{path: rows.jsonl}]"]).config
    card = card_of(config, "ann/demo", Publication([], manifests, CardBase("mine", "", "mit")), {})
    return dict([*card.method, *card.training])


@pytest.mark.parametrize(
    ("options", "facts", "told"),
    [
        ({}, {"num_steps": 60, "num_examples": 159}, "3, 8"),
        ({"train.max_steps": 3}, {"num_steps": 3, "num_examples": 159}, "0.15, 8"),
        ({"train.max_steps": 50}, {"num_steps": 50, "num_examples": 100}, "4, 8"),
        ({"train.gpus": 2}, {"num_steps": 15, "num_examples": 160}, "1.5, 16"),
        ({}, {}, "3, 8"),
    ],
    ids=["to the end", "max_steps", "more than epochs", "out of patience on two GPUs", "of a manifest without rows"],
)
def test_passes_are_those_that_were_made(options, facts, told):
    assert training(options, facts)["passes, examples a step"] == told


def test_the_guards_share_of_right_programs_has_its_interval():
    groups = [
        {"name": "finance", "num_prompts": 20, "right_before": None, "right_after": None},
        {"name": "statements", "num_prompts": 12, "right_before": 0, "right_after": 3},
    ]
    rows = training({}, {}, {"summary": "finance 2.00 to 2.06 nats a token", "groups": groups})
    assert rows["fixed prompts, before and after"] == "finance 2.00 to 2.06 nats a token"
    told = rows["statements right, before and after, 95 % intervals"]
    assert told == "0 of 12 (0.0\u201324.2 %), 3 of 12 (8.9\u201353.2 %)"
    assert not any(name.startswith("finance right") for name in rows)


@pytest.mark.parametrize(
    ("source", "base", "given", "lines"),
    [
        ("chat", "mit", None, ["license: rows.jsonl states none: set `license` of its entry in data.sources, or "]),
        ("finqa", "mit", None, ["license: rows.jsonl states none: set publish.license"]),
        ("chat", "not stated", "mit", []),
        ("finqa", "not stated", None, ["license: the base model mine states none: set publish", "rows.jsonl states"]),
    ],
)
def test_unstated_licences_name_file_and_option(source, base, given, lines):
    data = ["data.sources=[{path: rows.jsonl}]"] if source == "chat" else ["data.train=rows.jsonl", "data.eval=b.jsonl"]
    options = [f"data.source={source}", *data, *([f"publish.license={given}"] if given else [])]
    rows, known = (
        CardSource("rows.jsonl", False, "not stated", False, 1, 0),
        CardSource("b.jsonl", False, "mit", False, 1, 0),
    )
    card = SimpleNamespace(base=CardBase("mine", "", base), sources=[rows, known])
    found = unstated_licences(load(None, options).config, card)
    assert len(found) == len(lines)
    assert all(line in text for line, text in zip(lines, found, strict=True))


def test_card_counts_examples_that_could_not_be_encoded(monkeypatch, tmp_path):
    train = SimpleNamespace(num_examples=97, dropped={"not encodable": 1})
    held = SimpleNamespace(num_examples=5, dropped={})
    report = SimpleNamespace(train=train, eval=held, sources=[SimpleNamespace(dropped={"exact duplicate": 2})])
    monkeypatch.setattr(module.prepared, "read_report", lambda _: report)
    assert module._used(tmp_path) == (
        "97 examples were trained on, 5 held out; left out: 1 not encodable, 2 exact duplicate. "
        "Of the examples above, 1 could not be encoded."
    )
