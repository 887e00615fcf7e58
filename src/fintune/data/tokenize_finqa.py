"""FinQA records to tokenised examples: prompt, completion, loss mask, and what of the page was cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from fintune.errors import DataError
from fintune.finqa.prompt import Built, TooLongError, build_messages, prompt_budget
from fintune.models import chat_template as chat
from fintune.models.chat_cache import CachedChatTokenizer
from fintune.records import Example, FinQARecord, Message
from fintune.util.console import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CACHED_LINES = 50_000


@dataclass(frozen=True)
class EncodedRecord:
    """A record as a model will see it.

    Attributes:
        record: Where it comes from.
        example: Prompt and completion.
        input_ids: Prompt, completion, end-of-turn token; shape [num_tokens].
        completion_mask: 1 where the token is trained; same length.
        kept: Keys of the page's units that the prompt holds (``text_3``, ``table_1``).
        num_units: Units of the whole page.
    """

    record: FinQARecord
    example: Example
    input_ids: list[int]
    completion_mask: list[int]
    kept: frozenset[str]
    num_units: int

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the first trained one."""
        return self.completion_mask.index(1)


@dataclass(frozen=True)
class EncodedSplit:
    """The examples of a split.

    Attributes:
        examples: In the order of the records.
        dropped: Records that became no example, by reason.
        problems: One line for each of them.
        failed: Each with its id.
    """

    examples: list[EncodedRecord]
    dropped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    failed: list[tuple[str, DataError]] = field(default_factory=list)


class Encoder:
    """Makes examples with one tokenizer.

    Args:
        tokenizer: With a chat template.
        system: System message; none where empty.
        max_length: Tokens of prompt and completion together, end of turn included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, system: str, max_length: int) -> None:
        self._tokenizer, self._system, self.max_length = tokenizer, system, max_length
        self._writer = CachedChatTokenizer(tokenizer)  # a page is measured, encoded as a prompt and with its completion
        # Several questions share a page, so most lines were counted before.
        self._count = lru_cache(_CACHED_LINES)(self._count_tokens)

    def split(self, records: Sequence[FinQARecord], name: str, *, strict: bool = False) -> EncodedSplit:
        """Encode all records, with a progress bar.

        Args:
            records: Of one split.
            name: The split's, for the bar and messages.
            strict: Stop at the first record that cannot be encoded instead of dropping and counting it.

        Raises:
            DataError: No record can be encoded, or, with ``strict``, one cannot.
        """
        examples: list[EncodedRecord] = []
        dropped: Counter[str] = Counter()
        problems: list[str] = []
        failed: list[tuple[str, DataError]] = []
        for record in track(records, f"encode {name}", len(records)):
            try:
                examples.append(self.encode(record))
            except DataError as error:
                told = DataError(error.message, record_id=record.id)
                if strict:
                    told.hint = error.hint
                    raise told from None
                dropped["too long" if isinstance(error, TooLongError) else "not encodable"] += 1
                problems.append(f"{name}: {told}")
                failed.append((record.id, error))
        if not examples:
            first = problems[0] if problems else "there is none"
            raise DataError(
                f"none of {len(records)} {name} records fits {self.max_length} tokens or can be encoded; {first}",
                hint="raise prompt.max_length" if dropped["too long"] else None,
            )
        return EncodedSplit(examples, dropped, problems, failed)

    def encode(self, record: FinQARecord) -> EncodedRecord:
        """Encode one record, its page cut to fit.

        Raises:
            TooLongError: Question and completion alone do not fit.
            DataError: The chat template refuses the turns, or the program holds the end-of-turn token.
        """
        completion = record.qa.program.strip()
        alone = [Message(role="user", content=record.qa.question)]
        self._writer.check(alone)
        num_completion = sum(chat.encode_example(self._tokenizer, alone, completion, self._writer).completion_mask)
        budget = prompt_budget(self.max_length, num_completion)
        while True:
            built = self._build(record, budget)
            encoded = chat.encode_example(self._tokenizer, built.messages, completion, self._writer)
            excess = len(encoded.input_ids) - self.max_length
            if excess <= 0:
                break
            # A tokenizer may join prompt and completion in another way than it encodes them apart.
            budget = min(budget, built.num_tokens) - excess
        return EncodedRecord(
            record=record,
            example=Example(id=record.id, messages=built.messages, completion=completion, num_cut=built.num_cut),
            input_ids=encoded.input_ids,
            completion_mask=encoded.completion_mask,
            kept=frozenset(unit.key for unit in built.kept),
            num_units=len(built.kept) + built.num_cut,
        )

    def _build(self, record: FinQARecord, budget: int) -> Built:
        return build_messages(
            record,
            system=self._system,
            budget=budget,
            count_tokens=self._count,
            count_prompt=lambda messages: len(chat.encode_prompt(self._tokenizer, messages, self._writer)),
        )

    def _count_tokens(self, text: str) -> int:
        # The Rust tokenizer without transformers' wrapping, which costs more than the work itself on a short line.
        return len(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
