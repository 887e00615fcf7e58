"""Conversations from ``data.sources`` to examples, tokens, preference pairs and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from fintune.config import Config, DataOptions
from fintune.data import mixture
from fintune.data.one_source import Entry, fields_that_hold, with_way_out
from fintune.data.prepared import Prepared, options_of
from fintune.data.report import NUM_PROBLEMS, Evidence, PrepareReport, SplitReport, lengths
from fintune.data.shapes import Conversation
from fintune.data.source_report import UnusedRow
from fintune.data.tokenize_chat import ConversationEncoder, EncodedConversation
from fintune.data.wanted import Wanted, wanted_by
from fintune.errors import DataError
from fintune.finqa.prompt import TooLongError
from fintune.models import chat_template as chat
from fintune.records import LabelledAnswer, Message, Pair
from fintune.util.console import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LETTERS_TOGETHER = 200_000
"""Of the conversations that are tokenised at once: enough for every core, little to keep."""


@dataclass(frozen=True)
class _Split:
    examples: list[EncodedConversation]
    num_sampled: int
    dropped: Counter[str] = field(default_factory=Counter)
    unused: list[UnusedRow] = field(default_factory=list)


def make(config: Config, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None) -> Prepared:
    """Read ``data.sources`` and encode what they hold; see `fintune.data.prepare_finqa.make`.

    With a preference ``train.objective`` these are pairs or, for ``kto``, also labelled answers; other rows count as
    dropped.
    """
    wanted = wanted_by(config.train.objective)
    encoder = ConversationEncoder(
        tokenizer,
        system=config.data.system,
        train_on=config.data.train_on,
        max_length=config.prompt.max_length,
    )
    found = mixture.load(
        config.data,
        config.run.seed,
        limit=limit,
        wanted=wanted,
        usable=lambda entry: _is_usable(encoder, entry, wanted),
    )
    splits = {
        name: _encode(encoder, entries, name, config.data, wanted)
        for name, entries in (("train", found.train), ("eval", found.eval))
    }
    if wanted == "labels" and limit is None:  # a sample may lack what the data has
        _check_labels(splits["train"], [source.path for source in config.data.sources])
    unused = [*found.unused, *(row for split in splits.values() for row in split.unused)]
    report = PrepareReport(
        template_hash=chat.template_hash(tokenizer),
        max_length=config.prompt.max_length,
        num_shared_pages=0,
        train=_report(splits["train"], wanted),
        eval=_report(splits["eval"], wanted),
        finqa_test_steps={},
        finqa_test_operations={},
        options=options_of(config),
        kind="chat",
        sources=tuple(found.reports),
        unused_rows=tuple(found.problems[:NUM_PROBLEMS]),
        num_unused=len(unused),
    )
    return Prepared(
        report=report,
        examples={name: [each.example for each in split.examples] for name, split in splits.items()},
        rows={name: [row for each in split.examples for row in each.rows] for name, split in splits.items()},
        pairs={name: [pair for each in split.examples if (pair := _pair(each))] for name, split in splits.items()},
        unused=unused,
        labelled={name: [one for each in split.examples if (one := _labelled(each))] for name, split in splits.items()},
    )


def _encode(
    encoder: ConversationEncoder, entries: Sequence[Entry], name: str, data: DataOptions, wanted: Wanted
) -> _Split:
    done = _Split([], len(entries))
    failed: dict[tuple[str, int], tuple[Entry, DataError]] = {}  # a weight repeats an entry
    learned = 0
    for place, entry in enumerate(track(entries, f"encode {name}", len(entries))):
        if place == learned:
            together = _together(islice(entries, place, None))
            encoder.learn(together)
            learned += len(together)
        try:
            encoded = _encoded(encoder, entry.id, entry.conversation, wanted)
        except DataError as error:
            if data.strict:
                [row] = _unused(data, [(entry, error)])
                raise row.model_copy(update={"hint": with_way_out(row.hint)}).error() from None
            done.dropped["too long" if isinstance(error, TooLongError) else "not encodable"] += 1
            failed.setdefault((entry.place, entry.row), (entry, error))
        else:
            done.examples.append(encoded)
    done.unused.extend(_unused(data, list(failed.values())))
    if not done.examples:
        hint = "raise prompt.max_length" if done.dropped["too long"] else None
        what = {"answers": "conversations", "pairs": "pairs", "labels": "answers"}[wanted]
        raise DataError(f"none of {len(entries)} {name} {what} can be encoded; {done.unused[0].told()}", hint=hint)
    return done


def _unused(data: DataOptions, failed: Sequence[tuple[Entry, DataError]]) -> list[UnusedRow]:
    """What could not be encoded, with the place of its row and the field that holds what must not be in a text."""
    texts: dict[int, dict[tuple[str, int], str]] = {}
    for entry, error in failed:
        if isinstance(error, chat.EndOfTurnError):
            texts.setdefault(entry.source, {})[entry.place, entry.row] = error.token
    fields = {number: fields_that_hold(data.sources[number], held) for number, held in texts.items()}
    return [
        UnusedRow(
            file=entry.place,
            row=entry.row,
            field=fields.get(entry.source, {}).get((entry.place, entry.row), ""),
            reason=error.message,
            hint=error.hint or ("raise prompt.max_length" if isinstance(error, TooLongError) else ""),
        )
        for entry, error in failed
    ]


def _together(entries: Iterable[Entry]) -> list[tuple[Message, ...]]:
    """The first conversations, at least one."""
    found: list[tuple[Message, ...]] = []
    num_letters = 0
    for entry in entries:
        found.append(entry.conversation.messages)
        num_letters += sum(len(message.content) for message in found[-1])
        if num_letters > _LETTERS_TOGETHER:
            break
    return found


def _encoded(encoder: ConversationEncoder, id_: str, conversation: Conversation, wanted: Wanted) -> EncodedConversation:
    if wanted != "answers" and conversation.rejected is not None:
        return encoder.encode_pair(id_, conversation.messages, conversation.rejected)
    if wanted == "labels" and conversation.label is not None:
        return encoder.encode_labelled(id_, conversation.messages, label=conversation.label)
    return encoder.encode(id_, conversation.messages, untrained=conversation.untrained, rejected=conversation.rejected)


def _is_usable(encoder: ConversationEncoder, entry: Entry, wanted: Wanted) -> bool:
    try:
        _encoded(encoder, entry.id, entry.conversation, wanted)
    except DataError:
        return False
    return True


def _check_labels(train: _Split, paths: Sequence[str]) -> None:
    """Refuse answers that are all desired, or all undesired.

    Raises:
        DataError: With what is missing.
    """
    found = _labels(train)
    for name, other, value in (("desired", "undesired", "false"), ("undesired", "desired", "true")):
        if not found[other]:
            raise DataError(
                f"{', '.join(paths)}: all {found[name]:,} answers to train on are {name}, and kto learns from their "
                f"difference to {other} ones",
                hint=f"add rows with label {value}, or pairs"
                + ("; train.objective: sft learns from desired answers alone" if name == "desired" else ""),
            )


def _labels(split: _Split) -> dict[str, int]:
    """Answers by label; a pair holds one of each."""
    return {
        "desired": sum(each.label is not False for each in split.examples),
        "undesired": sum(each.label is False or each.rejected is not None for each in split.examples),
    }


def _labelled(encoded: EncodedConversation) -> LabelledAnswer | None:
    example = encoded.example
    if encoded.label is None:
        return None
    return LabelledAnswer(id=example.id, messages=example.messages, completion=example.completion, label=encoded.label)


def _pair(encoded: EncodedConversation) -> Pair | None:
    example = encoded.example
    if encoded.rejected is None:
        return None
    return Pair(id=example.id, messages=example.messages, chosen=example.completion, rejected=encoded.rejected)


def _report(split: _Split, wanted: Wanted) -> SplitReport:
    rows = [row for each in split.examples for row in each.rows]
    trained = [sum(row.completion_mask) for row in rows]
    cut = [each.example.num_cut for each in split.examples]
    return SplitReport(
        num_read=split.num_sampled,
        num_sampled=split.num_sampled,
        num_examples=len(split.examples),
        dropped=dict(split.dropped.most_common()),
        problems=tuple(row.told() for row in split.unused[:NUM_PROBLEMS]),
        num_cut_examples=sum(number > 0 for number in cut),
        num_cut_units=sum(cut),
        num_units=sum(len(each.example.messages) + 1 + each.example.num_cut for each in split.examples),
        prompt_tokens=lengths([len(row.input_ids) - number for row, number in zip(rows, trained, strict=True)]),
        completion_tokens=lengths(trained),
        num_rows=len(rows),
        num_row_tokens=sum(row.num_tokens for row in rows),
        evidence=Evidence(num_examples=0, num_complete=0, num_units=0, num_kept=0),
        steps={},
        operations={},
        labels=_labels(split) if wanted == "labels" else {},
    )
