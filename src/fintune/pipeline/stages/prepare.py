"""``fintune prepare``: data files to examples, tokens and a gold file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fintune.config import Config
from fintune.data.prepare import prepare_data
from fintune.data.prepared import write_prepared
from fintune.errors import ConfigError
from fintune.manifest import Facts
from fintune.models import load as models
from fintune.models.folder import context_tokens, read_model_config
from fintune.util.console import say


def prepare(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Fill ``folder`` with what training and prediction read; :mod:`fintune.data.prepared` lists the files.

    Raises:
        DataError: A data file cannot be used, or none of its rows.
        ModelError: The model has no usable tokenizer.
        ConfigError: ``prompt.max_length`` allows rows that are longer than the model's context.
        ResourceError: A hub dataset cannot be fetched.
    """
    base = models.fetch_base(config)
    tokenizer = models.load_tokenizer(base, trust_remote_code=config.model.trust_remote_code)
    prepared = prepare_data(config, tokenizer)
    context = context_tokens(read_model_config(base.path))
    rows = (row for split in prepared.examples for row in prepared.rows(split))
    longest = max(rows, key=lambda row: row.num_context_tokens)
    if context is not None and longest.num_context_tokens > context:
        raise ConfigError(
            f"prompt.max_length is {config.prompt.max_length} and the longest row has {longest.num_context_tokens} "
            f"tokens (id {longest.id}), but {config.model.name} reads at most {context}",
            hint=f"set prompt.max_length to {context} or less",
            option="prompt.max_length",
        )
    write_prepared(folder, prepared)
    report = prepared.report
    for note in report.notes():
        say(note)
    restricted = f"; not for commercial use: {report.non_commercial}" if report.non_commercial else ""
    what = "examples" if config.train.objective == "sft" else "preference pairs"
    if any(prepared.labelled.values()):
        labels = report.train.labels
        what = f"preference rows; {labels['desired']} desired, {labels['undesired']} undesired answers to train on"
    counts = f"{report.train.num_examples} train, {report.eval_count}"
    facts: Facts = {
        "summary": f"{counts}{'' if report.has_eval_stand_in else f' {what}'}{restricted}",
        "template_hash": report.template_hash,
        "num_train": report.train.num_examples,
        "num_eval": report.eval.num_examples,
        "num_dropped": {"train": report.train.dropped, "eval": report.eval.dropped},
        "num_cut": {"train": report.train.num_cut_examples, "eval": report.eval.num_cut_examples},
        "num_train_rows": report.train.num_rows,
        "num_train_tokens": report.train.num_row_tokens,
    }
    if report.eval_warning:
        facts["eval_warning"] = report.eval_warning
    if report.train.labels:
        facts["num_labels"] = {"train": report.train.labels, "eval": report.eval.labels}
    if report.sources:
        facts["licences"] = {source.path: source.licence.name for source in report.sources}
    return facts
