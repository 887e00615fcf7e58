"""Where examples come from and how they become prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fintune.config.base import Options, advanced, neutral

Shape = Literal[
    "messages", "sharegpt", "preference", "unpaired_preference", "alpaca", "question_answer", "prompt_completion"
]
"""Format of a row of a conversation source; docs/data.md describes each."""


class StatementsOptions(Options):
    """The generated pages of `data.source: builtin:statements`."""

    train_companies: int = Field(200, ge=1)
    """Number of companies whose pages are used for training."""
    eval_companies: int = Field(40, ge=1)
    """Number of companies whose pages are scored. None of them is used for training."""
    pages_per_company: int = Field(2, ge=1)
    """Pages per company."""
    questions_per_page: int = Field(2, ge=1)
    """Questions per page."""
    size: Literal["small", "full"] = "full"
    """`full`: as long as a FinQA page. `small`: a fifth of that, for a CPU."""


class SourceOptions(Options):
    """One entry of `data.sources`: rows that become conversations. A path alone is an entry, too."""

    path: str = Field(min_length=1)
    """A file (JSON, JSONL, CSV, TSV, Parquet or Arrow, plain or .gz), a folder of such files or of a saved dataset, a
    pattern such as `data/*.jsonl`, or `hub:OWNER/NAME`."""
    format: Literal["auto", Shape] = "auto"
    """Format of the rows. `auto` detects it row by row and prints what it detected."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column names of these rows by field, such as `{question: Frage, answer: qa.antwort}`."""
    header: bool = True
    """Whether the first row of a table names its columns. If not, they are `column1`, `column2` and so on."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default_factory=dict)
    """Roles by the names that these rows give them, such as `{Analyst: assistant}`."""
    instruction: str = ""
    """What is asked about each row of a labelled set (a text and a label), such as `What is the tone of this
    headline?`. The label is the answer."""
    split: str = ""
    """Split of a hub dataset, of a saved dataset, or of a folder whose files are named by splits. Default: `train` if a
    dataset has several. Of a folder, the files of other splits are held out."""
    subset: str = ""
    """Configuration of a hub dataset that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset (default: the newest)."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How often each conversation occurs in one epoch: 2 repeats every one, 0.5 uses every second one."""
    max_rows: int | None = Field(None, ge=1)
    """Use at most this many usable rows, drawn with `run.seed` (default: all)."""
    hold_out: Literal["split", "all", "none"] = "split"
    """What is held out for evaluation: `data.eval_share` of this source (`split`), all of it, or none."""
    license: str = ""
    """License, if the source does not state it, such as `CC-BY-4.0`."""


def _as_entries(value: Any) -> Any:
    entries = [value] if isinstance(value, (str, dict)) else value
    if isinstance(value, str) and not Path(value).expanduser().exists():
        # Two paths with a comma between them, unless a file has that name.
        entries = [part.strip() for part in value.split(",") if part.strip()] or [value]
    if not isinstance(entries, (list, tuple)):
        return () if entries is None else entries
    # Strict checking accepts only a tuple from Python.
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


class DataOptions(Options):
    """Where examples come from."""

    source: Literal["builtin:statements", "finqa", "chat"] = "builtin:statements"
    """`finqa`: the official JSON files `data.train` and `data.eval`. `builtin:statements`: generated pages. `chat`:
    conversations from `data.sources`."""
    sources: Annotated[tuple[SourceOptions, ...], BeforeValidator(_as_entries)] = ()
    """Sources of conversations; the last table of this page lists the keys of an entry."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column names of all sources by field, as `columns` of an entry: `data.columns.question=Frage`."""
    system: str = ""
    """System message of conversations that have none (default: the one that the model's chat template inserts, if
    any)."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation contribute to the loss."""
    eval_share: float = Field(0.02, gt=0, lt=1)
    """Share of the conversations that is held out, chosen by a hash of what comes before the first answer."""
    duplicates: Literal["near", "exact", "off"] = "near"
    """Which duplicates are dropped: `exact` ones (apart from case and white space), `near` ones as well, or none
    (`off`)."""
    near_similarity: float = advanced(0.9, gt=0, le=1)
    """Jaccard similarity of 8-letter pieces from which two conversations are near duplicates. Both their questions and
    their answers must reach it, and contain the same words and numbers."""
    train: Path | None = None
    """FinQA JSON file (plain or .gz) to train on."""
    eval: Path | None = None
    """FinQA JSON file (plain or .gz) to score on."""
    max_train_samples: int | None = Field(None, ge=1)
    """Train on at most this many examples, drawn with `run.seed` (default: all)."""
    max_eval_samples: int | None = Field(None, ge=1)
    """Score at most this many examples, drawn with `run.seed` (default: all)."""
    group_questions: int = Field(1, ge=1)
    """Train on conversations of up to this many questions about one page, which is then read once for all of them.
    Prediction always asks a single question."""
    strict: bool = False
    """Stop at the first unusable record instead of dropping and counting it."""
    num_proc: int | None = neutral(None, ge=0)
    """Processes that tokenize the data; 0 uses the main process. Default: one per core, if there is enough data to
    justify starting them."""
    statements: StatementsOptions = StatementsOptions()
    """Generated pages."""


class PromptOptions(Options):
    """How a page and a question become a prompt."""

    system: str = "Write the program that answers the question from the page."
    """System message of FinQA prompts (conversations use `data.system`). An empty one is left out."""
    max_length: int = Field(2048, ge=64)
    """Maximum tokens of prompt and completion together. The page is cut to fit, the question never is."""
