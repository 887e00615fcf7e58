"""Tokenize conversations: which turns are trained, what is cut to fit, and chat templates with thoughts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from fintune.data.formats import Conversation
from fintune.data.objective_filter import RowKind
from fintune.data.tokenize import DroppedRow, TokenizedExample, TokenRow
from fintune.errors import DataError, FintuneError
from fintune.finqa.prompt import TooLongError
from fintune.models import chat_template as chat
from fintune.models.chat_cache import CachedChatTokenizer
from fintune.records import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THOUGHT, _THOUGHT_END = "<think>", "</think>"
_CHARACTERS_PER_TOKEN = 6
"""More than most tokens have. This much of a long conversation is tokenized at once, and the rest if it is needed."""


class ConversationEncoder:
    """Tokenize conversations with one tokenizer.

    Args:
        tokenizer: A tokenizer with a chat template.
        system: System message of conversations that have none; if empty, the chat template may add its own.
        train_on: ``all`` trains all of the assistant's turns, ``last`` the last one.
        max_length: Maximum number of tokens of a row. Turns that do not fit are left out.
        row_kind: What the objective trains on; see :func:`fintune.data.objective_filter.row_kind_of`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str,
        train_on: Literal["all", "last"],
        max_length: int,
        row_kind: RowKind = "answers",
    ) -> None:
        self._tokenizer, self._train_on, self._max_length = tokenizer, train_on, max_length
        self._row_kind = row_kind
        self._writer = CachedChatTokenizer(tokenizer)
        self._system = [Message(role="system", content=system)] if system else []
        prompt = chat.render(tokenizer, [Message(role="user", content="question")])
        # Such a template (DeepSeek-R1's) begins every answer inside a thought.
        self._opens_thought = prompt.rstrip().endswith(_THOUGHT)

    def encode_all(self, conversations: Sequence[Conversation]) -> list[TokenizedExample | DroppedRow]:
        """Encode conversations as the objective trains on them, with one result for each.

        Raises:
            ModelError: The chat template does not fit.
        """
        self.learn(conversation.messages for conversation in conversations)
        return [self._encode_row(conversation) for conversation in conversations]

    def _encode_row(self, row: Conversation) -> TokenizedExample | DroppedRow:
        try:
            if self._row_kind != "answers" and row.rejected is not None:
                return self.encode_pair(row.id, row.messages, row.rejected).compact()
            if self._row_kind == "labels" and row.label is not None:
                return self.encode_labelled(row.id, row.messages, label=row.label).compact()
            return self.encode(row.id, row.messages, untrained=row.untrained, rejected=row.rejected).compact()
        except DataError as error:
            field = row.end_token_field if isinstance(error, chat.EndOfTurnError) else ""
            return DroppedRow.from_error(error, file=row.file, row=row.row, field=field)

    def encode(
        self,
        id_: str,
        messages: Sequence[Message],
        *,
        untrained: Collection[int] = (),
        rejected: str | None = None,
    ) -> TokenizedExample:
        """Encode one conversation, which ends with the assistant.

        Args:
            id_: Id of the example. If it has several rows, the index of the turn is added to the later ones.
            messages: All turns.
            untrained: Indices of assistant's turns that are not trained.
            rejected: A worse last answer.

        Raises:
            TooLongError: Not even the first trained turn fits.
            DataError: The chat template refuses the turns, a text holds the end-of-turn token, or no turn is trained.
        """
        head = self._head(messages)
        turns = [*head, *messages]
        answers = [index for index, message in enumerate(turns) if message.role == "assistant"]
        trained = [index for index in answers if index - len(head) not in untrained]
        if self._train_on == "last":
            trained = [index for index in trained if index == answers[-1]]
        if not trained:
            raise DataError("none of the assistant's turns is to be trained")
        self._writer.check(turns)
        rows, last = self._encode_turns(id_, turns, trained)
        if last is None:
            raise TooLongError(f"the first answer ends after token {self._max_length}")
        example = Example(
            id=id_,
            messages=tuple(turns[:last]),
            completion=self._answer(turns[last].content),
            num_cut=len(turns) - 1 - last,
        )
        is_whole = last == len(turns) - 1
        return _tokenized(example, rows, rejected=self._answer(rejected) if is_whole and rejected else None)

    def _encode_turns(
        self, id_: str, turns: Sequence[Message], trained: Sequence[int]
    ) -> tuple[list[TokenRow], int | None]:
        """Return the rows of the trained turns that fit, and the index of the last of these turns, or None."""
        rows: list[TokenRow] = []
        last = None
        for index in trained:
            turn = self._encode_turn(turns[:index], self._answer(turns[index].content))
            if len(turn.input_ids) > self._max_length:
                break  # every later turn is longer
            row = rows[-1] if rows else None
            if row and turn.input_ids[: len(row.input_ids)] == row.input_ids:
                mask = [*row.completion_mask, *turn.completion_mask[len(row.input_ids) :]]
                rows[-1] = TokenRow(row.id, turn.input_ids, mask)
            else:
                rows.append(TokenRow(f"{id_}/{index}" if rows else id_, turn.input_ids, turn.completion_mask))
            last = index
        return rows, last

    def _encode_turn(self, prompt: Sequence[Message], answer: str) -> chat.EncodedExample:
        return chat.encode_example(self._tokenizer, prompt, answer, self._writer)

    def learn(self, conversations: Iterable[Sequence[Message]]) -> None:
        """Tokenize conversations at once, so that `encode` and the others find their pieces. This only saves time.

        Args:
            conversations: All turns of each conversation.
        """
        texts = []
        for messages in conversations:
            with suppress(FintuneError):  # `encode` raises it
                texts.append(self._writer.render([*self._head(messages), *messages], False))
        with suppress(FintuneError):
            self._writer.cache_texts(texts, num_letters=_CHARACTERS_PER_TOKEN * self._max_length)

    def _head(self, messages: Sequence[Message]) -> list[Message]:
        return [] if messages[0].role == "system" else self._system

    def encode_pair(self, id_: str, messages: Sequence[Message], rejected: str) -> TokenizedExample:
        """Encode a preference pair: one prompt with each answer. Only the last turn is trained.

        If it is too long, the oldest turns are left out; system message, question and answers never are.

        Args:
            id_: Id of the example.
            messages: All turns; the last is the chosen answer.
            rejected: The worse answer.

        Raises:
            TooLongError: Question and answers alone do not fit.
            DataError: The chat template refuses the turns, or a text holds the end-of-turn token.
        """
        chosen, worse = self._answer(messages[-1].content), self._answer(rejected)
        fitted = self._fit(messages[:-1], [chosen, worse])
        if fitted is None:
            raise TooLongError(f"the question and the longer answer have more than {self._max_length} tokens")
        prompt, num_cut, (better, other) = fitted
        row = TokenRow(id_, better.input_ids, better.completion_mask, other.input_ids[other.num_prompt_tokens :])
        example = Example(id=id_, messages=tuple(prompt), completion=chosen, num_cut=num_cut)
        return _tokenized(example, [row], rejected=worse)

    def encode_labelled(self, id_: str, messages: Sequence[Message], *, label: bool) -> TokenizedExample:
        """Encode an answer with a label. Only the last turn is trained.

        If it is too long, the oldest turns are left out; system message, question and answer never are.

        Args:
            id_: Id of the example.
            messages: All turns; the last is the answer.
            label: Whether the answer is desired.

        Raises:
            TooLongError: Question and answer alone do not fit.
            DataError: The chat template refuses the turns, or a text holds the end-of-turn token.
        """
        answer = self._answer(messages[-1].content)
        fitted = self._fit(messages[:-1], [answer])
        if fitted is None:
            raise TooLongError(f"the question and its answer have more than {self._max_length} tokens")
        prompt, num_cut, (encoded,) = fitted
        row = TokenRow(id_, encoded.input_ids, encoded.completion_mask, label=label)
        example = Example(id=id_, messages=tuple(prompt), completion=answer, num_cut=num_cut)
        return _tokenized(example, [row], label=label)

    def _fit(
        self, prompt: Sequence[Message], answers: Sequence[str]
    ) -> tuple[list[Message], int, list[chat.EncodedExample]] | None:
        """Return the longest prompt with which every answer fits, the number of turns that were cut, and the tokens."""
        turns = [*self._head(prompt), *prompt]
        self._writer.check(turns)
        num_head = int(turns[0].role == "system")
        later = (index for index, message in enumerate(turns) if message.role == "user" and index > num_head)
        for start in (num_head, *later):
            kept = [*turns[:num_head], *turns[start:]]
            encoded = [self._encode_turn(kept, answer) for answer in answers]
            if max(len(example.input_ids) for example in encoded) <= self._max_length:
                return kept, start - num_head, encoded
        return None

    def _answer(self, content: str) -> str:
        if not self._opens_thought:
            return content
        if _THOUGHT_END in content:
            return content.lstrip().removeprefix(_THOUGHT).lstrip("\n")
        return f"\n{_THOUGHT_END}\n\n{content}"  # an answer without a thought closes it at once


def _tokenized(
    example: Example, rows: Sequence[TokenRow], *, rejected: str | None = None, label: bool | None = None
) -> TokenizedExample:
    completions = [sum(row.completion_mask) for row in rows]
    counts = tuple((len(row.input_ids) - number, number) for row, number in zip(rows, completions, strict=True))
    return TokenizedExample(example, tuple(rows), counts, rejected, label)
