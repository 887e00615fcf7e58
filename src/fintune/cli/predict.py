"""``fintune predict``: the predict stage of a run, or the questions of a FinQA file put to any model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fintune.cli.common import (
    FILE,
    candidates_option,
    dry_run_option,
    echo,
    engine_option,
    four_bit_option,
    optional_config_arguments,
    page_mode_option,
    predict_overrides,
    redo_flag,
    resolve_run_model,
    run_stage,
    strategy_option,
)
from fintune.errors import ConfigError, DataError
from fintune.util.signals import RESUME_MESSAGE, interrupt_message

if TYPE_CHECKING:
    from fintune.config.load import Loaded
    from fintune.inference.open_model import EngineChoice

_NUMBER = "data.max_eval_samples"
_READ = (_NUMBER, "run.seed")
_SECTIONS = ("prompt.", "predict.", "model.")
_SPLIT = re.compile(r"(?<![A-Za-z])(test|dev|valid|validation|eval)(?![A-Za-z])", re.IGNORECASE)


@click.command("predict")
@optional_config_arguments
@redo_flag
@dry_run_option
@click.option("--model", metavar="MODEL", help="Folder, hub id, GGUF file, run folder or URL#NAME, instead of a run.")
@click.option("--adapter", type=FILE, metavar="DIR", help="PEFT adapter of --model.")
@engine_option
@four_bit_option
@click.option("--data", type=FILE, help="FinQA file with the questions for --model.")
@click.option(
    "--train", type=FILE, help="FinQA file for predict.num_fewshot (default: the training file beside --data)."
)
@click.option("--out", type=FILE, help="JSON file for the predictions of --model.")
@click.option(
    "--num", type=click.IntRange(min=1), metavar="N", help="Ask --model only N of the questions, drawn with run.seed."
)
@click.option(
    "--shard", callback=lambda _, __, text: _parse_shard(text), metavar="I/N", help="Ask --model only part I of N."
)
@click.option("--merge", is_flag=True, help="Join the finished shards of --out.")
@page_mode_option
@strategy_option
@candidates_option
def predict_command(
    config: Path | None,
    overrides: tuple[str, ...],
    redo: bool,
    dry_run: bool,
    model: str | None,
    adapter: Path | None,
    engine: EngineChoice,
    load_in_4bit: bool,
    data: Path | None,
    train: Path | None,
    out: Path | None,
    num: int | None,
    shard: tuple[int, int] | None,
    merge: bool,
    constrain: str | None,
    strategy: str | None,
    num_candidates: int | None,
) -> None:
    """Answer the evaluation questions with each kind of model of a run, or the questions of --data with --model.

    An interrupted command resumes where it stopped.
    """
    flags = predict_overrides(constrain, strategy, num_candidates)
    no_run: dict[str, object] = {"--adapter": adapter, "--train": train, "--num": num, "--shard": shard}
    no_run |= {"--engine": engine if engine != "auto" else None, "--load-in-4bit": load_in_4bit or None}
    given = [name for name, value in no_run.items() if value is not None]
    given += [f"--{flag[8:].partition('=')[0].replace('_', '-')}" for flag in flags]
    if merge:
        if out is None or given or overrides or redo or dry_run or (config, model, data) != (None, None, None):
            raise click.UsageError("--merge needs --out, and nothing else")
        from fintune.cli.predict_file import merge_shards

        _echo_facts(out, merge_shards(out))
        return
    if model is None and data is None and out is None and config is not None:
        if given:
            hint = "For a run, use data.max_eval_samples and predict. options"
            raise click.UsageError(f"{given[0]} needs --model. {hint}")
        run_stage("predict", config, overrides, redo=redo, dry_run=dry_run)
        return
    if model is None or data is None or out is None:
        raise click.UsageError("give a CONFIG, or --model, --data and --out together")
    if redo or dry_run:
        raise click.UsageError(f"{'--redo' if redo else '--dry-run'} is for a run's CONFIG, without --model")
    predict_plain(
        model,
        data,
        out,
        (*overrides, *flags),
        config=config,
        adapter=adapter,
        train=train,
        engine=engine,
        load_in_4bit=load_in_4bit,
        max_questions=num,
        shard=shard,
    )


def predict_plain(
    model: str,
    data: Path,
    out: Path,
    overrides: Sequence[str],
    *,
    config: Path | None = None,
    adapter: Path | None = None,
    train: Path | None = None,
    engine: EngineChoice = "auto",
    load_in_4bit: bool = False,
    max_questions: int | None = None,
    shard: tuple[int, int] | None = None,
) -> None:
    """Ask a model every question of a FinQA file (see :mod:`fintune.cli.predict_file`) and print a summary.

    Raises:
        ConfigError: An override has no effect here.
    """
    from fintune.cli.predict_file import FileJob, predict_file
    from fintune.config.load import OVERRIDE, load
    from fintune.inference.open_model import ModelSpec
    from fintune.util.text import abridge_remarks

    model, run_options = resolve_run_model(model, with_adapter=adapter is not None)
    loaded = load(config, (*(run_options if config is None else ()), *overrides))
    _refuse_unread(loaded)
    options = loaded.config
    if max_questions is None and loaded.origin.get(_NUMBER) == OVERRIDE:
        max_questions = options.data.max_eval_samples
    options = options.with_decoding_mode(options.predict.decoding_modes[0])
    spec = ModelSpec.from_options(model, options, adapter=adapter, engine=engine, load_in_4bit=load_in_4bit)
    num_shots = options.predict.num_fewshot
    train = train or (training_file(data) if num_shots else None)
    job = FileJob(spec, data, out, train=train, num_shots=num_shots, max_questions=max_questions, shard=shard)
    with interrupt_message(RESUME_MESSAGE):
        done = predict_file(job, options)
    for problem in abridge_remarks(done.problems):
        echo(f"fintune: {problem}", err=True)
    _echo_facts(job.written, done.facts)


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    """Parse ``I/N``."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, num_shards = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= num_shards:
        raise click.BadParameter(f"{text} is no shard; write I/N with I from 1 to N, for example 2/8")
    return number, num_shards


