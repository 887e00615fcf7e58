"""The report of ``prepare``: figures of each split and source, and the notes that the user sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from fintune.data.formats import NOT_READ
from fintune.data.licences import Licence
from fintune.records import Record

NOT_USED = "not_used.jsonl"
"""File of a prepared folder that lists every row that could not be used."""
MAX_PROBLEMS = 20
"""Maximum number of problems that a report quotes. All of them are counted."""
NEAR_DUPLICATE = "near duplicate"
"""Reason by which near duplicates are counted."""
_MANY_DUPLICATES = 0.2
"""Share of near duplicates above which a source gets a warning."""
_MAX_PRINTED = 5
"""Maximum number of unused rows that the terminal shows."""
_NUM_BINS = 12
_WIDTHS = [step * 10**power for power in range(10) for step in (1, 2, 5)]


class Lengths(Record):
    """Token counts of examples.

    Attributes:
        histogram: Bins as (first, last + 1, number of examples), all of one width.
    """

    mean: float
    p50: int
    p95: int
    max: int
    total: int
    histogram: tuple[tuple[int, int, int], ...]


class Evidence(Record):
    """How much of the gold evidence is in the prompts.

    Attributes:
        num_examples: Examples whose evidence is known.
        num_complete: Examples with all of their evidence in the prompt.
        num_units: Sentences and rows of evidence.
        num_kept: Sentences and rows of evidence in the prompts.
    """

    num_examples: int = 0
    num_complete: int = 0
    num_units: int = 0
    num_kept: int = 0

    def describe(self) -> str:
        """Return ``; 97.3% of the gold evidence is kept``, or nothing if none is known."""
        return f"; {self.num_kept / self.num_units:.1%} of the gold evidence is kept" if self.num_units else ""


class SplitReport(Record):
    """The figures of a split.

    Attributes:
        num_read: Usable records of the source.
        num_sampled: Records that were drawn from them.
        num_examples: Examples that the drawn records became.
        dropped: Records that were left out in reading or tokenizing, by reason.
        problems: The first of those records, one line each.
        num_cut_examples: Examples whose page, or conversation, was cut.
        num_cut_units: Sentences and table rows, or turns, that were cut.
        num_units: Sentences and table rows of all pages, or turns of all conversations.
        cleaned: Changes of the texts by rule of `fintune.finqa.cleaning`, the most frequent first.
        prompt_tokens: Tokens of the prompts, template included.
        completion_tokens: Tokens of the completions, end of turn included.
        num_rows: Rows of tokens. Questions about one page may share a row (``data.group_questions``).
        num_row_tokens: Tokens of all rows, which one pass over the split reads.
        evidence: Evidence in the prompts.
        steps: Share of programs by number of steps.
        operations: Share of steps by operation.
        renderings: Number of examples by what the chat template made necessary.
        num_thoughts: Number of examples whose answer has a thought.
        labels: Number of ``desired`` and ``undesired`` answers, if the objective trains on labels.
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
    renderings: dict[str, int] = Field(default_factory=dict)
    num_thoughts: int = 0
    labels: dict[str, int] = Field(default_factory=dict)

    def describe_renderings(self, name: str) -> list[str]:
        """Describe what the chat template made necessary, one line each.

        Args:
            name: The split's name.
        """
        renderings = self.renderings.items()
        return [f"{name}: {number:,} of {self.num_examples:,} examples are {what}" for what, number in renderings]

    @property
    def only_label(self) -> str:
        """``desired`` or ``undesired`` if all answers have that label; else empty."""
        names = [name for name, number in self.labels.items() if number]
        return names[0] if len(names) == 1 else ""


