"""Where examples come from and how they become prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fintune.config.base import Options, neutral

Shape = Literal[
    "messages", "sharegpt", "preference", "unpaired_preference", "alpaca", "question_answer", "prompt_completion"
]
"""What a row of a conversation source looks like; see docs/data.md."""


class StatementsOptions(Options):
    """The generated pages of `data.source: builtin:statements`."""

    train_companies: int = Field(200, ge=1, description="Companies whose pages are trained on.")
    eval_companies: int = Field(40, ge=1, description="Companies whose pages are scored; none of them is trained on.")
    pages_per_company: int = Field(2, ge=1, description="Pages a company.")
    questions_per_page: int = Field(2, ge=1, description="Questions a page.")
    size: Literal["small", "full"] = Field(
        "full", description="`full`: as long as FinQA's pages; `small`: a fifth, for a CPU."
    )


class SourceOptions(Options):
    """An entry of `data.sources`: rows that become conversations. A path alone may stand for it."""

    path: str = Field(
        min_length=1,
        description="File (JSON, JSONL, CSV, TSV, Parquet, plain or .gz), folder of such files or of a saved dataset, "
        "pattern such as `data/*.jsonl`, or `hub:OWNER/NAME`.",
    )
    format: Literal["auto", Shape] = Field(
        "auto", description="What a row looks like; `auto` finds it out row by row and prints what it found."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Names of a shape's fields in these rows, as `{question: Frage, answer: qa.antwort}`.",
    )
    split: str = Field("", description="Split of a hub dataset or saved dataset; `train` where it has several.")
    subset: str = Field("", description="Configuration of a hub dataset that has several.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub dataset; its newest where empty.")
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="How often a conversation stands in one pass of training: 2 takes each twice, 0.5 every other one.",
    )
    max_rows: int | None = Field(
        None, ge=1, description="Take at most so many usable rows, drawn with `run.seed`; all where empty."
    )
    hold_out: Literal["split", "all", "none"] = Field(
        "split", description="What is kept for evaluation: `data.eval_share` of it, all or nothing."
    )
    license: str = Field("", description="Its licence, where the source does not say it, as `CC-BY-4.0`.")


def _paths_alone(value: Any) -> Any:
    # A tuple, because that is what strict checking takes from Python.
    entries = _several(value) if isinstance(value, str) else [value] if isinstance(value, dict) else value
    if not isinstance(entries, (list, tuple)):
        return () if entries is None else entries
    return tuple({"path": each} if isinstance(each, str) else each for each in entries)


def _several(text: str) -> list[str]:
    """``a.csv,b.jsonl`` as two paths, where no file is called so."""
    parts = [each.strip() for each in text.split(",") if each.strip()]
    return parts if len(parts) > 1 and not Path(text).expanduser().exists() else [text]


class DataOptions(Options):
    """Where examples come from."""

    source: Literal["builtin:statements", "finqa", "chat"] = Field(
        "builtin:statements",
        description="`finqa`: the official JSON of `data.train` and `data.eval`; `builtin:statements`: generated; "
        "`chat`: conversations from `data.sources`.",
    )
    sources: Annotated[tuple[SourceOptions, ...], BeforeValidator(_paths_alone)] = Field(
        (), description="Where conversations come from; see the last table of this page."
    )
    system: str = Field(
        "",
        description="System message of conversations that have none; where empty, what the model's chat template puts "
        "there itself, if anything.",
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="Which of the assistant's turns of a conversation are trained."
    )
    eval_share: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="Share of the conversations that is held out, chosen by a hash of the first question.",
    )
    duplicates: Literal["near", "exact", "off"] = Field(
        "near",
        description="What is left out: `exact` copies but for case and white space, or `near` ones as well.",
    )
    near_similarity: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Conversations are near duplicates when their questions, and their answers, share so much of their "
        "8-letter pieces (Jaccard) and hold the same numbers.",
    )
    train: Path | None = Field(None, description="FinQA JSON (plain or .gz) to train on.")
    eval: Path | None = Field(None, description="FinQA JSON (plain or .gz) to score on.")
    max_train_samples: int | None = Field(
        None, ge=1, description="Train on at most so many examples, drawn with `run.seed`; all where empty."
    )
    max_eval_samples: int | None = Field(
        None, ge=1, description="Score at most so many examples, drawn with `run.seed`; all where empty."
    )
    group_questions: int = Field(
        1,
        ge=1,
        description="Train on conversations of up to so many questions about one page, which is then read once for all "
        "of them. Prediction always asks a single question.",
    )
    strict: bool = Field(
        False, description="Stop at the first record that cannot be used instead of dropping and counting it."
    )
    num_proc: int | None = neutral(
        None,
        "Processes that tokenize the data; 0 tokenizes in the main process. Where empty, as many as there are cores, "
        "if there is enough data to be worth their start.",
        ge=0,
    )
    statements: StatementsOptions = Field(default_factory=StatementsOptions, description="Generated pages.")

    @model_validator(mode="after")
    def _files_are_named(self) -> DataOptions:
        if self.source == "finqa" and (self.train is None or self.eval is None):
            raise ValueError("data.source: finqa needs data.train and data.eval; set both to FinQA JSON files")
        if self.source == "chat" and not self.sources:
            raise ValueError(
                "data.source: chat needs data.sources; set it to a list of files, folders or hub:OWNER/NAME"
            )
        if self.source != "chat" and self.sources:
            raise ValueError(f"data.sources is not read with data.source: {self.source}; set data.source: chat")
        return self


class PromptOptions(Options):
    """How a page and a question become a prompt."""

    system: str = Field(
        "Write the program that answers the question from the page.",
        description="System message; an empty one is left out.",
    )
    max_length: int = Field(
        2048,
        ge=64,
        description="Tokens of prompt and completion together; the page is cut to fit, the question never is.",
    )
