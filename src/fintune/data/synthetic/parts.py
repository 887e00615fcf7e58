"""Kinds of question over the parts of a total: segments, payments by year, a purchase price, a credit facility."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fintune.data.synthetic.page import Breakdown, Number, Page
from fintune.data.synthetic.programs import Builder
from fintune.data.synthetic.questions import AnswerForm, Draft, put, same_sign


def share(page: Page, rng: random.Random, breakdowns: Sequence[Breakdown]) -> Draft | None:
    """``divide(part, total)``."""
    return _of_breakdown(rng, breakdowns, "share")


def rest(page: Page, rng: random.Random, breakdowns: Sequence[Breakdown]) -> Draft | None:
    """``subtract(total, part)``."""
    return _of_breakdown(rng, breakdowns, "rest")


def share_rest(page: Page, rng: random.Random, breakdowns: Sequence[Breakdown]) -> Draft | None:
    """``subtract(total, part), divide(#0, total)``."""
    return _of_breakdown(rng, breakdowns, "share_rest")


def _of_breakdown(rng: random.Random, breakdowns: Sequence[Breakdown], kind: str) -> Draft | None:
    found = _part(rng, breakdowns)
    if found is None:
        return None
    whole, name, part = found
    build = Builder()
    if kind == "share":
        build.do("divide", part, whole.total)
    elif kind == "rest":
        build.do("subtract", whole.total, part)
    else:
        build.do("divide", build.do("subtract", whole.total, part), whole.total)
    suffix = "" if whole.wording == "part" else f"_{whole.wording}"
    if whole.wording == "due" and name == "thereafter":
        if kind != "share":
            return None
        suffix, name = "_after", list(whole.parts)[-2]
    question = put(kind + suffix, rng, t=whole.total_name, p=name, b=whole.year)
    return Draft(question, build, "number" if kind == "rest" else "percent")


def two_parts(kind: str) -> Callable[[Page, random.Random, Sequence[Breakdown]], Draft | None]:
    """A kind over two parts of a total: their share, sum, difference, ratio, or whether one is greater."""

    def make(page: Page, rng: random.Random, breakdowns: Sequence[Breakdown]) -> Draft | None:
        fitting = [b for b in breakdowns if sum(n != "thereafter" for n in b.parts) > 1]
        fitting = [b for b in fitting if b.wording in ("due", "month") or (kind == "share_two" and b.wording == "part")]
        if not fitting:
            return None
        whole = rng.choice(fitting)
        names = [name for name in whole.parts if name != "thereafter"]
        p, q = (names[i] for i in sorted(rng.sample(range(len(names)), 2)))
        if kind in ("difference", "ratio", "greater") and whole.parts[p].value < whole.parts[q].value:
            p, q = q, p
        if kind == "greater" and rng.random() < 0.5:
            p, q = q, p
        first, second = whole.parts[p], whole.parts[q]
        if not same_sign(first, second, whole.total):
            return None
        build = Builder()
        if kind == "share_two":
            build.do("divide", build.do("add", first, second), whole.total)
        else:
            build.do({"sum": "add", "difference": "subtract", "ratio": "divide"}.get(kind, kind), first, second)
        form: AnswerForm = {"share_two": "percent", "greater": "yes_no"}.get(kind, "number")  # type: ignore[assignment]
        key = kind if whole.wording == "part" else f"{kind}_{whole.wording}"
        return Draft(put(key, rng, t=whole.total_name, p=p, q=q, b=whole.year), build, form)

    return make


def share_change(page: Page, rng: random.Random, breakdowns: Sequence[Breakdown]) -> Draft | None:
    """``divide(part, total), divide(part, total), subtract(#0, #1)`` over two years, later less earlier."""
    found = _part(rng, [b for b in breakdowns if b.year is not None])
    if found is None:
        return None
    one, name, _ = found
    others = [b for b in breakdowns if b.total_name == one.total_name and b.year != one.year and name in b.parts]
    if not others:
        return None
    old, new = sorted((one, rng.choice(others)), key=lambda b: b.year or 0)
    if not same_sign(old.parts[name], old.total, new.parts[name], new.total):
        return None
    build = Builder()
    later = build.do("divide", new.parts[name], new.total)
    build.do("subtract", later, build.do("divide", old.parts[name], old.total))
    return Draft(put("share_change", rng, p=name, t=one.total_name, a=old.year, b=new.year), build, "percent")


def _part(rng: random.Random, breakdowns: Sequence[Breakdown]) -> tuple[Breakdown, str, Number] | None:
    if not breakdowns:
        return None
    whole = rng.choice(breakdowns)
    name = rng.choice(list(whole.parts))
    part = whole.parts[name]
    return (whole, name, part) if same_sign(part, whole.total) else None