class SourceReport(Record):
    """What became of an entry of ``data.sources``.

    Attributes:
        path: The path as the user wrote it.
        licence: Its licence.
        num_rows: Number of its rows.
        shapes: Usable rows by format.
        files: Usable rows by file and format, if there are several files.
        dropped: Rows that were left out, by reason.
        num_trailing: Turns after the last answer of their conversation, which were left out.
        columns: For each column, and what it was read as, the number of usable rows in which it is filled.
        warnings: What is odd about usable rows, with their number.
        test_files: Files that are splits for evaluation by their names.
        hold_out: What is held out of the source.
        unread: A description of the files of a folder that are not read; empty if there are none.
        num_train: Conversations to train on, before the weight.
        num_eval: Conversations that are held out.
        weight: How often one pass trains on each of them.
    """

    path: str
    licence: Licence
    num_rows: int
    shapes: dict[str, int]
    files: dict[str, dict[str, int]] = Field(default_factory=dict)
    dropped: dict[str, int]
    num_trailing: int = 0
    columns: dict[str, dict[str, int]] = Field(default_factory=dict)
    warnings: dict[str, int] = Field(default_factory=dict)
    test_files: tuple[str, ...] = ()
    hold_out: str = "split"
    unread: str = ""
    num_train: int
    num_eval: int
    weight: float

    @property
    def unread_columns(self) -> dict[str, int]:
        """Columns that were not read, with the number of usable rows in which they are filled."""
        counts = {column: reads.get(NOT_READ, 0) for column, reads in self.columns.items()}
        return {column: number for column, number in counts.items() if number}

    def notes(self) -> list[str]:
        """Describe the source for the user in one line, with further lines for files, warnings and unread files."""
        shapes = ", ".join(f"{number} {shape}" for shape, number in self.shapes.items())
        dropped = ", ".join(f"{number} {reason}" for reason, number in self.dropped.items())
        times = f", each {self.weight:g} times" if self.weight != 1 else ""
        num_usable = sum(self.shapes.values())
        unread = ", ".join(
            column if number == num_usable else f"{column} (in {number} rows)"
            for column, number in self.unread_columns.items()
        )
        lines = [
            f"{self.path}: {self.num_rows} rows: {shapes}"
            + (f"; dropped {dropped}" if dropped else "")
            + (f"; left out {self.num_trailing} turns after the last trained answer" if self.num_trailing else "")
            + (f"; {NOT_READ}: {unread}" if unread else "")
            + f"; {self.num_train} to train on{times}, {self.num_eval} held out; licence {self.licence.name}"
        ]
        for file, formats in self.files.items():
            counts = ", ".join(f"{number} {name}" for name, number in formats.items()) or "no usable row"
            lines.append(f"  {file}: {counts}")
        return lines + self.remarks()

    def remarks(self) -> list[str]:
        """Describe what is odd about the source, one line each."""
        lines = []
        if self.test_files:
            names = ", ".join(self.test_files)
            fate = "trained on, although it is" if self.hold_out == "none" else "held out, because it is"
            lines.append(f"{self.path}: {fate} called test or validation: {names}; set split to read one split alone")
        lines += [f"WARNING: {self.path}: {number} {what}" for what, number in self.warnings.items()]
        num_near = self.dropped.get(NEAR_DUPLICATE, 0)
        if num_near > _MANY_DUPLICATES * self.num_rows:
            lines.append(
                f"WARNING: {self.path}: {num_near} of {self.num_rows} rows were dropped as near duplicates; "
                "data.duplicates=exact keeps them"
            )
        if self.unread:
            lines.append(f"{self.path}: {self.unread}")
        return lines

    def read_columns(self) -> str:
        """Describe what each column was read as, with the number of usable rows in which it is filled."""
        columns = (
            f"{column}: " + ", ".join(f"{what} ({number:,})" for what, number in reads.items())
            for column, reads in self.columns.items()
        )
        return f"{self.path}: columns {'; '.join(columns)}" if self.columns else ""


