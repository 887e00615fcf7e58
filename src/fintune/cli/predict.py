"""``fintune predict --model``: a plain FinQA file without a run, for :mod:`fintune.cli.main` and the older script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fintune.errors import ConfigError, DataError
from fintune.util.signals import RESUME_MESSAGE, interrupt_message

if TYPE_CHECKING:
    from fintune.config.load import Loaded
    from fintune.inference.open_model import EngineChoice

_NUMBER = "data.max_eval_samples"
_READ = (_NUMBER, "run.seed")
_SECTIONS = ("prompt.", "predict.", "model.")
_SPLIT = re.compile(r"(?<![A-Za-z])(test|dev|valid|validation|eval)(?![A-Za-z])", re.IGNORECASE)


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
) -> None:
    """Ask a model every question of a FinQA file, as `fintune.cli.commands.predict_file` does, and say what came of it.

    Args:
        model: Folder, hub id, built-in model, GGUF file or ``URL#MODEL``.
        data: FinQA file.
        out: JSON file to write.
        overrides: ``dotted.key=value``.
        config: Options of the run that trained the model.
        adapter: PEFT adapter.
        train: FinQA file that shots come from; the training file beside ``data`` where None.
        engine: What runs the model.
        load_in_4bit: Quantise the weights while they load.
        max_questions: Ask at most so many; the override ``data.max_eval_samples``, where there is one, where None.

    Raises:
        ConfigError: An override that changes nothing here.
    """
    from fintune.cli.commands.predict_file import FileJob, predict_file
    from fintune.cli.run_models import model_of
    from fintune.config.load import OVERRIDE, load
    from fintune.inference.open_model import ModelSpec
    from fintune.util.text import abridge_remarks

    model, of_run = model_of(model, with_adapter=adapter is not None)
    loaded = load(config, (*(of_run if config is None else ()), *overrides))
    _refuse_unread(loaded)
    options = loaded.config
    if max_questions is None and loaded.origin.get(_NUMBER) == OVERRIDE:
        max_questions = options.data.max_eval_samples
    options = options.with_decoding_mode(options.predict.decoding_modes[0])
    spec = ModelSpec.from_options(model, options, adapter=adapter, engine=engine, load_in_4bit=load_in_4bit)
    number = options.predict.num_fewshot
    train = train or (training_file(data) if number else None)
    job = FileJob(spec, data, out, train=train, num_shots=number, max_questions=max_questions)
    with interrupt_message(RESUME_MESSAGE):
        done = predict_file(job, options)
    for problem in abridge_remarks(done.problems):
        click.echo(f"fintune: {problem}", err=True)
    facts = done.facts
    words = [f"{facts['num_predictions']} predictions"]
    if facts["num_gold"]:
        words.append(f"execution accuracy {facts['execution_accuracy']:.2%} of {facts['num_gold']}")
    words += [f"{number} not asked ({reason})" for reason, number in facts["num_dropped"].items()]
    for key, what in (
        ("num_cut_off", "cut off at predict.max_new_tokens"),
        ("num_cut_pages", "pages cut to fit"),
        ("num_shots_left_out", "shots left out to fit"),
    ):
        words += [f"{facts[key]} {what}"] if facts.get(key) else []
    click.echo(f"{out}: {', '.join(words)}")


def _refuse_unread(loaded: Loaded) -> None:
    """Overrides that a file without a run does not read; those of a CONFIG are about its run."""
    from fintune.config.load import OVERRIDE

    for key, origin in loaded.origin.items():
        if origin == OVERRIDE and key not in _READ and not key.startswith(_SECTIONS):
            raise ConfigError(
                f"{key} changes nothing in predict --model",
                option=key,
                hint=f"it reads prompt., predict. and model. options, {' and '.join(_READ)}",
            )


def training_file(data: Path) -> Path:
    """The file of training questions beside a file of other ones: ``FinQA_train.json`` for ``FinQA_test.json``.

    Raises:
        DataError: There is none.
    """
    names = []
    for name in dict.fromkeys((data.name, data.name.removesuffix(".gz"), f"{data.name}.gz")):
        found = [*_SPLIT.finditer(name.replace("_", " "))]
        if found:
            start, end = found[-1].span()
            names.append(f"{name[:start]}train{name[end:]}")
    for name in names:
        if (data.parent / name).is_file():
            return data.parent / name
    looked = f"no {names[0]} stands beside it" if names else "its name does not say which training file belongs to it"
    raise DataError(
        f"shots need training questions, and {looked}",
        path=data,
        hint="name the file with --train (--train_json of the older script)",
    )
