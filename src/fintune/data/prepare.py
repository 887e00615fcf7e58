"""From the data of a configuration to examples, token rows and a report, in one direction.

Read, normalise, drop duplicates, tokenize, split. Every row is tokenized once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from fintune.config import Config
from fintune.data import dataset
from fintune.data.dataset import Copy, FinqaSplit
from fintune.data.dedup import digest_texts
from fintune.data.formats import Conversation
from fintune.data.load import strict_hint
from fintune.data.objective_filter import ROW_NOUNS, RowKind, row_kind_of
from fintune.data.prepared import Prepared, deciding_options
from fintune.data.report import (
    MAX_PROBLEMS,
    Evidence,
    PrepareReport,
    SplitReport,
    summarize_lengths,
    warn_about_eval,
)
from fintune.data.tokenize import DroppedRow, TokenizeChunk, TokenizedExample, Tokenizing
from fintune.data.tokenize_chat import ConversationEncoder
from fintune.data.tokenize_finqa import FinqaEncoder
from fintune.errors import DataError
from fintune.finqa.distribution import FINQA_TEST, distribution
from fintune.finqa.page import group_of
from fintune.models import chat_template as chat
from fintune.records import FinQARecord, LabelledAnswer, Pair
from fintune.util.console import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_FEW_STEPS = 10
"""Steps of training below which there is a warning."""


@dataclass
class _Split:
    """What became of the drawn rows of a split."""

    num_drawn: int
    examples: list[TokenizedExample] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    unused: list[DroppedRow] = field(default_factory=list)


def prepare_data(config: Config, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None) -> Prepared:
    """Read the data and tokenize it.

    Args:
        config: The configuration; ``data``, ``prompt``, ``train.objective`` and ``run.seed`` decide the result.
        tokenizer: The model's tokenizer.
        limit: Maximum number of examples of a split, besides the limits of the configuration.

    Raises:
        DataError: A data file cannot be used, or none of its rows.
        ModelError: The tokenizer has no usable chat template.
        ResourceError: A hub dataset cannot be fetched.
    """
    if config.data.source == "chat":
        return _prepare_chat(config, tokenizer, limit)
    return _prepare_finqa(config, tokenizer, limit)


def _prepare_finqa(config: Config, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Prepared:
    sources = dataset.load_finqa_splits(config, limit=limit)
    train, trained = _tokenize_finqa(config, tokenizer, "train", sources["train"])
    evaluation, gold = _tokenize_finqa(config, tokenizer, "eval", sources["eval"])
    splits = {"train": train, "eval": evaluation}
    pages, questions = {page_of(record) for record in trained}, {_question_of(record) for record in trained}
    num_shared_pages = sum(page_of(record) in pages for record in gold)
    num_shared_questions = sum(_question_of(record) in questions for record in gold)
    has_stand_in = config.data.eval == config.data.train is not None and config.data.max_eval_samples == 1
    unused = [row for split in splits.values() for row in split.unused]
    report = PrepareReport(
        template_hash=chat.template_hash(tokenizer),
        max_length=config.prompt.max_length,
        num_shared_pages=num_shared_pages,
        num_shared_questions=num_shared_questions,
        train=_report_finqa(sources["train"], train, trained),
        eval=_report_finqa(sources["eval"], evaluation, gold),
        finqa_test_steps=dict(FINQA_TEST.steps),
        finqa_test_operations=dict(FINQA_TEST.operations),
        options=deciding_options(config),
        num_unused=len(unused),
        has_eval_stand_in=has_stand_in,
        eval_warning="" if has_stand_in else warn_about_eval(len(gold), num_shared_questions, num_shared_pages),
    )
    return Prepared(report, {name: split.examples for name, split in splits.items()}, gold=gold, unused=unused)


def _tokenize_finqa(
    config: Config, tokenizer: PreTrainedTokenizerBase, name: str, source: FinqaSplit
) -> tuple[_Split, list[FinQARecord]]:
    """Tokenize the records of a split, and return the records that became examples too."""
    data, records = config.data, source.records
    start = partial(
        _start_finqa,
        tokenizer,
        system=config.prompt.system,
        max_length=config.prompt.max_length,
        num_questions=data.group_questions if name == "train" else 1,
    )
    indices = list(dataset.group_by_page(records))
    work = Tokenizing(start, _num_page_characters, num_workers=data.num_proc)
    results: dict[int, TokenizedExample | DroppedRow] = {}
    pages = work.run([[records[index] for index in page] for page in indices])
    for page, page_results in zip(track(indices, f"tokenize {name}", len(indices)), pages, strict=True):
        results.update(zip(page, page_results, strict=True))
    split, used = _Split(len(records), dropped=source.dropped.copy(), unused=list(source.broken)), []
    path = data.train if name == "train" else data.eval
    for index, record in enumerate(records):
        result = results[index]
        if isinstance(result, TokenizedExample):
            split.examples.append(result)
            used.append(record)
            continue
        if data.strict:
            raise result.error()
        split.dropped[result.category] += 1
        split.unused.append(result.model_copy(update={"file": str(path or "")}))
    if not split.examples:
        first = split.unused[len(source.broken)] if records else "there is none"
        raise DataError(
            f"none of {len(records)} {name} records fits {config.prompt.max_length} tokens or can be encoded; {first}",
            hint="raise prompt.max_length" if split.dropped["too long"] else None,
        )
    return split, used


def _start_finqa(
    tokenizer: PreTrainedTokenizerBase, *, system: str, max_length: int, num_questions: int
) -> TokenizeChunk[Sequence[FinQARecord]]:
    return FinqaEncoder(tokenizer, system=system, max_length=max_length, num_questions=num_questions).encode_pages


def _num_page_characters(records: Sequence[FinQARecord]) -> int:
    record = records[0]
    cells = sum(len(cell) for row in record.table for cell in row)
    return sum(map(len, (*record.pre_text, *record.post_text))) + cells + 100 * len(records)


def page_of(record: FinQARecord) -> str:
    """Return the page of a record: ``ACME/2009/page_17.pdf`` for ``ACME/2009/page_17.pdf-3``."""
    return group_of(record.id, "page")


def _question_of(record: FinQARecord) -> tuple[str, str]:
    return page_of(record), record.qa.question.strip().casefold()


def _report_finqa(source: FinqaSplit, split: _Split, records: Sequence[FinQARecord]) -> SplitReport:
    shares = distribution(result.example.completion for result in split.examples)
    cleaned: Counter[str] = Counter()
    for result in split.examples:
        cleaned.update(result.cleaned)
    pairs = zip(records, split.examples, strict=True)
    known = [(record.qa.gold_inds.keys(), result.kept) for record, result in pairs if record.qa.gold_inds]
    report = _report_split(split)
    return report.model_copy(
        update={
            "num_read": source.num_read,
            "num_units": sum(result.num_units for result in split.examples),
            "cleaned": dict(cleaned.most_common()),
            "evidence": Evidence(
                num_examples=len(known),
                num_complete=sum(gold <= kept for gold, kept in known),
                num_units=sum(len(gold) for gold, _ in known),
                num_kept=sum(len(gold & kept) for gold, kept in known),
            ),
            "steps": dict(shares.steps),
            "operations": dict(shares.operations),
        }
    )


def _prepare_chat(config: Config, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Prepared:
    data, seed = config.data, config.run.seed
    row_kind = row_kind_of(config.train.objective)
    loaded = dataset.load_sources(data, seed, row_kind=row_kind, special_tokens=chat.special_tokens(tokenizer))
    holdout = dataset.split_holdout([row for source in loaded for row in source.conversations], data)
    drawn = {
        "train": dataset.draw_train(holdout, data, seed, limit),
        "eval": dataset.draw_eval(holdout, data, seed, limit),
    }
    results = _tokenize_chat(config, tokenizer, row_kind, [copy for copies in drawn.values() for copy in copies])
    usable = {id_ for id_, result in results.items() if isinstance(result, TokenizedExample)}
    if not any(copy.id in usable for copy in drawn["eval"]):
        holdout = holdout.widen(usable)
        held_out = [row for row in holdout.eval if row.id in results]
        held_out_ids = {row.id for row in held_out}
        drawn["train"] = [copy for copy in drawn["train"] if copy.conversation.id not in held_out_ids]
        drawn["eval"] = [Copy(row.id, row) for row in held_out]
    splits = {name: _collect(copies, results, name, row_kind) for name, copies in drawn.items()}
    if row_kind == "labels" and limit is None:  # a sample may lack what the data has
        _check_labels(splits["train"], [source.path for source in data.sources])
    broken = [row for source in loaded for row in source.broken]
    unused = [*broken, *(row for split in splits.values() for row in split.unused)]
    report = PrepareReport(
        template_hash=chat.template_hash(tokenizer),
        max_length=config.prompt.max_length,
        num_shared_pages=0,
        train=_report_chat(splits["train"], row_kind),
        eval=_report_chat(splits["eval"], row_kind),
        finqa_test_steps={},
        finqa_test_operations={},
        options=deciding_options(config),
        kind="chat",
        sources=tuple(dataset.report_sources(data, loaded, holdout)),
        unused_rows=tuple(_one_of_each_first(broken)[:MAX_PROBLEMS]),
        num_unused=len(unused),
        warnings=tuple(_warnings(config, tokenizer, splits, limit)),
    )
    return Prepared(
        report,
        {name: split.examples for name, split in splits.items()},
        unused=unused,
        pairs={name: _pairs(split) for name, split in splits.items()},
        labelled={name: _labelled_answers(split) for name, split in splits.items()},
    )


def _warnings(
    config: Config, tokenizer: PreTrainedTokenizerBase, splits: Mapping[str, _Split], limit: int | None
) -> Iterator[str]:
    """Yield what a user should look at before training on conversations."""
    asked = {name: [_asked(result) for result in split.examples] for name, split in splits.items()}
    trained = set(asked["train"])
    if number := sum(question in trained for question in asked["eval"]):
        yield (
            f"{number:,} of {len(asked['eval']):,} held-out conversations ask what is also trained on, so their loss "
            "says little about new questions"
        )
    without = sum(result.example.messages[0].role != "system" for result in splits["train"].examples)
    if without and (own := chat.own_system_message(tokenizer)):
        yield (
            f"the chat template puts its own system message into {without:,} of {len(splits['train'].examples):,} "
            f"conversations: {own[:80]!r}; set data.system for another one"
        )
    train, num_rows = config.train, sum(len(result.rows) for result in splits["train"].examples)
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    num_steps = train.max_steps or math.ceil(math.ceil(num_rows / per_step) * train.num_train_epochs)
    if limit is None and num_steps < _FEW_STEPS:
        yield (
            f"{num_rows:,} rows make {num_steps} steps of training; lower train.per_device_train_batch_size, or raise "
            "train.num_train_epochs"
        )


def _asked(result: TokenizedExample) -> bytes:
    return digest_texts(message.content for message in result.example.messages if message.role != "assistant")


def _tokenize_chat(
    config: Config, tokenizer: PreTrainedTokenizerBase, row_kind: RowKind, copies: Sequence[Copy]
) -> dict[str, TokenizedExample | DroppedRow]:
    """Tokenize every conversation once, and return the results by its id."""
    rows = list({copy.conversation.id: copy.conversation for copy in copies}.values())
    start = partial(
        _start_chat,
        tokenizer,
        system=config.data.system,
        train_on=config.data.train_on,
        max_length=config.prompt.max_length,
        row_kind=row_kind,
    )
    work = Tokenizing(start, _num_characters, num_workers=config.data.num_proc)
    results: dict[str, TokenizedExample | DroppedRow] = {}
    for row, result in zip(track(rows, "tokenize", len(rows)), work.run(rows), strict=True):
        if config.data.strict and isinstance(result, DroppedRow):
            raise result.error(strict_hint(result.hint))
        results[row.id] = result
    return results


def _start_chat(tokenizer: PreTrainedTokenizerBase, **options: object) -> TokenizeChunk[Conversation]:
    return ConversationEncoder(tokenizer, **options).encode_all  # type: ignore[arg-type]


def _num_characters(conversation: Conversation) -> int:
    return sum(len(message.content) for message in conversation.messages)


def _collect(
    copies: Sequence[Copy], results: Mapping[str, TokenizedExample | DroppedRow], name: str, row_kind: RowKind
) -> _Split:
    split = _Split(len(copies))
    unused: dict[str, DroppedRow] = {}  # by id, because a weight repeats a conversation
    for copy in copies:
        result = results[copy.conversation.id]
        if isinstance(result, TokenizedExample):
            split.examples.append(result if copy.id == result.example.id else _renamed(result, copy.id))
        else:
            split.dropped[result.category] += 1
            unused.setdefault(copy.conversation.id, result)
    split.unused = list(unused.values())
    if not split.examples:
        hint = "raise prompt.max_length" if split.dropped["too long"] else None
        message = f"none of {len(copies)} {name} {ROW_NOUNS[row_kind]} can be encoded; {split.unused[0]}"
        raise DataError(message, hint=hint)
    return split


def _renamed(result: TokenizedExample, id_: str) -> TokenizedExample:
    old = result.example.id
    rows = tuple(replace(row, id=id_ + row.id.removeprefix(old)) for row in result.rows)
    return replace(result, example=result.example.model_copy(update={"id": id_}), rows=rows)


def _one_of_each_first(broken: Sequence[DroppedRow]) -> list[str]:
    """Describe rows that cannot be used, with the first of every category before all others."""
    firsts: dict[str, DroppedRow] = {}
    for row in broken:
        firsts.setdefault(row.category, row)
    return [str(row) for row in (*firsts.values(), *(row for row in broken if firsts[row.category] is not row))]


def _check_labels(train: _Split, paths: Sequence[str]) -> None:
    """Refuse answers that are all desired, or all undesired.

    Raises:
        DataError: One of the labels is missing.
    """
    counts = _count_labels(train)
    for name, other, value in (("desired", "undesired", "false"), ("undesired", "desired", "true")):
        if not counts[other]:
            raise DataError(
                f"{', '.join(paths)}: all {counts[name]:,} answers to train on are {name}, and kto learns from their "
                f"difference to {other} ones",
                hint=f"add rows with label {value}, or pairs"
                + ("; train.objective: sft trains on desired answers alone" if name == "desired" else ""),
            )


def _count_labels(split: _Split) -> dict[str, int]:
    """Count answers by label; a pair has one of each."""
    return {
        "desired": sum(result.label is not False for result in split.examples),
        "undesired": sum(result.label is False or result.rejected is not None for result in split.examples),
    }


def _labelled_answers(split: _Split) -> list[LabelledAnswer]:
    return [
        LabelledAnswer(
            id=result.example.id,
            messages=result.example.messages,
            completion=result.example.completion,
            label=result.label,
        )
        for result in split.examples
        if result.label is not None
    ]


def _pairs(split: _Split) -> list[Pair]:
    return [
        Pair(
            id=result.example.id,
            messages=result.example.messages,
            chosen=result.example.completion,
            rejected=result.rejected,
        )
        for result in split.examples
        if result.rejected is not None
    ]


def _report_chat(split: _Split, row_kind: RowKind) -> SplitReport:
    labels = _count_labels(split) if row_kind == "labels" else {}
    num_turns = sum(len(result.example.messages) + 1 + result.example.num_cut for result in split.examples)
    notes = Counter(note for result in split.examples for note in result.notes)
    num_thoughts = sum(bool(turn and chat.split_thought(turn)[0]) for turn in (r.example.turn for r in split.examples))
    more = {
        "num_thoughts": num_thoughts,
        "num_units": num_turns,
        "labels": labels,
        "renderings": dict(notes.most_common()),
    }
    return _report_split(split).model_copy(update=more)


def _report_split(split: _Split) -> SplitReport:
    """Report the figures that both kinds of data have."""
    rows = [row for result in split.examples for row in result.rows]
    counts = [count for result in split.examples for count in result.token_counts]
    num_cut = [result.example.num_cut for result in split.examples]
    return SplitReport(
        num_read=split.num_drawn,
        num_sampled=split.num_drawn,
        num_examples=len(split.examples),
        dropped=dict(split.dropped.most_common()),
        problems=tuple(str(row) for row in split.unused[:MAX_PROBLEMS]),
        num_cut_examples=sum(number > 0 for number in num_cut),
        num_cut_units=sum(num_cut),
        num_units=0,
        prompt_tokens=summarize_lengths([prompt for prompt, _ in counts]),
        completion_tokens=summarize_lengths([completion for _, completion in counts]),
        num_rows=len(rows),
        num_row_tokens=sum(row.num_tokens for row in rows),
        evidence=Evidence(),
        steps={},
        operations={},
    )
