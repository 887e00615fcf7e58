"""What ``prepare`` did, in figures: of each split, of each source, and what of it the user is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from fintune.data.source_report import SourceReport
from fintune.records import Record

NOT_USED = "not_used.jsonl"
"""Of the folder: every row that could not be used."""
NUM_PROBLEMS = 20
"""Problems that a report quotes; all are counted."""
NUM_SHOWN = 5
"""Rows that could not be used, of which the terminal tells."""
NUM_BINS = 12
_WIDTHS = [step * 10**power for power in range(10) for step in (1, 2, 5)]


class Lengths(Record):
    """Token counts of examples.

    Attributes:
        histogram: (from, up to but without, examples), equally wide.
    """

    mean: float
    p50: int
    p95: int
    max: int
    total: int
    histogram: tuple[tuple[int, int, int], ...]


class Evidence(Record):
    """How much of the gold evidence is still in the prompts.

    Attributes:
        num_examples: Examples whose evidence is known.
        num_complete: Those of them with all of it.
        num_units: Sentences and rows of evidence.
        num_kept: Those of them that a prompt holds.
    """

    num_examples: int
    num_complete: int
    num_units: int
    num_kept: int

    def told(self) -> str:
        """``; 97.3% of the gold evidence is kept``, or nothing where none is known."""
        return f"; {self.num_kept / self.num_units:.1%} of the gold evidence is kept" if self.num_units else ""


class SplitReport(Record):
    """What became of a split.

    Attributes:
        num_read: Usable records of the source.
        num_sampled: Those of them that were drawn.
        num_examples: Those of them that became examples.
        dropped: Records left out, by reason: in reading and in encoding.
        problems: The first of them in words.
        num_cut_examples: Examples whose page was cut.
        num_cut_units: Sentences and rows that were cut.
        num_units: Sentences and rows of all pages.
        cleaned: Changes of their texts by rule of `fintune.finqa.cleaning_rules`, the frequent first.
        prompt_tokens: Template included.
        completion_tokens: End-of-turn token included.
        num_rows: Rows of the tokens; fewer than examples where questions of a page share one (data.group_questions).
        num_row_tokens: Tokens of all rows, which is what one pass over the split reads.
        steps: Share of programs by number of steps.
        operations: Share of steps by operation.
        labels: Answers that are ``desired`` and ``undesired``, where training tells them apart.
    """

    num_read: int
    num_sampled: int
    num_examples: int
    dropped: dict[str, int]
    problems: tuple[str, ...]
    num_cut_examples: int
    num_cut_units: int
    num_units: int
    cleaned: dict[str, int] = Field(default_factory=dict)
    prompt_tokens: Lengths
    completion_tokens: Lengths
    num_rows: int
    num_row_tokens: int
    evidence: Evidence
    steps: dict[str, float]
    operations: dict[str, float]
    labels: dict[str, int] = Field(default_factory=dict)

    @property
    def one_sided(self) -> str:
        """``desired`` or ``undesired`` where all answers are that; else empty."""
        found = [name for name, number in self.labels.items() if number]
        return found[0] if len(found) == 1 else ""


class PrepareReport(Record):
    """What ``prepare`` did.

    Attributes:
        template_hash: sha256 of the chat template.
        max_length: Tokens of prompt and completion together.
        num_shared_pages: Evaluation examples whose page is also trained on.
        train: The training split.
        eval: The evaluation split.
        finqa_test_steps: Shares in FinQA's test set, to compare with.
        finqa_test_operations: Likewise.
        options: Options that decided it, by dotted key, as JSON text.
        kind: Questions about pages, answered by programs, or conversations. A conversation counts as a page of turns,
            and has no program.
        sources: What became of each entry of ``data.sources``.
        unused_rows: The first rows of them that could not be used: where, which field, why, what to do.
        num_unused: Rows that could not be used, in reading or in encoding; not_used.jsonl lists all.
    """

    template_hash: str
    max_length: int
    num_shared_pages: int
    train: SplitReport
    eval: SplitReport
    finqa_test_steps: dict[str, float]
    finqa_test_operations: dict[str, float]
    options: dict[str, str]
    kind: Literal["program", "chat"] = "program"
    sources: tuple[SourceReport, ...] = ()
    unused_rows: tuple[str, ...] = ()
    num_unused: int = 0

    @property
    def non_commercial(self) -> str:
        """The sources that forbid commercial use, with their licences; empty where none does."""
        found = (f"{each.path} ({each.licence.name})" for each in self.sources if each.licence.non_commercial)
        return ", ".join(dict.fromkeys(found))

    @property
    def shared_pages(self) -> str:
        """That evaluation asks about pages that are also trained on; empty where it does not, or nothing is evaluated.

        A training without an evaluation set has a single record of what it trains on in its place.
        """
        is_same = "data.eval" in self.options and self.options["data.eval"] == self.options.get("data.train")
        stands_in = is_same and self.options.get("data.max_eval_samples") == "1"
        if not self.num_shared_pages or stands_in:
            return ""
        number = self.num_shared_pages
        asks = "1 eval example asks" if number == 1 else f"{number:,} eval examples ask"
        return f"{asks} about a page that is also trained on"

    def notes(self) -> list[str]:
        """What a user should know, a line each; none where all went in whole."""
        lines = [line for source in self.sources for line in source.told()]
        if self.non_commercial:
            lines.append(f"not for commercial use, and so what is trained on it: {self.non_commercial}")
        lines += [f"not used: {problem}" for problem in self.unused_rows[:NUM_SHOWN]]
        if self.num_unused:
            rows = "1 row" if self.num_unused == 1 else f"{self.num_unused:,} rows"
            lines.append(f"not used: {rows} in all; prepare/{NOT_USED} lists each with its place and what to do")
        whole, units = ("conversations", "turns") if self.kind == "chat" else ("pages", "sentences and rows")
        for name, split in (("train", self.train), ("eval", self.eval)):
            if split.dropped:
                reasons = ", ".join(f"{number} {reason}" for reason, number in split.dropped.items())
                lines.append(f"{name}: dropped {reasons}; the first: {split.problems[0]}")
            if split.num_cut_examples:
                share = f"{split.num_cut_units} of {split.num_units} {units}"
                wholes = f"{split.num_cut_examples} of {split.num_examples} {whole}"
                lines.append(f"{name}: {wholes} cut to fit {self.max_length} tokens ({share}){split.evidence.told()}")
            if split.labels:
                lines.append(
                    f"{name}: {split.labels['desired']} desired, {split.labels['undesired']} undesired answers"
                )
        if self.eval.one_sided:
            lines.append(
                f"all held-out answers are {self.eval.one_sided}, so that no margin is measured; raise data.eval_share"
            )
        if self.shared_pages:
            lines.append(self.shared_pages)
        return lines


def lengths(numbers: Sequence[int]) -> Lengths:
    """Sum up token counts (at least one)."""
    ordered = sorted(numbers)
    last = len(ordered) - 1
    span = ordered[-1] - ordered[0] + 1
    width = next(w for w in _WIDTHS if span <= w * (NUM_BINS - 1))
    bins = Counter(number // width for number in ordered)
    return Lengths(
        mean=round(sum(ordered) / len(ordered), 1),
        p50=ordered[last // 2],
        p95=ordered[round(0.95 * last)],
        max=ordered[-1],
        total=sum(ordered),
        histogram=tuple((b * width, (b + 1) * width, bins[b]) for b in range(min(bins), max(bins) + 1)),
    )