def _echo_facts(out: Path, facts: Mapping[str, Any]) -> None:
    words = [f"{facts['num_predictions']} predictions"]
    if facts["num_gold"]:
        words.append(f"execution accuracy {facts['execution_accuracy']:.2%} of {facts['num_gold']}")
    words += [f"{number} not asked ({reason})" for reason, number in facts["num_dropped"].items()]
    for key, meaning in (
        ("num_cut_off", "cut off at predict.max_new_tokens"),
        ("num_cut_pages", "pages cut to fit"),
        ("num_shots_left_out", "few-shot examples left out to fit"),
    ):
        words += [f"{facts[key]} {meaning}"] if facts.get(key) else []
    echo(f"{out}: {', '.join(words)}")


def _refuse_unread(loaded: Loaded) -> None:
    """Refuse overrides that have no effect without a run. Options of a CONFIG are about its run and allowed."""
    from fintune.config.load import OVERRIDE

    for key, origin in loaded.origin.items():
        if origin == OVERRIDE and key not in _READ and not key.startswith(_SECTIONS):
            raise ConfigError(
                f"{key} has no effect with predict --model",
                hint=f"it reads prompt., predict. and model. options, {' and '.join(_READ)}",
                option=key,
            )


def training_file(data: Path) -> Path:
    """Return the training file beside another FinQA file: ``FinQA_train.json`` for ``FinQA_test.json``.

    Raises:
        DataError: There is none.
    """
    names = []
    for name in dict.fromkeys((data.name, data.name.removesuffix(".gz"), f"{data.name}.gz")):
        matches = [*_SPLIT.finditer(name.replace("_", " "))]
        if matches:
            start, end = matches[-1].span()
            names.append(f"{name[:start]}train{name[end:]}")
    for name in names:
        if (data.parent / name).is_file():
            return data.parent / name
    reason = f"there is no {names[0]} beside it" if names else "its name does not say which training file belongs to it"
    raise DataError(
        f"few-shot examples need training questions, and {reason}",
        path=data,
        hint="name the file with --train (--train_json of the older script)",
    )
