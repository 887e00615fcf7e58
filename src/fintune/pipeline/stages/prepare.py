"""``fintune prepare``: records to examples, tokens and gold file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fintune.config import Config
from fintune.data import prepare_finqa as preparation
from fintune.data import prepared
from fintune.errors import ConfigError
from fintune.manifest import Facts
from fintune.models import load as models
from fintune.models.folder import context_tokens, read_model_config
from fintune.util.console import say


def prepare(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Fill ``folder`` with what training and prediction read; the files are listed in :mod:`fintune.data.prepared`.

    Args:
        config: ``data``, ``prompt``, ``model.name`` and ``run.seed`` decide the result.
        inputs: None are needed.
        folder: Empty.

    Returns:
        Counts for the manifest, and a line for the summary table.

    Raises:
        DataError: A data file, or every record of it, cannot be used.
        ModelError: The model has no usable tokenizer.
        ConfigError: ``prompt.max_length`` lets through rows that are longer than the model's context.
        ResourceError: A hub dataset that cannot be fetched.
    """
    base = models.fetch_base(config)
    tokenizer = models.load_tokenizer(base, trust_remote_code=config.model.trust_remote_code)
    made = preparation.make(config, tokenizer)
    _check_context(config, base, made)
    prepared.write(folder, made)
    report = made.report
    for note in report.notes():
        say(note)
    restricted = f"; not for commercial use: {report.non_commercial}" if report.non_commercial else ""
    what = "examples" if config.train.objective == "sft" else "preference pairs"
    if any(made.labelled.values()):
        labels = report.train.labels
        what = f"preference rows; {labels['desired']} desired, {labels['undesired']} undesired answers to train on"
    facts = {
        "summary": f"{report.train.num_examples} train, {report.eval.num_examples} eval {what}{restricted}",
        "template_hash": report.template_hash,
        "num_train": report.train.num_examples,
        "num_eval": report.eval.num_examples,
        "num_dropped": {"train": report.train.dropped, "eval": report.eval.dropped},
        "num_cut": {"train": report.train.num_cut_examples, "eval": report.eval.num_cut_examples},
        "num_train_rows": report.train.num_rows,
        "num_train_tokens": report.train.num_row_tokens,
    }
    if report.train.labels:
        facts["num_labels"] = {"train": report.train.labels, "eval": report.eval.labels}
    if report.sources:
        facts["licences"] = {each.path: each.licence.name for each in report.sources}
    return facts


def _check_context(config: Config, base: models.ModelFolder, made: prepared.Prepared) -> None:
    context = context_tokens(read_model_config(base.path))
    name, num_tokens = max(
        ((row.id, row.num_at_once) for rows in made.rows.values() for row in rows), key=lambda row: row[1]
    )
    if context is not None and num_tokens > context:
        raise ConfigError(
            f"prompt.max_length is {config.prompt.max_length} and the longest row has {num_tokens} tokens (id {name}), "
            f"but {config.model.name} reads at most {context}",
            hint=f"set prompt.max_length to {context} or less",
            option="prompt.max_length",
        )
