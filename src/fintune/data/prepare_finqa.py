"""From the data that a configuration names to the examples, tokens and figures of ``prepare``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fintune.config import Config
from fintune.data import prepare_chat as preparation_chat
from fintune.data import splits
from fintune.data.prepared import Prepared, options_of
from fintune.data.report import NUM_PROBLEMS, Evidence, PrepareReport, SplitReport, lengths
from fintune.data.rows_of_tokens import Sequenced, grouped, single
from fintune.data.source_report import UnusedRow
from fintune.data.splits import Split
from fintune.data.tokenize_finqa import EncodedRecord, EncodedSplit, Encoder
from fintune.finqa.distribution import FINQA_TEST, distribution
from fintune.finqa.identity import group_of
from fintune.finqa.page import clean_record
from fintune.finqa.prompt import TooLongError
from fintune.models.chat_template import template_hash
from fintune.records import FinQARecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make(config: Config, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None) -> Prepared:
    """Read the data and encode it.

    Args:
        config: ``data``, ``prompt`` and ``run.seed`` decide the result.
        tokenizer: Of the model.
        limit: At most so many examples a split, on top of the configuration's limits.

    Raises:
        DataError: A data file, or every record of it, cannot be used.
        ModelError: The tokenizer has no usable chat template.
        ResourceError: A hub dataset that cannot be fetched.
    """
    if config.data.source == "chat":
        return preparation_chat.make(config, tokenizer, limit=limit)
    sources = splits.load(config, limit=limit)
    encoder = Encoder(tokenizer, system=config.prompt.system, max_length=config.prompt.max_length)
    encoded = {name: encoder.split(split.records, name, strict=config.data.strict) for name, split in sources.items()}
    rows = _lay_out(config, tokenizer, encoded)
    unused = [row for name, split in encoded.items() for row in _unused(config, name, sources[name], split)]
    report = _report(config, tokenizer, sources, encoded, rows)
    return Prepared(
        report=report.model_copy(update={"num_unused": len(unused)}),
        unused=unused,
        examples={name: [each.example for each in split.examples] for name, split in encoded.items()},
        rows=rows,
        gold=[each.record for each in encoded["eval"].examples],
    )


def _unused(config: Config, name: str, source: Split, split: EncodedSplit) -> Iterator[UnusedRow]:
    """Records of a split that were left out, in reading and then in encoding."""
    yield from source.unused
    path = config.data.train if name == "train" else config.data.eval
    for id_, error in split.failed:
        hint = error.hint or ("raise prompt.max_length" if isinstance(error, TooLongError) else "")
        yield UnusedRow(file=str(path or ""), id=id_, reason=error.message, hint=hint)


def _lay_out(
    config: Config, tokenizer: PreTrainedTokenizerBase, splits: Mapping[str, EncodedSplit]
) -> dict[str, list[Sequenced]]:
    """The rows of the tokens: questions of a page joined for training, single for the loss on the evaluation split."""
    train = grouped(
        tokenizer,
        splits["train"].examples,
        num_questions=config.data.group_questions,
        max_length=config.prompt.max_length,
    )
    return {"train": train, "eval": single(splits["eval"].examples)}


def _report(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, Split],
    splits: Mapping[str, EncodedSplit],
    rows: Mapping[str, Sequence[Sequenced]],
) -> PrepareReport:
    """Sum up both splits.

    Args:
        config: What they were made with.
        tokenizer: Likewise.
        sources: The records that were drawn, by split.
        splits: What became of them.
        rows: How they are laid out for training.
    """
    trained = {page_of(each.record) for each in splits["train"].examples}
    return PrepareReport(
        template_hash=template_hash(tokenizer),
        max_length=config.prompt.max_length,
        num_shared_pages=sum(page_of(each.record) in trained for each in splits["eval"].examples),
        train=_split_report(sources["train"], splits["train"], rows["train"]),
        eval=_split_report(sources["eval"], splits["eval"], rows["eval"]),
        finqa_test_steps=dict(FINQA_TEST.steps),
        finqa_test_operations=dict(FINQA_TEST.operations),
        options=options_of(config),
    )


def _split_report(source: Split, split: EncodedSplit, rows: Sequence[Sequenced]) -> SplitReport:
    examples = split.examples
    shares = distribution(each.example.completion for each in examples)
    return SplitReport(
        num_read=source.num_read,
        num_sampled=len(source.records),
        num_examples=len(examples),
        dropped=dict((source.dropped + split.dropped).most_common()),
        problems=tuple([*(row.told() for row in source.unused), *split.problems][:NUM_PROBLEMS]),
        num_cut_examples=sum(each.example.num_cut > 0 for each in examples),
        num_cut_units=sum(each.example.num_cut for each in examples),
        num_units=sum(each.num_units for each in examples),
        cleaned=_cleaned(examples),
        prompt_tokens=lengths([each.num_prompt_tokens for each in examples]),
        completion_tokens=lengths([sum(each.completion_mask) for each in examples]),
        num_rows=len(rows),
        num_row_tokens=sum(len(row.input_ids) for row in rows),
        evidence=_evidence(examples),
        steps=dict(shares.steps),
        operations=dict(shares.operations),
    )


def _cleaned(examples: Sequence[EncodedRecord]) -> dict[str, int]:
    edits = (edit for each in examples for text in clean_record(each.record)[1] for edit in text)
    return dict(Counter(edit.rule for edit in edits).most_common())


def _evidence(examples: Sequence[EncodedRecord]) -> Evidence:
    known = [(each.record.qa.gold_inds.keys(), each.kept) for each in examples if each.record.qa.gold_inds]
    return Evidence(
        num_examples=len(known),
        num_complete=sum(gold <= kept for gold, kept in known),
        num_units=sum(len(gold) for gold, _ in known),
        num_kept=sum(len(gold & kept) for gold, kept in known),
    )


def page_of(record: FinQARecord) -> str:
    """The page that a record asks about: ``ACME/2009/page_17.pdf`` of ``ACME/2009/page_17.pdf-3``."""
    return group_of(record.id, "page")
