"""Tokenize FinQA records: prompt, completion and loss mask, with the page cut to fit.

FinQA asks 2.8 questions a page on average, and the page is most of an example. Questions about one page can share a row
of training tokens: the page is read once, and every program is trained. An example whose page was cut keeps a row of
its own, because the page was cut for its question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from fintune.data.tokenize import DroppedRow, TokenizedExample, TokenRow
from fintune.errors import DataError, ModelError
from fintune.finqa.page import count_edits
from fintune.finqa.prompt import QUESTION_HEADING, Built, build_messages, prompt_budget, question_line
from fintune.models import chat_template as chat
from fintune.models.chat_cache import CachedChatTokenizer
from fintune.records import Example, FinQARecord, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CACHED_LINES = 50_000
_NO_LIMIT = 1 << 62


class FinqaEncoder:
    """Tokenize records with one tokenizer.

    Args:
        tokenizer: A tokenizer with a chat template.
        system: System message; empty for none.
        max_length: Tokens of prompt and completion together, end of turn included.
        num_questions: Questions about one page that share a row at most; 1 gives every example a row of its own.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, system: str, max_length: int, num_questions: int = 1
    ) -> None:
        self._tokenizer, self._system, self._max_length = tokenizer, system, max_length
        self._num_questions = num_questions
        self._writer = CachedChatTokenizer(tokenizer, heading=QUESTION_HEADING)
        # Several questions share a page, so most lines were counted before.
        self._count = lru_cache(_CACHED_LINES)(self._count_tokens)

    def encode_pages(self, pages: Sequence[Sequence[FinQARecord]]) -> list[list[TokenizedExample | DroppedRow]]:
        """Encode the records of several pages.

        Args:
            pages: The records of each page.

        Returns:
            For each page one result a record. The rows of the page are those of its first example.

        Raises:
            ModelError: The chat template does not fit, or rewrites earlier turns though questions share a row.
        """
        return [self._encode_page(records) for records in pages]

    def _encode_page(self, records: Sequence[FinQARecord]) -> list[TokenizedExample | DroppedRow]:
        results: list[TokenizedExample | DroppedRow] = []
        shared: dict[int, tuple[FinQARecord, TokenizedExample]] = {}
        for index, record in enumerate(records):
            try:
                result = self.encode(record)
            except DataError as error:
                results.append(DroppedRow.from_error(error, id=record.id))
                continue
            results.append(result)
            if self._num_questions > 1 and not result.example.num_cut:
                shared[index] = record, result
        rows = tuple(self._join_questions(list(shared.values())))
        for index, (_, result) in shared.items():
            results[index] = result.with_rows(rows)
            rows = ()  # the first example has them all
        return [result if isinstance(result, DroppedRow) else result.compact() for result in results]

    def encode(self, record: FinQARecord) -> TokenizedExample:
        """Encode one record by itself, with its page cut to fit.

        Raises:
            TooLongError: Question and completion alone do not fit.
            DataError: The chat template refuses the turns, or a text holds the end-of-turn token.
            ModelError: The chat template does not fit.
        """
        completion = record.qa.program.strip()
        built = self._build(record, _NO_LIMIT)
        self._writer.check(built.messages)
        encoded = chat.encode_example(self._tokenizer, built.messages, completion, self._writer)
        budget = prompt_budget(self._max_length, sum(encoded.completion_mask))
        if encoded.num_prompt_tokens > budget:
            built, encoded = self._cut(record, completion, budget)
        row = TokenRow(record.id, encoded.input_ids, encoded.completion_mask)
        num_prompt = encoded.num_prompt_tokens
        return TokenizedExample(
            example=Example(id=record.id, messages=built.messages, completion=completion, num_cut=built.num_cut),
            rows=(row,),
            token_counts=((num_prompt, len(encoded.input_ids) - num_prompt),),
            kept=frozenset(unit.key for unit in built.kept),
            num_units=len(built.kept) + built.num_cut,
            cleaned=dict(count_edits(record)),
        )

    def _cut(self, record: FinQARecord, completion: str, budget: int) -> tuple[Built, chat.EncodedExample]:
        while True:
            built = self._build(record, budget)
            encoded = chat.encode_example(self._tokenizer, built.messages, completion, self._writer)
            excess = len(encoded.input_ids) - self._max_length
            if excess <= 0:
                return built, encoded
            # A tokenizer may join prompt and completion in another way than it encodes them apart.
            budget = min(budget, built.num_tokens) - excess

    def _build(self, record: FinQARecord, budget: int) -> Built:
        def count_prompt(messages: Sequence[Message]) -> int:
            return 0 if budget == _NO_LIMIT else len(chat.encode_prompt(self._tokenizer, messages, self._writer))

        return build_messages(
            record, system=self._system, budget=budget, count_tokens=self._count, count_prompt=count_prompt
        )

    def _count_tokens(self, text: str) -> int:
        # The tokenizer of the library below: for a short line, the wrapper of transformers costs more than the work.
        return len(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def _join_questions(self, members: Sequence[tuple[FinQARecord, TokenizedExample]]) -> Iterator[TokenRow]:
        """Yield the rows of a page. A row is full at `num_questions`, or when the next question does not fit."""
        ids: list[str] = []
        messages: list[Message] = []
        row: TokenRow | None = None
        for record, result in members:
            answer = Message(role="assistant", content=result.example.completion)
            if row is not None and len(ids) < self._num_questions:
                question = Message(role="user", content=question_line(record.qa.question))
                longer = self._extend(row, [*messages, question], answer.content)
                if len(longer.input_ids) <= self._max_length:
                    ids, messages, row = [*ids, record.id], [*messages, question, answer], longer
                    continue
            if row is not None:
                yield TokenRow(" ".join(ids), row.input_ids, row.completion_mask)
            ids, messages, row = [record.id], [*result.example.messages, answer], result.rows[0]
        if row is not None:
            yield TokenRow(" ".join(ids), row.input_ids, row.completion_mask)

    def _extend(self, row: TokenRow, messages: Sequence[Message], completion: str) -> TokenRow:
        """Add one question and its answer to a row."""
        self._writer.check([*messages, Message(role="assistant", content=completion)])
        longer = chat.encode_example(self._tokenizer, messages, completion, self._writer)
        size = len(row.input_ids)
        if longer.input_ids[:size] != row.input_ids:
            raise ModelError(
                f"the chat template of {self._tokenizer.name_or_path} rewrites earlier turns",
                hint="it cannot train several turns at once; set data.group_questions to 1",
            )
        return TokenRow(row.id, longer.input_ids, [*row.completion_mask, *longer.completion_mask[size:]])
