"""``fintune inspect``: what the examples are, before or after ``prepare``.

It prints counts, dropped rows by reason, cut texts, token lengths, the distribution of programs beside FinQA's, and
examples as the model sees them: trained tokens in colour, or in brackets if there is no colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fintune.cli.common import FILE, config_arguments
from fintune.config import Config
from fintune.config.load import load
from fintune.data import prepared
from fintune.data.files import local_files
from fintune.data.prepare import prepare_data
from fintune.data.report import NOT_USED, Lengths, PrepareReport
from fintune.data.tokenize import TokenRow
from fintune.manifest import MANIFEST
from fintune.models import load as models
from fintune.pipeline.run_folder import overrides_of
from fintune.report.inspect_page import InspectPage, Piece, Shown, render_inspect
from fintune.report.sections.data import (
    count_rows,
    dropped_rows,
    left_out,
    num_more,
    problems,
    restricted_names,
    source_rows,
)
from fintune.util.console import make_console
from fintune.util.files import check_outputs, write_output
from fintune.util.sampling import describe_row, file_of_row, stratified_indices
from fintune.util.text import escape_control_chars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 200
"""Maximum records of a split that are encoded if there is no prepared folder."""
BAR_WIDTH = 40
_SOURCE_COLUMNS = (0, 1, 2, 5, 6, 7)
"""Columns of the page's table of sources that the terminal has room for."""

PROMPT_STYLE, SPECIAL_STYLE = "dim", "dim reverse"
TRAINED_STYLE, TRAINED_SPECIAL_STYLE = "green", "bold green reverse"
REJECTED_STYLE, REJECTED_SPECIAL_STYLE = "red", "bold red reverse"
_BESIDE_TITLE = 6
"""Columns of a panel's title line that its border uses."""
OPEN, CLOSE = "⟦", "⟧"


@click.command("inspect")
@config_arguments
@click.option("--examples", type=click.IntRange(min=0), default=3, show_default=True, help="Examples to show in full.")
@click.option("--html", type=FILE, help="Also write everything as one self-contained page.")
def inspect_command(config: Path | None, overrides: tuple[str, ...], examples: int, html: Path | None) -> None:
    """Show counts, dropped rows by reason, token lengths, and examples with the trained tokens in colour.

    CONFIG may also be a run's folder, such as financial_lora/run of train_financial_model.py.
    """
    if config is not None and config.is_dir():
        overrides, config = (*overrides_of(config, with_data=True), *overrides), None
    check_outputs([html], [config] if config is not None else [])
    inspect_data(load(config, overrides).config, make_console(), num_examples=examples, html=html)


def inspect_data(config: Config, console: Console, *, num_examples: int = 3, html: Path | None = None) -> None:
    """Print what the examples are, and write the page if a path is given.

    The run's ``prepare`` folder is read if it was made with these options. Otherwise at most :data:`SAMPLE` records of
    each split are prepared in memory, and nothing is written.

    Args:
        config: The run.
        console: Console to print to.
        num_examples: Number of training examples to render, from different files and labels.
        html: Path of the page.

    Raises:
        FintuneError: The page cannot be written.
        DataError: The data cannot be used.
        ModelError: The model has no usable tokenizer.
    """
    files = [path for path in (config.data.train, config.data.eval) if path is not None]
    check_outputs([html], [*files, *(path for source in config.data.sources for path in local_files(source))])
    reference = models.fetch_base(config)
    tokenizer = models.load_tokenizer(reference, trust_remote_code=config.model.trust_remote_code)
    folder = config.folder / "prepare"
    report, rows, origin = _stored(config, folder, num_examples) or _fresh(config, tokenizer, num_examples)
    paths = [source.path for source in config.data.sources]
    examples = [
        replace(example, id=describe_row(example.id, paths)) for example in (split_row(tokenizer, row) for row in rows)
    ]
    page = InspectPage(
        config.run.name, origin, config.model.name, config.data.source, report.model_dump(mode="json"), examples
    )
    if html is not None:
        write_output(html, render_inspect(page))
    _print(page, report, console)
    if html is not None:
        console.print(Text(f"The page: {html}"), soft_wrap=True)


