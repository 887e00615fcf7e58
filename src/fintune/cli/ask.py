"""``fintune ask``, a command of :mod:`fintune.cli.main`."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fintune.data.decimal_commas import Mark
    from fintune.inference.open_model import EngineChoice

CONSTRAIN = click.Choice(["none", "general", "page"])
STRATEGY = click.Choice(["greedy", "sample", "execution_guided", "vote"])
DECIMAL = click.Choice(["point", "comma"])
ENGINES = click.Choice(["auto", "transformers", "llama.cpp", "vllm", "openai"])


@click.command()
@click.argument("model")
@click.argument("question")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--page", type=click.Path(path_type=Path), metavar="FILE", help="What it is about.  [required]")
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="Text that goes before the page's own.")
@click.option("--id", "record_id", metavar="ID", help="Which record, where the page is a FinQA file of several.")
@click.option("--decimal", type=DECIMAL, help="What stands before the decimals of a table; else found out.")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="DIR", help="PEFT adapter of the model.")
@click.option("--engine", type=ENGINES, default="auto", show_default=True, help="What runs the model; auto: its name.")
@click.option("--load-in-4bit", is_flag=True, help="Quantise the weights while they load (bitsandbytes).")
@click.option("--constrain", type=CONSTRAIN, help="Write only programs; `page`: of this page's numbers and rows.")
@click.option("--strategy", type=STRATEGY, help="How the answer is chosen, as predict.strategy.")
@click.option("--num-candidates", type=int, metavar="N", help="Completions, for execution_guided and vote.")
@click.option("--config", type=click.Path(path_type=Path), metavar="CONFIG", help="Options of the run that trained it.")
@click.option("--json", is_flag=True, help="One JSON object instead of text.")
def ask(
    model: str,
    question: str,
    overrides: tuple[str, ...],
    page: Path | None,
    text: Path | None,
    record_id: str | None,
    decimal: Mark | None,
    adapter: Path | None,
    engine: EngineChoice,
    load_in_4bit: bool,
    constrain: str | None,
    strategy: str | None,
    num_candidates: int | None,
    config: Path | None,
    json: bool,
) -> None:
    """Answer a question about a page, and show the program and the cells and sentences that it uses.

    MODEL is a folder, a hub id, builtin:smollm2-135m, a GGUF file, a run's folder (its GGUF, else what was merged), or
    the address of an OpenAI-compatible server: http://127.0.0.1:8080/v1#NAME. The page is a FinQA record (JSON), a CSV
    table, or an HTML or Markdown page with one table. What is not on the page is marked ungrounded.
    """
    from fintune.cli.commands.ask import ask as stage
    from fintune.cli.run_models import model_of
    from fintune.config.load import load
    from fintune.data.files import read_whole_text
    from fintune.data.page_file import read_page
    from fintune.inference.open_model import ModelSpec
    from fintune.report.answer_text import answer_lines, confidence_line

    if page is None:
        free = "for free chat: fintune serve MODEL.gguf"
        raise click.UsageError(f"ask is about a page, and none is named; give --page FILE, or {free}")
    flags = {"constrain": constrain, "strategy": strategy, "num_candidates": num_candidates}
    given = [f"predict.{name}={value}" for name, value in flags.items() if value is not None]
    model, of_run = model_of(model, with_adapter=adapter is not None)
    options = load(config, (*(of_run if config is None else ()), *overrides, *given)).config
    spec = ModelSpec.from_options(model, options, adapter=adapter, engine=engine, load_in_4bit=load_in_4bit)
    spec.engine_name  # noqa: B018 - refuses what does not go together, before the page is read
    more = read_whole_text(text, hint="give plain text") if text is not None else ""
    record = read_page(page, question, text=more, record_id=record_id, decimal=decimal)
    answer = stage(record, spec, options.prompt, options.predict)
    if json:
        click.echo(json_format.dumps(answer.as_json(), ensure_ascii=False, indent=2, allow_nan=False))
        return
    from rich.console import Console

    out = Console()
    lines = answer_lines(
        record, answer.program, answer.traced, answer.result, answer.elsewhere, has_only_constants=answer.of_constants
    )
    for line in lines:
        out.print(line, soft_wrap=True)
    out.print(
        confidence_line(answer.confidence, [each.result for each in answer.candidates], answer.result), soft_wrap=True
    )
    if options.predict.num_fewshot:
        click.echo("fintune: predict.num_fewshot is not read here: no solved questions were shown", err=True)
    if answer.num_cut:
        click.echo(f"fintune: {answer.num_cut} sentences and rows did not fit prompt.max_length", err=True)
    if answer.finish_reason == "length":
        limit = options.predict.max_new_tokens
        click.echo(f"fintune: the completion was cut off at predict.max_new_tokens={limit}", err=True)
