"""Everything that crosses a file border, as frozen pydantic models: what is read is checked, all is written."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Record(BaseModel):
    """Base of all records: immutable; unknown keys are refused unless a subclass says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def _text_or_number(value: Any) -> Any:
    # Some copies of FinQA hold exe_ans of yes/no questions as strings and all others as numbers; bool is neither.
    if isinstance(value, bool):
        raise ValueError("exe_ans must be a number, 'yes' or 'no'")
    return value


class FinQAQuestion(Record):
    """The ``qa`` object of a FinQA record (github.com/czyssrs/FinQA); further official keys are ignored.

    Attributes:
        program: Linear form, ``subtract(5829, 5735), divide(#0, 5735)``.
        program_re: The same program nested, or None.
        exe_ans: What the program executes to, rounded to 5 decimals; "yes" or "no" for ``greater``.
        gold_inds: Evidence, ``{"table_1": row text, "text_3": sentence}``; None where not known.
        answer: The annotator's free-text answer; never used by the official score.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    question: str
    program: str
    program_re: str | None = None
    exe_ans: Annotated[float | str, BeforeValidator(_text_or_number)]
    gold_inds: dict[str, str] | None = None
    answer: str | None = None


class FinQARecord(Record):
    """A report page with one question, in the official schema.

    Attributes:
        id: ``COMPANY/YEAR/page_N.pdf-K``.
        pre_text: Sentences before the table.
        post_text: Sentences after the table.
        table: Rows of cells, row 0 is the header; cell 0 of a row is its name.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    pre_text: tuple[str, ...]
    post_text: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]
    qa: FinQAQuestion


class Example(Record):
    """One prompt and the completion that a model should give to it.

    Attributes:
        messages: The turns before the completion; the last is the user's.
        completion: The assistant's turn, without template tokens.
        num_cut: Units of the page (sentences, table rows) that were left out to fit the context.
    """

    id: str
    messages: tuple[Message, ...]
    completion: str
    num_cut: int = 0


class Pair(Record):
    """One prompt with a better and a worse answer, for preference training.

    Attributes:
        messages: The turns before the answer; the last is the user's.
        chosen: The better one, without template tokens.
        rejected: The worse one.
    """

    id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str


class LabelledAnswer(Record):
    """One prompt with one answer that is desired or not, for preference training without pairs.

    Attributes:
        messages: The turns before the answer; the last is the user's.
        completion: The answer, without template tokens.
        label: Whether it is desired.
    """

    id: str
    messages: tuple[Message, ...]
    completion: str
    label: bool


class Candidate(Record):
    """One of several completions of a prompt.

    Attributes:
        program: The program read from it.
        logprob: See `Prediction`.
        result: What the program executes to, rounded as officially; None where it does not run.
        num_tokens: Generated tokens.
    """

    program: str
    logprob: float | None
    result: float | str | None
    num_tokens: int


class Prediction(Record):
    """What an engine gave for one prompt.

    Attributes:
        text: The completion as decoded, special tokens removed.
        program: The program read from it, in linear form ("" where there is none).
        finish_reason: "stop" when the end-of-turn token came, "length" when the limit did.
        seconds: Share of the batch's wall time.
        num_prompt_tokens: Length of the rendered prompt.
        token_ids: Generated tokens, end-of-turn included.
        margins: For each generated token the natural-log probability gap between the best and the second-best
            token; a small gap marks a near-tie, at which two faithful copies of a model may part.
        logprob: Natural-log probability of the whole completion in the model's own distribution (before temperature,
            top_p and grammar); None where the engine does not tell it.
        confidence: The share of the candidates that agree on the result where they voted, else the probability of the
            completion; None where neither is known.
        candidates: All completions of the prompt where there were several.
    """

    id: str
    text: str
    program: str
    finish_reason: Literal["stop", "length"]
    seconds: float
    num_prompt_tokens: int
    token_ids: tuple[int, ...] = ()
    margins: tuple[float, ...] = ()
    logprob: float | None = None
    confidence: float | None = None
    candidates: tuple[Candidate, ...] = ()