def _print(page: InspectPage, report: PrepareReport, console: Console) -> None:
    coloured = console.color_system is not None
    console.print(Text(page.origin, style="bold"))
    console.print(_table(("", "train", "eval"), count_rows(page.report), numbers=(1, 2)))
    if sources := [row for row in source_rows(page.report) if len(row) > _SOURCE_COLUMNS[-1]]:  # not those of files
        head = ("source", "rows", "usable rows by format", "train", "held out", "licence")
        rows = [[str(row[index]) for index in _SOURCE_COLUMNS] for row in sources]
        console.print("", _table(head, rows, numbers=(1, 3, 4)), sep="\n")
    if names := restricted_names(page.report):
        console.print(Text.assemble(("  not for commercial use ", "yellow"), ", ".join(names)))
    for line in left_out(page.report):
        console.print(Text(f"  {line}"), soft_wrap=True)
    if reasons := dropped_rows(page.report):
        console.print("", _table(("dropped", "where", "rows"), reasons, numbers=(2,)), sep="\n")
    for problem in problems(page.report):
        console.print(Text.assemble(("  not used ", "red"), escape_control_chars(problem)))
    if more := num_more(page.report):
        console.print(Text(f"  ... and {more:,} more; prepare writes all to {NOT_USED}"), soft_wrap=True)
    if report.eval_warning:
        console.print(Text(f"  {report.eval_warning}", style="yellow"))
    limit = f"at most {report.max_length} with the completion"
    _histogram(console, "train: tokens of a prompt", report.train.prompt_tokens, limit)
    _histogram(console, "eval: tokens of a prompt", report.eval.prompt_tokens, limit)
    _histogram(console, "train: tokens of a completion, end of turn included", report.train.completion_tokens)
    if report.kind == "program":
        console.print(_shares(report))
    for example in page.examples:
        title = Text(
            _shorten_start(escape_control_chars(f"{example.id}: {example.counts}"), console.width - _BESIDE_TITLE)
        )
        console.print(Panel(render_example(example, brackets=not coloured), title=title, title_align="left"))
    if page.examples:
        console.print(_legend() if coloured else Text(f"{OPEN}trained{CLOSE}"))


def _stored(config: Config, folder: Path, number: int) -> tuple[PrepareReport, list[TokenRow], str] | None:
    if not (folder / MANIFEST).is_file():
        return None
    report = prepared.read_report(folder)
    if report.options != prepared.deciding_options(config):
        return None
    return report, prepared.read_tokens(folder, "train", number), f"{folder}, all examples"


def _fresh(
    config: Config, tokenizer: PreTrainedTokenizerBase, number: int
) -> tuple[PrepareReport, list[TokenRow], str]:
    data = prepare_data(config, tokenizer, limit=SAMPLE)
    rows = data.rows("train")
    return (
        data.report,
        [rows[index] for index in stratified_indices([(file_of_row(row.id), row.label) for row in rows], number)],
        f"not prepared yet with these options: at most {SAMPLE} examples of each split were read",
    )


def split_row(tokenizer: PreTrainedTokenizerBase, row: TokenRow) -> Shown:
    """Split a row into pieces of equally treated tokens. A special token is a piece of its own."""
    pieces = _pieces(tokenizer, row.input_ids, row.completion_mask)
    rejected = row.rejected_ids or []
    return Shown(
        row.id,
        len(row.input_ids),
        sum(row.completion_mask),
        pieces,
        _pieces(tokenizer, rejected, [1] * len(rejected)),
        row.label,
    )


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained_mask: Sequence[int]) -> list[Piece]:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces: list[Piece] = []
    run: list[int] = []
    before = (False, False)

    def flush() -> None:
        # Whole runs are decoded, since one character may need several tokens.
        if run:
            text = str(tokenizer.decode(run, clean_up_tokenization_spaces=False))
            pieces.append(Piece(text, trained=before[0], special=before[1]))
        run.clear()

    for number, trained in zip(ids, trained_mask, strict=True):
        treatment = (bool(trained), number in special)
        if treatment != before or treatment[1]:
            flush()
            before = treatment
        run.append(number)
    flush()
    return pieces


def render_example(example: Shown, *, brackets: bool = False) -> Text:
    """Return an example as text: the prompt dim, trained tokens green, rejected ones red, special ones reversed.

    Args:
        example: The example.
        brackets: Put trained tokens in brackets, for outputs without styles.
    """
    good, bad = (TRAINED_STYLE, TRAINED_SPECIAL_STYLE), (REJECTED_STYLE, REJECTED_SPECIAL_STYLE)
    text = _marked(example.pieces, bad if example.label is False else good, brackets)
    if example.rejected:
        text.append("\n\nrejected: ", "bold")
        text.append_text(_marked(example.rejected, bad, False))
    return text


def _marked(pieces: Sequence[Piece], trained: tuple[str, str], brackets: bool) -> Text:
    text, was_trained = Text(), False
    for piece in pieces:
        if brackets and piece.trained != was_trained:
            text.append(OPEN if piece.trained else CLOSE)
        was_trained = piece.trained
        plain, marked = trained if piece.trained else (PROMPT_STYLE, SPECIAL_STYLE)
        text.append(escape_control_chars(piece.text), marked if piece.special else plain)
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


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(Text(name), justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(escape_control_chars(cell)) for cell in row))
    return table


def _shorten_start(title: str, width: int) -> str:
    # The end of a path identifies it, and the counts follow it.
    return title if len(title) <= width else "…" + title[1 - width :]


def _histogram(console: Console, title: str, lengths: Lengths, limit: str = "") -> None:
    figures = f"mean {lengths.mean:g}, median {lengths.p50}, 95th percentile {lengths.p95}, longest {lengths.max}"
    figures += f", {limit}" if limit else ""
    console.print(Text.assemble("\n", (title, "bold"), f" ({figures})"))
    table = Table("from", "to", "", "", box=None, pad_edge=False)
    most = max(number for _, _, number in lengths.histogram)
    for low, high, number in lengths.histogram:
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
