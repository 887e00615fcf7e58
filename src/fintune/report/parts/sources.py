"""The sources of a run on conversations, from ``prepare/report.json``: rows, shapes, drops, licences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_DUPLICATES = ("exact duplicate", "near duplicate")


def words(report: Mapping[str, Any]) -> str:
    """A sentence on how the conversations were divided."""
    train, held = report["train"], report["eval"]
    dropped = Counter(train["dropped"]) + Counter(held["dropped"])
    lost = f" The table of sources also counts what is left out here: {_counted(dropped)}." if dropped else ""
    return (
        f"{train['num_examples']:,} examples are trained on, {held['num_examples']:,} are held out by a hash of their "
        f"first question.{lost} A conversation has no official verdict, so none is scored."
    )


def restricted(report: Mapping[str, Any]) -> str:
    """The sources that forbid commercial use, with their licences; empty where none does."""
    found = [each for each in report["sources"] if each["licence"]["non_commercial"]]
    named = dict.fromkeys(f"{each['path']} ({each['licence']['name']})" for each in found)
    return f"Not for commercial use, and so what is trained on it: {', '.join(named)}." if named else ""


def table(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line a source, and one for each of its files where it has several."""
    lines: list[dict[str, Any]] = []
    for source in report["sources"]:
        dropped = source["dropped"]
        others = {reason: number for reason, number in dropped.items() if reason not in _DUPLICATES}
        lines.append(
            {
                "name": source["path"],
                "rows": f"{source['num_rows']:,}",
                "shapes": _counted(source["shapes"]),
                "duplicates": f"{sum(dropped.get(reason, 0) for reason in _DUPLICATES):,}",
                "dropped": _counted(others) or "none",
                "train": f"{source['num_train']:,}" + (f" x {source['weight']:g}" if source["weight"] != 1 else ""),
                "held": f"{source['num_eval']:,}",
                "licence": _licence(source["licence"]),
            }
        )
        if len(source["files"]) > 1:
            lines += [
                {"name": name, "shapes": _counted(shapes) or "no usable row", "file": True}
                for name, shapes in source["files"].items()
            ]
    return lines


def problems(report: Mapping[str, Any]) -> Sequence[str]:
    """The first rows that could not be used."""
    return [*report["unused_rows"], *report["train"]["problems"], *report["eval"]["problems"]]


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in numbers.items())


def _licence(licence: Mapping[str, Any]) -> str:
    return f"{licence['name']}{', not for commercial use' if licence['non_commercial'] else ''}"
