"""What training made worse, on a fixed set of prompts."""

from __future__ import annotations

from pydantic import Field

from fintune.config.base import Options, neutral


class GuardOptions(Options):
    """A fixed set of finance questions and FinQA pages, answered before and after training."""

    enabled: bool | None = neutral(
        None, "Whether it is measured; where empty, with `data.source: chat`, whose runs measure no accuracy."
    )
    threshold: float = Field(
        0.1,
        gt=0,
        description="A prompt got worse when the loss of its reference answer rose by more than this, in nats a token.",
    )
    max_rise: float | None = Field(
        None,
        ge=0,
        description="The stage fails where the mean loss of a group rose by more than this, in nats a token; where "
        "empty, it only tells.",
    )
