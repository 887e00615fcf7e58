"""The records that are written to files and read back, as frozen pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Record(BaseModel):
    """Base of all records: immutable, without unknown keys unless a subclass allows them."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(Record):
    """One turn of a conversation. Fields that are None are not written.

    Attributes:
        content: The text; empty for a turn that only calls tools.
        reasoning_content: The assistant's thought before the text.
        tool_calls: Calls as ``{"type": "function", "function": {"name", "arguments"}}``.
        tool_call_id: For a tool's result, the id of its call.
        name: For a tool's result, the tool's name.
        tools: The tools that the conversation offers, in the form of chat templates. Only its first turn has them.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None

    @model_serializer
    def as_dict(self) -> dict[str, Any]:
        """Return the turn as chat templates and servers take it, without what is None."""
        return {name: value for name, value in vars(self).items() if value is not None}


def _text_or_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("exe_ans must be a number, 'yes' or 'no'")
    return value


class FinQAQuestion(Record):
    """The ``qa`` object of a FinQA record (github.com/czyssrs/FinQA). Its other official keys are ignored.

    Attributes:
        program: The program in linear form, ``subtract(5829, 5735), divide(#0, 5735)``.
        program_re: The same program in nested form, or None.
        exe_ans: The result of the program, rounded to 5 decimals; "yes" or "no" for ``greater``.
        gold_inds: The evidence, ``{"table_1": row text, "text_3": sentence}``; None if unknown.
        answer: The annotator's answer in free text. The official score never uses it.
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
        table: Rows of cells. Row 0 is the header, and cell 0 of a row is its name.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    pre_text: tuple[str, ...]
    post_text: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]
    qa: FinQAQuestion


class Example(Record):
    """One prompt and its completion.

    Attributes:
        messages: The turns before the completion; the last is the user's.
        completion: The assistant's turn, without template tokens.
        num_cut: Units of the page (sentences, table rows), or turns, that were left out to fit the context.
        turn: The assistant's turn if it has a thought or calls tools, for the chat template. It is not written if None.
    """

    id: str
    messages: tuple[Message, ...]
    completion: str
    num_cut: int = 0
    turn: Message | None = None

    @property
    def answer(self) -> str | Message:
        """What is encoded after the messages."""
        return self.turn or self.completion

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}


class Pair(Record):
    """One prompt (the turns before the answer) with a better and a worse answer, for preference training."""

    id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str


class LabelledAnswer(Record):
    """One prompt with one answer, and whether the answer is desired, for preference training without pairs."""

    id: str
    messages: tuple[Message, ...]
    completion: str
    label: bool


class Candidate(Record):
    """One of several completions of a prompt; ``result`` is rounded as in the official script, or None."""

    program: str
    logprob: float | None
    result: float | str | None
    num_tokens: int


class Prediction(Record):
    """The answer of a model to one prompt.

    Attributes:
        text: The decoded completion, without special tokens.
        program: The program in it, in linear form; empty if there is none.
        finish_reason: "stop" if the end-of-turn token was generated, "length" if the token limit was reached.
        seconds: Share of the batch's wall time.
        num_prompt_tokens: Tokens of the rendered prompt.
        token_ids: Generated tokens, end of turn included.
        margins: For each generated token, the gap between the natural-log probabilities of the best and the second-best
            token. A small gap marks a near-tie, at which two faithful copies of a model may differ.
        logprob: Natural-log probability of the whole completion in the model's own distribution (before temperature,
            top_p and grammar); None if the engine does not report it.
        confidence: If candidates voted, the share of them that agree on the result; else the probability of the
            completion; None if neither is known.
        candidates: All completions of the prompt, if there were several.
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
