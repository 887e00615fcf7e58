"""The headline of a run without scored predictions, as one on conversations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fintune.config import Config
from fintune.report.run_data import RunData
from fintune.report.run_page import render_run
from fintune.report.sections.accuracy import headline
from support.outline import outline

REPLAY: dict[str, Any] = {
    "num_examples": 5,
    "num_positions": 90,
    "replayed": {
        kind: {"mean_kl": 0.1, "same_best_token_share": 0.9, "perplexity": perplexity}
        for kind, perplexity in {"base": 12.345, "adapter": 4.5, "merged": 4.6}.items()
    },
}
GUARD = {
    "threshold": 0.1,
    "groups": [{"name": "finance", "num_prompts": 1, "before": 2.0, "after": 2.0, "right_before": None}],
    "worse": [],
    "lost": [],
    "prompts": [{"id": "a", "question": "What is cash?", "before": 2.0, "after": 2.0}],
}
EVALUATED = [{"step": step, "loss": 2.0, "eval_loss": loss} for step, loss in ((2, 1.75), (4, 1.875))]


@pytest.fixture
def page() -> RunData:
    return RunData(Config.model_validate({"run": {"name": "mine"}}), replay=REPLAY, guard=GUARD, metrics=EVALUATED)


def test_perplexity_before_and_after_comes_first(page):
    shown = headline(page)
    assert (shown["before"], shown["after"]) == ("12.35", "4.50")
    assert shown["words"] == (
        "perplexity of 5 held-out completions before and after training, lower is better; "
        "regression check: no prompt of 1 got worse by more than 0.1 nats per token."
    )
    assert "12.35" in outline(render_run(page)).text


def test_without_the_base_it_is_the_loss_of_the_kept_weights(page):
    page = dataclasses.replace(page, replay={}, guard={})
    assert headline(page) == {"before": "1.875", "after": "", "words": "loss on held-out examples after step 4"}
    best = Config.model_validate({"train": {"select_checkpoint": "best_loss", "eval_steps": 2}})
    assert headline(dataclasses.replace(page, config=best))["before"] == "1.750"


def test_then_the_perplexity_after_training_then_the_guard(page):
    only = {"replayed": {"trained": REPLAY["replayed"]["adapter"]}, "num_examples": 5}
    shown = headline(dataclasses.replace(page, replay=only, guard={}, metrics=()))
    assert shown == {"before": "4.50", "after": "", "words": "perplexity of 5 held-out completions after training"}
    shown = headline(dataclasses.replace(page, replay={}, metrics=()))
    assert shown["before"] == "mine"
    assert shown["words"].startswith("No prompt of 1 got worse")
