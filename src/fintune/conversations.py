"""Questions about the same page as one conversation: the page is read once, every answer is trained.

FinQA asks 2.8 questions a page on average, and the page is most of an example. Training on conversations spends the
tokens of one page on all of them; a page whose examples had to be cut stays as single examples, because each was cut
for its own question.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fintune import chat
from fintune.examples import EncodedRecord
from fintune.finqa.prompt import ask
from fintune.records import FinQARecord, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sequenced:
    """What one row of the training tokens holds.

    Attributes:
        id: Ids of its examples, joined by spaces.
        input_ids: Shape [num_tokens].
        completion_mask: 1 where the token is trained; same length.
    """

    id: str
    input_ids: list[int]
    completion_mask: list[int]


def single(examples: Iterable[EncodedRecord]) -> list[Sequenced]:
    """One row an example."""
    return [Sequenced(each.example.id, each.input_ids, each.completion_mask) for each in examples]


def grouped(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[EncodedRecord], *, num_questions: int, max_length: int
) -> list[Sequenced]:
    """One row a conversation of at most ``num_questions`` about one page.

    Args:
        tokenizer: With a chat template.
        examples: Of the training split; rows keep the order of their first examples.
        num_questions: 1 makes every example a row of its own.
        max_length: Tokens of a row; a conversation that grows over it is closed before.

    Raises:
        ModelError: The chat template rewrites earlier turns.
    """
    if num_questions == 1:
        return single(examples)
    pages: dict[object, list[EncodedRecord]] = {}
    for place, each in enumerate(examples):
        pages.setdefault(place if each.example.num_cut else _page(each.record), []).append(each)
    return [row for page in pages.values() for row in _rows(tokenizer, page, num_questions, max_length)]


def _page(record: FinQARecord) -> object:
    return record.pre_text, record.table, record.post_text


def _rows(
    tokenizer: PreTrainedTokenizerBase, page: Sequence[EncodedRecord], num_questions: int, max_length: int
) -> Iterator[Sequenced]:
    members: list[EncodedRecord] = []
    row: Sequenced | None = None
    for each in page:
        longer = _join(tokenizer, [*members, each]) if len(members) < num_questions else None
        if row is not None and (longer is None or len(longer.input_ids) > max_length):
            yield row
            members, longer = [], _join(tokenizer, [each])
        members, row = [*members, each], longer
    if row is not None:
        yield row


def _join(tokenizer: PreTrainedTokenizerBase, members: Sequence[EncodedRecord]) -> Sequenced:
    if len(members) == 1:
        return single(members)[0]
    messages: list[Message] = []
    for each in members:
        asked = each.example.messages if not messages else (Message(role="user", content=ask(each.record.qa.question)),)
        messages += [*asked, Message(role="assistant", content=each.example.completion)]
    encoded = chat.encode_conversation(tokenizer, messages)
    ids = " ".join(each.example.id for each in members)
    return Sequenced(ids, encoded.input_ids, encoded.completion_mask)
