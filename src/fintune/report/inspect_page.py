"""What ``fintune inspect`` shows, as rows for the terminal and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fintune.report.plots import length_plot, share_plot, too_few
from fintune.report.templating import fill

Report = Mapping[str, Any]
"""``fintune.data.report.PrepareReport`` as JSON."""
_SPLITS = (("train", "train"), ("eval", "evaluation"))


@dataclass(frozen=True)
class Piece:
    """A run of tokens that share a fate.

    Attributes:
        text: What they say.
        trained: Whether the loss sees them.
        special: Whether it is a token of the template.
    """

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """One tokenised example.

    Attributes:
        id: Its id.
        num_tokens: All of it.
        num_trained: Those that the loss sees.
        pieces: From the first token to the last.
        rejected: Of a pair the worse answer, which stands behind the same prompt.
        label: Of an answer without a partner, whether it is desired.
    """

    id: str
    num_tokens: int
    num_trained: int
    pieces: Sequence[Piece]
    rejected: Sequence[Piece] = ()
    label: bool | None = None

    @property
    def counts(self) -> str:
        """Tokens, those that are trained, and the label where there is one."""
        label = {None: "", True: ", desired", False: ", undesired"}[self.label]
        return f"{self.num_tokens:,} tokens, {self.num_trained:,} trained{label}"


@dataclass(frozen=True)
class InspectPage:
    """All that the page shows.

    Attributes:
        name: The run's.
        origin: What was looked at.
        model: Whose tokens they are.
        data: ``data.source``.
        report: Counts and figures.
        examples: Some of the training split.
    """

    name: str
    origin: str
    model: str
    data: str
    report: Report
    examples: Sequence[Shown]


def render_inspect(page: InspectPage) -> str:
    """The page as HTML."""
    report = page.report
    splits = [report[key] for key, _ in _SPLITS]
    gone = dropped(report)
    chat = report["kind"] == "chat"
    present = (
        (True, "counts", "Counts"),
        (report["sources"], "sources", "Sources"),
        (gone, "dropped", "Dropped rows"),
        (True, "lengths", "Token lengths"),
        (not chat, "programs", "Programs"),
        (page.examples, "examples", "Examples"),
    )
    return fill(
        "inspect.html.j2",
        title=f"{page.name} - fintune inspect",
        page=page,
        hero=[f"{split['num_examples']:,}" for split in splits],
        chips=[
            ("model", page.model),
            ("data", page.data),
            ("limit", f"{report['max_length']:,} tokens"),
            ("chat template", report["template_hash"][:16]),
        ],
        parts=[(id_, words) for there, id_, words in present if there],
        counts=list(counts(report)),
        sources=sources(report),
        restricted=restricted(report),
        left_out=left_out(report),
        dropped=gone,
        problems=problems(report),
        num_more=f"{num_more(report):,}" if num_more(report) else "",
        prompts=_lengths("prompt", splits, report["max_length"]),
        completions=_lengths("completion", splits, None),
        too_few=too_few(splits[1]["prompt_tokens"]["histogram"]),
        figures=[row for what in ("prompt", "completion") for row in _figures(what, splits)],
        programs=[] if chat else _programs(report),
    )


def counts(report: Report) -> Iterator[tuple[str, str, str]]:
    """Name, and the number of each split."""
    chat = report["kind"] == "chat"
    splits = [report[key] for key, _ in _SPLITS]

    def row(name: str, key: str) -> tuple[str, str, str]:
        first, second = (f"{split[key]:,}" for split in splits)
        return name, first, second

    if not chat:  # of conversations, the table of sources tells what was read
        yield row("records read", "num_read")
    yield row("conversations" if chat else "drawn", "num_sampled")
    yield row("examples", "num_examples")
    if any(split["labels"] for split in splits):
        for label in ("desired", "undesired"):
            first, second = (f"{split['labels'].get(label, 0):,}" for split in splits)
            yield f"{label} answers", first, second
    if any(split["num_rows"] != split["num_examples"] for split in splits):
        yield row("rows of training", "num_rows")
    yield row("conversations cut to fit" if chat else "pages cut to fit", "num_cut_examples")
    cut = [f"{split['num_cut_units']:,} of {split['num_units']:,}" for split in splits]
    yield "turns cut" if chat else "sentences and rows cut", cut[0], cut[1]
    if not chat:
        kept = [split["evidence"] for split in splits]
        told = [f"{each['num_kept']:,} of {each['num_units']:,}" if each["num_units"] else "not known" for each in kept]
        yield "evidence kept", told[0], told[1]
    for what in ("prompt", "completion"):
        totals = [f"{split[f'{what}_tokens']['total']:,}" for split in splits]
        yield f"tokens of {what}s", totals[0], totals[1]


def dropped(report: Report) -> list[tuple[str, str, str]]:
    """Reason, where, and rows of what was left out, in reading and in encoding."""
    found = [(source["path"], source["dropped"]) for source in report["sources"]]
    found += [(words, report[key]["dropped"]) for key, words in _SPLITS]
    return [(reason, where, f"{number:,}") for where, reasons in found for reason, number in reasons.items()]


def sources(report: Report) -> list[tuple[str, str, str, str, str, str]]:
    """Path, rows, usable rows by shape, conversations to train on and held out, licence; none without sources."""
    return [
        (
            each["path"],
            f"{each['num_rows']:,}",
            ", ".join(f"{number:,} {shape}" for shape, number in each["shapes"].items()),
            f"{each['num_train']:,}" + (f" × {each['weight']:g}" if each["weight"] != 1 else ""),
            f"{each['num_eval']:,}",
            each["licence"]["name"],
        )
        for each in report["sources"]
    ]


def left_out(report: Report) -> list[str]:
    """What was left out beside whole rows, a line each."""
    lines = []
    for each in report["sources"]:
        if number := each.get("num_trailing"):
            lines.append(f"{each['path']}: {number:,} turns without an answer left out")
        if number := each.get("num_thoughts"):
            lines.append(f"{each['path']}: {number:,} thoughts in a field of their own left out")
        if each.get("unread"):
            lines.append(f"{each['path']}: {each['unread']}")
    return lines


def restricted(report: Report) -> list[str]:
    """The sources that forbid commercial use, with their licences."""
    return [
        f"{each['path']} ({each['licence']['name']})" for each in report["sources"] if each["licence"]["non_commercial"]
    ]


def problems(report: Report) -> list[str]:
    """The first rows that could not be used, in words."""
    return [*report["unused_rows"], *(f"{words}: {each}" for key, words in _SPLITS for each in report[key]["problems"])]


def num_more(report: Report) -> int:
    """Rows beyond those that could not be used either."""
    return max(int(report["num_unused"]) - len(problems(report)), 0)


def _lengths(what: str, splits: Sequence[Report], limit: int | None) -> str:
    found = [split[f"{what}_tokens"] for split in splits]
    title = f"Lengths of {what}s: median {found[0]['p50']:,} tokens, longest {found[0]['max']:,}"
    histograms = [each["histogram"] for each in found]
    return length_plot(f"{what}-plot", title, histograms, limit=limit, axis=f"tokens of the {what}")


def _figures(what: str, splits: Sequence[Report]) -> Iterator[tuple[str, str, str]]:
    first, second = (split[f"{what}_tokens"] for split in splits)
    for name, key in (("mean", "mean"), ("median", "p50"), ("95 % within", "p95"), ("longest", "max")):
        yield f"{what}, {name}", f"{first[key]:,}", f"{second[key]:,}"


def _programs(report: Report) -> list[tuple[str, str]]:
    """Plots with what they show."""
    parts = (("steps", "steps of a program", "% of programs"), ("operations", "operations", "% of steps"))
    return [
        (
            share_plot(
                f"{key}-plot",
                f"Distribution of {words}",
                report["train"][key],
                report[f"finqa_test_{key}"],
                axis,
            ),
            words,
        )
        for key, words, axis in parts
    ]
