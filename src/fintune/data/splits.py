"""``data.source`` to the records of the two splits, sampled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fintune.config import Config, DataOptions
from fintune.data.finqa_json import ReadResult, read_finqa
from fintune.data.source_report import UnusedRow
from fintune.errors import DataError
from fintune.records import FinQARecord
from fintune.util.sampling import draw_indices


@dataclass(frozen=True)
class Split:
    """The records of a split.

    Attributes:
        records: What was drawn, in the source's order.
        num_read: Usable records of the source.
        dropped: Records that were not usable, by reason.
        unused: They, with what is wrong with them.
    """

    records: list[FinQARecord]
    num_read: int
    dropped: Counter[str] = field(default_factory=Counter)
    unused: list[UnusedRow] = field(default_factory=list)


def load(config: Config, *, limit: int | None = None) -> dict[str, Split]:
    """Read or generate "train" and "eval".

    Args:
        config: Its ``data`` and ``run.seed`` are read.
        limit: At most so many records a split, on top of ``data.max_train_samples`` and ``data.max_eval_samples``.

    Raises:
        DataError: A file that cannot be used, or with ``data.strict`` a record.
    """
    data = config.data
    train, evaluation = _generated(data, config.run.seed) if data.source == "builtin:statements" else _files(data)
    return {
        "train": _draw(train, _least(data.max_train_samples, limit), config.run.seed),
        "eval": _draw(evaluation, _least(data.max_eval_samples, limit), config.run.seed),
    }


def _files(data: DataOptions) -> tuple[ReadResult, ReadResult]:
    if data.train is None or data.eval is None:
        raise DataError("data.source: finqa needs data.train and data.eval", option="data.source")
    return read_finqa(data.train, strict=data.strict), read_finqa(data.eval, strict=data.strict)


def _generated(data: DataOptions, seed: int) -> tuple[ReadResult, ReadResult]:
    """Pages of some companies to train on and of others to score on."""
    from fintune.data.synthetic import generate, split_by_company

    pages = data.statements
    records = generate(
        pages.train_companies + pages.eval_companies,
        pages_per_company=pages.pages_per_company,
        questions_per_page=pages.questions_per_page,
        seed=seed,
        size=pages.size,
    )
    train, evaluation = split_by_company(records, num_train=pages.train_companies)
    return ReadResult(train), ReadResult(evaluation)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def draw(records: list[FinQARecord], number: int | None, seed: int) -> list[FinQARecord]:
    """At most so many records, in their order; all where ``number`` is None."""
    return [records[k] for k in draw_indices(len(records), number, seed)]


def _draw(result: ReadResult, number: int | None, seed: int) -> Split:
    records = draw(result.records, number, seed)
    return Split(records, len(result.records), result.dropped, result.unused)
