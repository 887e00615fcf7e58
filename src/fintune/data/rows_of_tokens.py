"""Rows of training tokens, and questions about the same page as one of them.

FinQA asks 2.8 questions a page on average, and the page is most of an example. Training on conversations spends the
tokens of one page on all of them; a page whose examples had to be cut stays as single examples, because each was cut
for its own question.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fintune.data.tokenize_finqa import EncodedRecord
from fintune.finqa.identity import page_content
from fintune.finqa.prompt import ask
from fintune.models import chat_template as chat
from fintune.models.chat_cache import CachedChatTokenizer
from fintune.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sequenced:
    """What one row of the training tokens holds.

    Attributes:
        id: Ids of its examples, joined by spaces.
        input_ids: Shape [num_tokens].
        completion_mask: 1 where the token is trained; same length.
        rejected_ids: The worse answer with its end of turn, which stands behind the same prompt; of pairs alone.
        label: Whether the answer is desired; of labelled answers alone.
    """

    id: str
    input_ids: list[int]
    completion_mask: list[int]
    rejected_ids: list[int] | None = None
    label: bool | None = None

    @property
    def num_tokens(self) -> int:
        """What one pass over the row reads; a pair reads its prompt twice."""
        again = 0 if self.rejected_ids is None else self.completion_mask.index(1) + len(self.rejected_ids)
        return len(self.input_ids) + again

    @property
    def num_at_once(self) -> int:
        """What the model has before it at its last token; of a pair with the longer answer."""
        if self.rejected_ids is None:
            return len(self.input_ids)
        return max(len(self.input_ids), self.completion_mask.index(1) + len(self.rejected_ids))


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
    writer = CachedChatTokenizer(tokenizer)
    pages: dict[object, list[EncodedRecord]] = {}
    for place, each in enumerate(examples):
        pages.setdefault(place if each.example.num_cut else page_content(each.record), []).append(each)
    return [row for page in pages.values() for row in _rows(tokenizer, writer, page, num_questions, max_length)]


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    writer: CachedChatTokenizer,
    page: Sequence[EncodedRecord],
    num_questions: int,
    max_length: int,
) -> Iterator[Sequenced]:
    members: list[EncodedRecord] = []
    row: Sequenced | None = None
    for each in page:
        longer = _join(tokenizer, writer, [*members, each]) if len(members) < num_questions else None
        if row is not None and (longer is None or len(longer.input_ids) > max_length):
            yield row
            members, longer = [], _join(tokenizer, writer, [each])
        members, row = [*members, each], longer
    if row is not None:
        yield row


def _join(
    tokenizer: PreTrainedTokenizerBase, writer: CachedChatTokenizer, members: Sequence[EncodedRecord]
) -> Sequenced:
    if len(members) == 1:
        return single(members)[0]
    messages: list[Message] = []
    for each in members:
        asked = each.example.messages if not messages else (Message(role="user", content=ask(each.record.qa.question)),)
        messages += [*asked, Message(role="assistant", content=each.example.completion)]
    writer.check(messages)
    encoded = chat.encode_conversation(tokenizer, messages, writer)
    ids = " ".join(each.example.id for each in members)
    return Sequenced(ids, encoded.input_ids, encoded.completion_mask)