class PrepareReport(Record):
    """The report of ``prepare``.

    Attributes:
        template_hash: SHA-256 of the chat template.
        max_length: Maximum number of tokens of prompt and completion together.
        num_shared_pages: Evaluation examples about a page that is also trained on.
        num_shared_questions: Evaluation examples whose question about a page is itself trained on.
        train: The training split.
        eval: The evaluation split.
        finqa_test_steps: Shares of ``steps`` in FinQA's test set, for comparison.
        finqa_test_operations: Shares of ``operations`` in FinQA's test set.
        options: Options that decided the result, by dotted key, as JSON text.
        kind: ``program`` for questions about pages that are answered by programs; ``chat`` for conversations.
        sources: What became of each entry of ``data.sources``.
        unused_rows: The first rows that could not be used: location, reason and hint.
        num_unused: Number of rows that could not be used. ``not_used.jsonl`` lists all of them.
        has_eval_stand_in: Whether there is no evaluation set, and a training record stands in for it.
        eval_warning: Why the evaluation says little about new questions; empty if it does not.
        warnings: What else the user should look at before training.
    """

    template_hash: str
    max_length: int
    num_shared_pages: int
    num_shared_questions: int = 0
    train: SplitReport
    eval: SplitReport
    finqa_test_steps: dict[str, float]
    finqa_test_operations: dict[str, float]
    options: dict[str, str]
    kind: Literal["program", "chat"] = "program"
    sources: tuple[SourceReport, ...] = ()
    unused_rows: tuple[str, ...] = ()
    num_unused: int = 0
    has_eval_stand_in: bool = False
    eval_warning: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def trains_thoughts(self) -> bool:
        """Whether most answers have a thought, so that the model is asked in thinking mode."""
        return 2 * self.train.num_thoughts > self.train.num_examples

    @property
    def non_commercial(self) -> str:
        """The sources that forbid commercial use, with their licences; empty if none does."""
        names = (f"{source.path} ({source.licence.name})" for source in self.sources if source.licence.non_commercial)
        return ", ".join(dict.fromkeys(names))

    @property
    def eval_count(self) -> str:
        """``200 eval``, or that there is no evaluation set."""
        if self.has_eval_stand_in:
            return "no evaluation set (one training record stands in for it)"
        return f"{self.eval.num_examples} eval"

    def notes(self) -> list[str]:
        """Return what the user should know, one line each; nothing if all data was used whole."""
        lines = [line for source in self.sources for line in source.notes()]
        if self.non_commercial:
            lines.append(f"not for commercial use, and neither is a model trained on it: {self.non_commercial}")
        lines += [f"not used: {problem}" for problem in self.unused_rows[:_MAX_PRINTED]]
        if self.num_unused:
            rows = "1 row" if self.num_unused == 1 else f"{self.num_unused:,} rows"
            lines.append(f"not used: {rows} in all; prepare/{NOT_USED} lists each with its location and what to do")
        for name, split in (("train", self.train), ("eval", self.eval)):
            lines += self._split_notes(name, split)
        if self.eval.only_label:
            lines.append(
                f"all held-out answers are {self.eval.only_label}, so no margin is measured; raise data.eval_share"
            )
        if self.has_eval_stand_in:
            lines.append("there is no evaluation set: one training record stands in for it, and nothing is evaluated")
        if self.eval_warning:
            lines.append(f"WARNING: {self.eval_warning}")
        return lines + [f"WARNING: {warning}" for warning in self.warnings]

    def _split_notes(self, name: str, split: SplitReport) -> list[str]:
        lines = []
        if split.dropped:
            reasons = ", ".join(f"{number} {reason}" for reason, number in split.dropped.items())
            lines.append(f"{name}: dropped {reasons}; the first: {split.problems[0]}")
        if split.num_cut_examples:
            whole, units = ("conversations", "turns") if self.kind == "chat" else ("pages", "sentences and rows")
            share = f"{split.num_cut_units} of {split.num_units} {units}"
            wholes = f"{split.num_cut_examples} of {split.num_examples} {whole}"
            lines.append(f"{name}: {wholes} cut to fit {self.max_length} tokens ({share}){split.evidence.describe()}")
        lines += split.describe_renderings(name)
        if split.labels:
            lines.append(f"{name}: {split.labels['desired']} desired, {split.labels['undesired']} undesired answers")
        return lines


def warn_about_eval(num_examples: int, num_shared_questions: int, num_shared_pages: int) -> str:
    """Say why an evaluation measures memory instead of skill; empty if it shares nothing with the training split.

    Args:
        num_examples: Evaluation examples.
        num_shared_questions: Examples whose question is trained on.
        num_shared_pages: Examples about a page that is trained on.
    """
    if num_shared_questions:
        verb = "is" if num_shared_questions == 1 else "are"
        return (
            f"{num_shared_questions:,} of {num_examples:,} evaluation questions {verb} also trained on, so the "
            "evaluation does not measure how the model answers new questions; set data.eval to another file"
        )
    if num_shared_pages:
        asks = "1 eval example asks" if num_shared_pages == 1 else f"{num_shared_pages:,} eval examples ask"
        return f"{asks} about a page that is also trained on"
    return ""


def summarize_lengths(numbers: Sequence[int]) -> Lengths:
    """Summarize token counts, of which there is at least one."""
    ordered = sorted(numbers)
    last = len(ordered) - 1
    span = ordered[-1] - ordered[0] + 1
    width = next(width for width in _WIDTHS if span <= width * (_NUM_BINS - 1))
    bins = Counter(number // width for number in ordered)
    return Lengths(
        mean=round(sum(ordered) / len(ordered), 1),
        p50=ordered[last // 2],
        p95=ordered[round(0.95 * last)],
        max=ordered[-1],
        total=sum(ordered),
        histogram=tuple((b * width, (b + 1) * width, bins[b]) for b in range(min(bins), max(bins) + 1)),
    )
