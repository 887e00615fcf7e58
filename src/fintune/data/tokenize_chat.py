"""Conversations of the data as rows of training tokens: what is trained, what is cut, templates with thoughts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fintune.data.rows_of_tokens import Sequenced
from fintune.errors import DataError, FintuneError
from fintune.finqa.prompt import TooLongError
from fintune.models import chat_template as chat
from fintune.models.chat_cache import CachedChatTokenizer
from fintune.records import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THOUGHT, _THOUGHT_END = "<think>", "</think>"
_LETTERS_A_TOKEN = 6
"""More than most tokens have: so much of a long conversation is tokenised at once, and the rest where it is needed."""


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation of the data as a model will see it.

    Attributes:
        example: The last trained turn and what comes before it; ``num_cut`` counts the turns behind it, left out.
        rows: One, or one for each trained turn where the chat template rewrites earlier turns.
        rejected: The worse answer in the completion's place, of a preference pair.
        label: Whether the completion is desired, of a labelled answer.
    """

    example: Example
    rows: list[Sequenced]
    rejected: str | None = None
    label: bool | None = None


class ConversationEncoder:
    """Makes rows of conversations with one tokenizer.

    Args:
        tokenizer: With a chat template.
        system: System message of conversations that have none; where empty, the chat template's own, if it has one.
        train_on: All of the assistant's turns, or the last.
        max_length: Tokens of a row; turns that do not fit are left out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, system: str, train_on: Literal["all", "last"], max_length: int
    ) -> None:
        self._tokenizer, self._train_on, self._max_length = tokenizer, train_on, max_length
        self._writer = CachedChatTokenizer(tokenizer)
        self._system = [Message(role="system", content=system)] if system else []
        asked = chat.render(tokenizer, [Message(role="user", content="question")])
        # Such a template (DeepSeek-R1's) has every answer begin inside a thought.
        self._opens_thought = asked.rstrip().endswith(_THOUGHT)

    def encode(
        self,
        id_: str,
        messages: Sequence[Message],
        *,
        untrained: Collection[int] = (),
        rejected: str | None = None,
    ) -> EncodedConversation:
        """Encode one conversation, which ends with the assistant.

        Args:
            id_: Of the example; rows of single turns have the turn's place behind it.
            messages: All turns.
            untrained: Places of assistant's turns that are not trained.
            rejected: A worse last answer.

        Raises:
            TooLongError: Not even the first trained turn fits.
            DataError: The chat template refuses the turns, a text holds the end-of-turn token, nothing is trained.
        """
        before = self._head(messages)
        turns = [*before, *messages]
        answers = [place for place, each in enumerate(turns) if each.role == "assistant"]
        trained = [place for place in answers if place - len(before) not in untrained]
        if self._train_on == "last":
            trained = [place for place in trained if place == answers[-1]]
        if not trained:
            raise DataError("none of the assistant's turns is to be trained")
        self._writer.check(turns)
        rows, last = self._rows(id_, turns, trained)
        if last is None:
            raise TooLongError(f"the first answer ends behind token {self._max_length}")
        example = Example(
            id=id_,
            messages=tuple(turns[:last]),
            completion=self._answer(turns[last].content),
            num_cut=len(turns) - 1 - last,
        )
        whole = rejected is not None and last == len(turns) - 1
        return EncodedConversation(example, rows, self._answer(rejected) if whole and rejected else None)

    def _rows(self, id_: str, turns: Sequence[Message], trained: Sequence[int]) -> tuple[list[Sequenced], int | None]:
        """The rows of the trained turns that fit, and the place of the last of these; None where none does."""
        rows: list[Sequenced] = []
        last = None
        for place in trained:
            turn = self._turn(turns[:place], self._answer(turns[place].content))
            if len(turn.input_ids) > self._max_length:
                break  # every later turn is longer
            before_it = rows[-1] if rows else None
            if before_it and turn.input_ids[: len(before_it.input_ids)] == before_it.input_ids:
                rest = turn.completion_mask[len(before_it.input_ids) :]
                rows[-1] = Sequenced(before_it.id, turn.input_ids, before_it.completion_mask + rest)
            else:
                rows.append(Sequenced(f"{id_}/{place}" if rows else id_, turn.input_ids, turn.completion_mask))
            last = place
        return rows, last

    def _turn(self, prompt: Sequence[Message], answer: str) -> chat.EncodedExample:
        return chat.encode_example(self._tokenizer, prompt, answer, self._writer)

    def learn(self, conversations: Iterable[Sequence[Message]]) -> None:
        """Tokenise conversations at once, which `encode` and the others then take apart; it only saves time.

        Args:
            conversations: All turns of each.
        """
        texts = []
        for messages in conversations:
            with suppress(FintuneError):  # told by `encode`
                texts.append(self._writer.render([*self._head(messages), *messages], False))
        with suppress(FintuneError):
            self._writer.cache_texts(texts, num_letters=_LETTERS_A_TOKEN * self._max_length)

    def _head(self, messages: Sequence[Message]) -> list[Message]:
        return [] if messages[0].role == "system" else self._system

    def encode_pair(self, id_: str, messages: Sequence[Message], rejected: str) -> EncodedConversation:
        """Encode a preference pair: both answers behind the same prompt, of which the last turn alone is trained.

        Where it is too long, the oldest turns go; system message, question and answers never do.

        Args:
            id_: Of the example.
            messages: All turns; the last is the chosen answer.
            rejected: The worse answer.

        Raises:
            TooLongError: Question and answers alone do not fit.
            DataError: The chat template refuses the turns, or a text holds the end-of-turn token.
        """
        chosen, worse = self._answer(messages[-1].content), self._answer(rejected)
        fitted = self._fitted(messages[:-1], [chosen, worse])
        if fitted is None:
            raise TooLongError(f"the question and the longer answer have more than {self._max_length} tokens")
        prompt, num_cut, (better, other) = fitted
        row = Sequenced(id_, better.input_ids, better.completion_mask, other.input_ids[other.num_prompt_tokens :])
        example = Example(id=id_, messages=tuple(prompt), completion=chosen, num_cut=num_cut)
        return EncodedConversation(example, [row], rejected=worse)

    def encode_labelled(self, id_: str, messages: Sequence[Message], *, label: bool) -> EncodedConversation:
        """Encode an answer that is desired or not; the last turn alone is trained.

        Where it is too long, the oldest turns go; system message, question and answer never do.

        Args:
            id_: Of the example.
            messages: All turns; the last is the answer.
            label: Whether it is desired.

        Raises:
            TooLongError: Question and answer alone do not fit.
            DataError: The chat template refuses the turns, or a text holds the end-of-turn token.
        """
        answer = self._answer(messages[-1].content)
        fitted = self._fitted(messages[:-1], [answer])
        if fitted is None:
            raise TooLongError(f"the question and its answer have more than {self._max_length} tokens")
        prompt, num_cut, (encoded,) = fitted
        row = Sequenced(id_, encoded.input_ids, encoded.completion_mask, label=label)
        example = Example(id=id_, messages=tuple(prompt), completion=answer, num_cut=num_cut)
        return EncodedConversation(example, [row], label=label)

    def _fitted(
        self, before: Sequence[Message], answers: Sequence[str]
    ) -> tuple[list[Message], int, list[chat.EncodedExample]] | None:
        """The longest prompt behind which every answer fits, the turns that it lacks, and prompt with each answer."""
        turns = [*self._head(before), *before]
        self._writer.check(turns)
        num_head = int(turns[0].role == "system")
        later = (place for place, each in enumerate(turns) if each.role == "user" and place > num_head)
        for start in (num_head, *later):
            prompt = [*turns[:num_head], *turns[start:]]
            encoded = [self._turn(prompt, answer) for answer in answers]
            if max(len(each.input_ids) for each in encoded) <= self._max_length:
                return prompt, start - num_head, encoded
        return None

    def _answer(self, content: str) -> str:
        if not self._opens_thought:
            return content
        if _THOUGHT_END in content:
            return content.lstrip().removeprefix(_THOUGHT).lstrip("\n")
        return f"\n{_THOUGHT_END}\n\n{content}"  # an answer without a thought closes it at once
