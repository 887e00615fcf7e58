"""Tokenize conversations: which turns are trained, what is cut to fit, and what chat templates make of them.

A row is the template's own rendering of the conversation up to a trained answer. Where it cannot be, or where the
template leaves something out, the example has a note, which the report counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from fintune.data.formats import Conversation
from fintune.data.objective_filter import RowKind
from fintune.data.tokenize import DroppedRow, TokenizedExample, TokenRow
from fintune.errors import DataError
from fintune.finqa.prompt import TooLongError
from fintune.models import chat_template as chat
from fintune.models.chat_cache import CachedChatTokenizer
from fintune.records import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS_PER_TOKEN = 6
"""More than most tokens have. This much of a long conversation is tokenized at once, and the rest if it is needed."""
OTHER_RENDERING = "not the chat template's own rendering: it removes or rewrites what its prompt begins with"
FOLDED = "with the system message in the first user turn: the chat template leaves system messages out"
HIDDEN_THOUGHT = "with a thought of an earlier answer that the chat template removes"


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
        self._system = Message(role="system", content=system) if system else None
        self._folds_system = chat.drops_system(tokenizer)

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
            return DroppedRow.from_error(error, file=row.file, row=row.row)

    def encode(
        self,
        id_: str,
        messages: Sequence[Message],
        *,
        untrained: Collection[int] = (),
        rejected: Message | None = None,
    ) -> TokenizedExample:
        """Encode one conversation, which ends with the assistant.

        Args:
            id_: Id of the example. If it has several rows, the index of the turn is added to the later ones.
            messages: All turns.
            untrained: Indices of assistant's turns that are not trained.
            rejected: A worse last answer.

        Raises:
            TooLongError: Not even the first trained turn fits.
            DataError: The chat template refuses the turns or leaves one out, a text holds a special token, or no turn
                is trained.
        """
        turns = self._with_head(messages)
        shift = len(turns) - len(messages)
        answers = [index for index, message in enumerate(turns) if message.role == "assistant"]
        trained = [index for index in answers if index - shift not in untrained]
        if self._train_on == "last":
            trained = [index for index in trained if index == answers[-1]]
        if not trained:
            raise DataError("none of the assistant's turns is to be trained")
        self._writer.check(turns)
        rows, encoded = self._encode_turns(id_, turns, trained)
        if not encoded:
            raise TooLongError(f"the first answer ends after token {self._max_length}")
        last = trained[len(encoded) - 1]
        worse = None
        if rejected is not None and last == len(turns) - 1:
            worse = self._encode_turn(turns[:last], rejected).completion
        example = _example(id_, turns[:last], turns[last], encoded[-1], num_cut=len(turns) - 1 - last)
        notes = self._notes(messages, turns[:last], encoded, trained)
        return _tokenized(example, rows, notes, rejected=worse)

    def _encode_turns(
        self, id_: str, turns: Sequence[Message], trained: Sequence[int]
    ) -> tuple[list[TokenRow], list[chat.EncodedExample]]:
        """Return the rows of the trained turns that fit, and these turns as they were encoded."""
        rows: list[TokenRow] = []
        encoded = []
        for index in trained:
            turn = self._encode_turn(turns[:index], turns[index])
            if len(turn.input_ids) > self._max_length:
                break  # every later turn is longer
            row = rows[-1] if rows else None
            if row and turn.input_ids[: len(row.input_ids)] == row.input_ids:
                mask = [*row.completion_mask, *turn.completion_mask[len(row.input_ids) :]]
                rows[-1] = TokenRow(row.id, turn.input_ids, mask)
            else:
                rows.append(TokenRow(f"{id_}/{index}" if rows else id_, turn.input_ids, turn.completion_mask))
            encoded.append(turn)
        return rows, encoded

    def _encode_turn(
        self, prompt: Sequence[Message], answer: Message, *, thinking: bool | None = None
    ) -> chat.EncodedExample:
        return chat.encode_example(self._tokenizer, prompt, answer, self._writer, thinking=thinking)

    def learn(self, conversations: Iterable[Sequence[Message]]) -> None:
        """Tokenize conversations at once, so that `encode` and the others find their pieces. This only saves time.

        Args:
            conversations: All turns of each conversation.
        """
        heads = [self._with_head(messages) for messages in conversations]
        self._writer.learn(heads, num_letters=_CHARACTERS_PER_TOKEN * self._max_length)

    def _with_head(self, messages: Sequence[Message]) -> list[Message]:
        """Return the turns with a system message, where the template shows it."""
        turns = list(messages)
        if turns[0].role != "system" and self._system:
            tools = turns[0].tools
            turns = chat.with_tools([self._system, *chat.with_tools(turns, None)], tools)
        return chat.fold_system(turns) if turns[0].role == "system" and self._folds_system else turns

    def _notes(
        self,
        messages: Sequence[Message],
        prompt: Sequence[Message],
        encoded: Sequence[chat.EncodedExample],
        trained: Sequence[int],
    ) -> tuple[str, ...]:
        """Return what the template made of a prompt.

        Raises:
            DataError: It leaves out the text of a turn.
        """
        notes = [] if all(turn.follows_template for turn in encoded) else [OTHER_RENDERING]
        if self._folds_system and (self._system or messages[0].role == "system"):
            notes.append(FOLDED)
        text = encoded[-1].prompt
        for index, message in enumerate(prompt):
            if what := chat.find_left_out(text, message):
                why = f"the chat template leaves out the {what} of turn {index + 1}, the {message.role}'s"
                raise DataError(why, hint="remove it, or use a model whose template knows it")
            if message.role == "assistant" and index not in trained and HIDDEN_THOUGHT not in notes:
                thought = chat.split_thought(message)[0]
                notes += [HIDDEN_THOUGHT] if thought.strip() and thought.strip() not in text else []
        return tuple(notes)

    def encode_pair(self, id_: str, messages: Sequence[Message], rejected: Message) -> TokenizedExample:
        """Encode a preference pair: one prompt with each answer. Only the last turn is trained.

        If it is too long, the oldest turns are left out; system message, question and answers never are.

        Args:
            id_: Id of the example.
            messages: All turns; the last is the chosen answer.
            rejected: The worse answer.

        Raises:
            TooLongError: Question and answers alone do not fit.
            DataError: The chat template refuses the turns or leaves one out, a text holds a special token, or only one
                of the answers has a thought and the template asks for it in the prompt.
        """
        prompt, num_cut, (better, worse) = self._fit(
            messages, [messages[-1], rejected], "the question and the longer answer have"
        )
        if better.input_ids[: better.num_prompt_tokens] != worse.input_ids[: worse.num_prompt_tokens]:
            hint = "give both answers a thought, or neither"
            raise DataError("one answer has a thought and the other has none, so their prompts differ", hint=hint)
        row = TokenRow(id_, better.input_ids, better.completion_mask, worse.input_ids[worse.num_prompt_tokens :])
        example = _example(id_, prompt, messages[-1], better, num_cut=num_cut)
        notes = self._notes(messages, prompt, [better, worse], ())
        return _tokenized(example, [row], notes, rejected=worse.completion)

    def encode_labelled(self, id_: str, messages: Sequence[Message], *, label: bool) -> TokenizedExample:
        """Encode an answer with a label. Only the last turn is trained.

        If it is too long, the oldest turns are left out; system message, question and answer never are.

        Args:
            id_: Id of the example.
            messages: All turns; the last is the answer.
            label: Whether the answer is desired.

        Raises:
            TooLongError: Question and answer alone do not fit.
            DataError: The chat template refuses the turns or leaves one out, or a text holds a special token.
        """
        prompt, num_cut, (encoded,) = self._fit(messages, [messages[-1]], "the question and its answer have")
        row = TokenRow(id_, encoded.input_ids, encoded.completion_mask, label=label)
        example = _example(id_, prompt, messages[-1], encoded, num_cut=num_cut)
        return _tokenized(example, [row], self._notes(messages, prompt, [encoded], ()), label=label)

    def _fit(
        self, messages: Sequence[Message], answers: Sequence[Message], what: str
    ) -> tuple[list[Message], int, list[chat.EncodedExample]]:
        """Return the longest prompt with which every answer fits, the number of turns that were cut, and the tokens."""
        turns = self._with_head(messages)[:-1]
        self._writer.check(turns)
        num_head = int(turns[0].role == "system") if turns else 0
        thinking = any(chat.split_thought(answer)[0] for answer in answers)  # one prompt for both answers of a pair
        later = (index for index, message in enumerate(turns) if message.role == "user" and index > num_head)
        for start in (num_head, *later):
            kept = [*turns[:num_head], *turns[start:]]
            kept = chat.with_tools(kept, turns[0].tools) if kept else kept
            encoded = [self._encode_turn(kept, answer, thinking=thinking) for answer in answers]
            if max(len(example.input_ids) for example in encoded) <= self._max_length:
                return kept, start - num_head, encoded
        raise TooLongError(f"{what} more than {self._max_length} tokens")


def _example(
    id_: str, prompt: Sequence[Message], answer: Message, encoded: chat.EncodedExample, *, num_cut: int
) -> Example:
    """Return the example of an encoded answer, from which the same tokens can be encoded again."""
    has_more = bool(answer.tool_calls or chat.split_thought(answer)[0])
    is_text = encoded.follows_template and not has_more
    completion = answer.content if is_text else encoded.completion
    turn = answer if has_more else None
    return Example(id=id_, messages=tuple(prompt), completion=completion, num_cut=num_cut, turn=turn)


def _tokenized(
    example: Example,
    rows: Sequence[TokenRow],
    notes: tuple[str, ...],
    *,
    rejected: str | None = None,
    label: bool | None = None,
) -> TokenizedExample:
    completions = [sum(row.completion_mask) for row in rows]
    counts = tuple((len(row.input_ids) - number, number) for row, number in zip(rows, completions, strict=True))
    return TokenizedExample(example, tuple(rows), counts, rejected, label, notes=notes)
