"""``fintune inspect``: what the examples are, before or after anything was made from them.

Counts, drops by reason, cuts, token lengths, the distribution of programs beside FinQA's, and examples as the model
sees them: trained tokens in colour, or between brackets where there is no colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fintune import models, preparation, prepared
from fintune.artifact import MANIFEST
from fintune.options import Config
from fintune.prepared import Lengths, PrepareReport, SplitReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 200
"""Records a split that are encoded where no prepared folder is at hand."""
BAR_WIDTH = 40

PROMPT_STYLE, SPECIAL_STYLE = "dim", "dim reverse"
TRAINED_STYLE, TRAINED_SPECIAL_STYLE = "green", "bold green reverse"
OPEN, CLOSE = "⟦", "⟧"


@dataclass(frozen=True)
class Shown:
    """One tokenised example.

    Attributes:
        input_ids: Prompt, completion, end-of-turn token.
        completion_mask: 1 where the token is trained.
    """

    id: str
    input_ids: Sequence[int]
    completion_mask: Sequence[int]


def inspect(config: Config, console: Console, *, num_examples: int = 3) -> None:
    """Print it.

    A run's ``prepare`` folder is read where it was made with these options; else the data is prepared in memory, at
    most :data:`SAMPLE` records a split, and nothing is written.

    Args:
        config: The run.
        console: Where to print.
        num_examples: Training examples to render.

    Raises:
        DataError: The data cannot be used.
        ModelError: The model has no usable tokenizer.
    """
    reference = models.resolve(config.model.name, revision=config.model.revision)
    tokenizer = models.load_tokenizer(reference, trust_remote_code=config.model.trust_remote_code)
    folder = config.folder / "prepare"
    report, examples, origin = _stored(config, folder, num_examples) or _fresh(config, tokenizer, num_examples)
    coloured = console.color_system is not None
    console.print(Text(origin, style="bold"))
    console.print(_counts(report))
    for note in report.notes():
        console.print(Text(f"  {note}"))
    for problem in report.unused_rows:
        console.print(Text.assemble(("  not used ", "red"), problem))
    for name, split in (("train", report.train), ("eval", report.eval)):
        for problem in split.problems:
            console.print(Text.assemble((f"  {name} ", "red"), problem))
    _histogram(console, "train: tokens of a prompt", report.train.prompt_tokens)
    _histogram(console, "eval: tokens of a prompt", report.eval.prompt_tokens)
    _histogram(console, "train: tokens of a completion, end of turn included", report.train.completion_tokens)
    if report.kind == "program":
        console.print(_shares(report))
    for shown in examples:
        title = Text(f"{shown.id}: {len(shown.input_ids)} tokens, {sum(shown.completion_mask)} trained")
        text = render(tokenizer, shown, brackets=not coloured)
        console.print(Panel(text, title=title, title_align="left"))
    if examples:
        console.print(_legend() if coloured else Text(f"{OPEN}trained{CLOSE}"))


def _stored(config: Config, folder: Path, number: int) -> tuple[PrepareReport, list[Shown], str] | None:
    if not (folder / MANIFEST).is_file():
        return None
    report = prepared.read_report(folder)
    if report.options != prepared.options_of(config):
        return None
    rows = [Shown(*row) for row in prepared.read_tokens(folder, "train", number)]
    return report, rows, f"{folder}, all examples"


def _fresh(config: Config, tokenizer: PreTrainedTokenizerBase, number: int) -> tuple[PrepareReport, list[Shown], str]:
    made = preparation.make(config, tokenizer, limit=SAMPLE)
    shown = [Shown(row.id, row.input_ids, row.completion_mask) for row in made.rows["train"][:number]]
    return made.report, shown, f"not prepared yet with these options: read anew, at most {SAMPLE} examples a split"


def render(tokenizer: PreTrainedTokenizerBase, shown: Shown, *, brackets: bool = False) -> Text:
    """An example as text: the prompt dim, what is trained green, special tokens reversed.

    Args:
        tokenizer: The model's.
        shown: The example.
        brackets: Put what is trained between brackets, for where styles do not show.
    """
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = Text()
    run: list[int] = []
    style, was_trained = "", 0

    def flush() -> None:
        # Whole runs, since a character may be spread over several tokens.
        if run:
            text.append(str(tokenizer.decode(run, clean_up_tokenization_spaces=False)), style)
        run.clear()

    for id_, trained in zip(shown.input_ids, shown.completion_mask, strict=True):
        plain, marked = (TRAINED_STYLE, TRAINED_SPECIAL_STYLE) if trained else (PROMPT_STYLE, SPECIAL_STYLE)
        here = marked if id_ in special else plain
        if here != style or id_ in special:
            flush()
            style = here
        if brackets and trained != was_trained:
            flush()
            text.append(OPEN if trained else CLOSE)
        was_trained = trained
        run.append(id_)
    flush()
    if brackets and was_trained:
        text.append(CLOSE)
    return text


def _legend() -> Text:
    return Text.assemble(
        ("prompt", PROMPT_STYLE),
        "  ",
        ("special token", SPECIAL_STYLE),
        "  ",
        ("trained", TRAINED_STYLE),
        "  ",
        ("trained special token", TRAINED_SPECIAL_STYLE),
    )


def _counts(report: PrepareReport) -> Table:
    table = Table("", "train", "eval", box=None, pad_edge=False)
    pair = (report.train, report.eval)

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    row("records read", *(f"{split.num_read}" for split in pair))
    row("drawn", *(f"{split.num_sampled}" for split in pair))
    row("examples", *(f"{split.num_examples}" for split in pair))
    for reason in dict.fromkeys([*report.train.dropped, *report.eval.dropped]):
        row(f"dropped: {reason}", *(f"{split.dropped.get(reason, 0)}" for split in pair))
    row("pages cut", *(f"{split.num_cut_examples}" for split in pair))
    row("sentences and rows cut", *(f"{split.num_cut_units} of {split.num_units}" for split in pair))
    row("evidence kept", *(_evidence(split) for split in pair))
    row("tokens, prompts", *(f"{split.prompt_tokens.total}" for split in pair))
    row("tokens, completions", *(f"{split.completion_tokens.total}" for split in pair))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _evidence(split: SplitReport) -> str:
    found = split.evidence
    return f"{found.num_kept} of {found.num_units}" if found.num_units else "not known"


def _histogram(console: Console, title: str, found: Lengths) -> None:
    figures = f"mean {found.mean:g}, median {found.p50}, 95th percentile {found.p95}, longest {found.max}"
    console.print(Text.assemble("\n", (title, "bold"), f" ({figures})"))
    table = Table("from", "to", "", "", box=None, pad_edge=False)
    most = max(number for _, _, number in found.histogram)
    for low, high, number in found.histogram:
        width = -(-number * BAR_WIDTH // most)
        table.add_row(str(low), str(high - 1), "█" * width, str(number) if number else "")
    for column in (*table.columns[:2], table.columns[3]):
        column.justify = "right"
    console.print(table, "")


def _shares(report: PrepareReport) -> Table:
    table = Table("programs", "train", "eval", "FinQA test", box=None, pad_edge=False)

    def rows(
        known: Mapping[str, float], train: Mapping[str, float], evaluation: Mapping[str, float], what: str
    ) -> None:
        for key in dict.fromkeys([*known, *train, *evaluation]):
            shares = (shares.get(key, 0.0) for shares in (train, evaluation, known))
            table.add_row(what.format(key), *(f"{share:.1%}" for share in shares))

    rows(report.finqa_test_steps, report.train.steps, report.eval.steps, "steps: {}")
    rows(report.finqa_test_operations, report.train.operations, report.eval.operations, "{}")
    for column in table.columns[1:]:
        column.justify = "right"
    return table
