"""Every option of a run, written once: its name, type, default, unit and meaning.

The YAML file, ``key=value`` overrides, ``fintune config show``, the manifest of each stage and ``docs/options.md`` all
come from these fields. An option marked with :func:`neutral` cannot change a result (threads, how often to log); it is
left out of the fingerprint that decides whether a stage is up to date.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

ModelKind = Literal["base", "adapter", "merged", "F16", "Q4_K_M", "endpoint"]
Shape = Literal["messages", "sharegpt", "preference", "alpaca", "question_answer", "prompt_completion"]
"""What a row of a conversation source looks like; see docs/data.md."""


def neutral(default: Any, description: str, **limits: Any) -> Any:
    """A field that cannot change any result."""
    return Field(default, description=description, json_schema_extra={"neutral": True}, **limits)


def is_neutral(field: FieldInfo) -> bool:
    """Whether the field was declared with :func:`neutral`."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("neutral"))


class Options(BaseModel):
    """Base of all sections: frozen, an unknown key is an error, no number is infinite, ``~`` is the home folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _home(cls, value: Any) -> Any:
        if not isinstance(value, Path):
            return value
        try:
            return value.expanduser()
        except RuntimeError:
            raise ValueError(f"{value}: there is no such home folder; write the path in full") from None


class RunOptions(Options):
    """Where the run lives and what makes it repeatable."""

    name: str = neutral("", "Name of the run's folder; the configuration file's name where empty.")
    dir: Path = neutral(Path("runs"), "Folder that holds all runs.")
    seed: int = Field(17, ge=0, description="Seed of data generation, sampling, adapter initialisation and shuffling.")


class ModelOptions(Options):
    """The base model."""

    name: str = Field(
        "builtin:smollm2-135m",
        description="`builtin:smollm2-135m`, a local Hugging Face folder, or a hub id such as `Qwen/Qwen3-1.7B`.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model; its newest where empty.")
    load: Literal["16bit", "4bit"] = Field(
        "16bit",
        description="How training holds the frozen base weights: `4bit` makes LoRA into QLoRA and DoRA into QDoRA (NF4 "
        "with double quantisation, arXiv 2305.14314). Merge, export and prediction take the stored weights.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off unless you trust its author."
    )


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
    shape: Literal["auto", Shape] = Field(
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
    hold_out: Literal["share", "all", "none"] = Field(
        "share", description="What is kept for evaluation: `data.eval_share` of it, all or nothing."
    )
    licence: str = Field("", description="Its licence, where the source does not say it, as `CC-BY-4.0`.")


def _paths_alone(value: Any) -> Any:
    # A tuple, because that is what strict checking takes from Python.
    entries = [value] if isinstance(value, (str, dict)) else value
    if not isinstance(entries, (list, tuple)):
        return () if entries is None else entries
    return tuple({"path": each} if isinstance(each, str) else each for each in entries)


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
    system: str = Field("", description="System message of conversations that have none; left out where empty.")
    train_on: Literal["all", "last"] = Field(
        "all", description="Which of the assistant's turns of a conversation are trained."
    )
    eval_share: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="Share of the conversations that is held out, chosen by a hash of the first question.",
    )
    duplicates: Literal["near", "exact", "keep"] = Field(
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
    max_train: int | None = Field(
        None, ge=1, description="Train on at most so many examples, drawn with `run.seed`; all where empty."
    )
    max_eval: int | None = Field(
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


class AdapterOptions(Options):
    """What is trained: a low-rank adapter (LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353), or every weight."""

    kind: Literal["lora", "dora", "full"] = Field(
        "lora",
        description="`lora`; `dora`, which is LoRA with a trained magnitude; or `full`: no adapter, every weight of "
        "the model is trained (the other options here have no say then; it wants a `train.learning_rate` near 1e-5).",
    )
    r: int = Field(16, ge=1, description="Rank.")
    alpha: int = Field(32, ge=1, description="Scale; the update is multiplied by alpha / r.")
    rslora: bool = Field(
        False, description="Multiply by alpha / sqrt(r) instead, which keeps high ranks learning (arXiv 2312.03732)."
    )
    init: Literal["default", "pissa", "loftq"] = Field(
        "default",
        description="Where the adapter begins: `default` changes nothing at first; `pissa` takes the largest singular "
        "directions out of the 16-bit weights (arXiv 2404.02948); `loftq` takes up the error of 4-bit weights (arXiv "
        "2310.08659). Both are saved as a plain adapter of twice the rank for the unchanged base.",
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout before the adapter, as a probability.")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("all-linear",),
        description="Names of the layers that get an adapter; `all-linear` is every linear layer but the output head.",
    )


class TrainOptions(Options):
    """Supervised fine-tuning on completions."""

    epochs: float = Field(3.0, gt=0, description="Passes over the training examples.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after so many optimiser steps; overrides `train.epochs`."
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning-rate schedule after warm-up."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    adam_beta2: float = Field(
        0.999, gt=0, lt=1, description="AdamW's memory of squared gradients; 0.99 suits runs of a few hundred steps."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    batch_size: int = Field(8, ge=1, description="Examples a forward pass and GPU.")
    accumulation: int = Field(1, ge=1, description="Forward passes an optimiser step.")
    precision: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Arithmetic of the frozen weights; `auto` is bfloat16 where the processor multiplies it natively.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute the activations of every layer in the backward pass: less memory, a third slower. The "
        "fused layers recompute as many as memory demands by themselves.",
    )
    max_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory that training may allocate on the GPU, in GiB; all that is free where empty. With the "
        "fused layers the planner chooses recomputed layers and passes by it (`fintune plan`).",
    )
    fused_layers: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Run the decoder layers of Llama, Mistral, Qwen2 and Qwen3 through this package's forward and "
        "backward pass (same mathematics, faster); `auto`: on a CUDA GPU, where the model and its adapter allow it.",
    )
    checkpoint_steps: int = Field(
        100, ge=1, description="Steps between checkpoints, from which an interrupted run resumes."
    )
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between evaluations on the evaluation split, one more behind the last; none where empty.",
    )
    eval_examples: int | None = Field(
        None, ge=1, description="Evaluate on at most so many examples, drawn with `run.seed`; all where empty."
    )
    eval_new_tokens: int = Field(
        96, ge=1, description="Tokens of a completion at most, where an evaluation measures execution accuracy."
    )
    keep: Literal["last", "best_loss", "best_accuracy"] = Field(
        "last",
        description="Which weights become the result: those of the last step, of the evaluation with the lowest loss, "
        "or of that with the highest execution accuracy, which each evaluation then measures by greedy decoding.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop after so many evaluations in a row without a better one, by what `train.keep` goes by (the "
        "loss for `last`); never where empty.",
    )
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = neutral(
        (),
        "Where losses go besides metrics.jsonl: `tensorboard` writes train/tensorboard, `wandb` sends them to Weights "
        "& Biases (WANDB_MODE=offline keeps them in train/wandb).",
    )
    log_steps: int = neutral(1, "Steps between lines of metrics.jsonl.", ge=1)
    threads: int | None = neutral(None, "CPU threads; all cores where empty.", ge=1)

    @model_validator(mode="after")
    def _choices_need_evaluations(self) -> TrainOptions:
        if self.eval_steps is None:
            asked = [f"train.keep: {self.keep}"] if self.keep != "last" else []
            asked += ["train.patience"] if self.patience is not None else []
            if asked:
                raise ValueError(f"{' and '.join(asked)} needs evaluations; set train.eval_steps")
        return self


class PredictOptions(Options):
    """Programs for the evaluation questions from each kind of model."""

    models: Annotated[tuple[ModelKind, ...], Field(min_length=1)] = Field(
        ("base", "adapter", "merged", "F16", "Q4_K_M"),
        description="What is measured: the model before training, base + adapter, merged folder, GGUF files by type; "
        "and `endpoint`, whatever is served at `predict.endpoint`.",
    )
    endpoint: str | None = Field(
        None,
        description="Address of an OpenAI-compatible server (llama.cpp, vLLM, Ollama, ...), as "
        "`http://127.0.0.1:8080/v1#MODEL`; its own chat template renders the prompts. A key is read from the "
        "environment variable FINTUNE_API_KEY or OPENAI_API_KEY.",
    )
    engine: Literal["auto", "transformers", "vllm"] = Field(
        "auto",
        description="What runs Hugging Face folders; `auto` is transformers. llama.cpp runs GGUF files.",
    )
    num_shots: int = Field(
        0,
        ge=0,
        description="Training questions with evidence and program that stand before each question: the most similar "
        "ones, none from a page that is scored. Those that do not fit `prompt.max_length` are left out.",
    )
    max_new_tokens: int = Field(
        96, ge=1, description="Tokens of a completion at most; the longest gold of FinQA needs about 90."
    )
    constrain: Literal["none", "general", "example"] = Field(
        "none",
        description="What a completion may say: anything; only programs (`general`); or only programs of the numbers "
        "and rows on its page and FinQA's constants (`example`).",
    )
    strategy: Literal["greedy", "sample", "execution_guided", "vote"] = Field(
        "greedy",
        description="`greedy`: the most probable token each time; `sample`: drawn tokens; `execution_guided`: of the "
        "greedy and `num_candidates` - 1 drawn completions the most probable one whose program runs (arXiv "
        "1807.03100); `vote`: the result that most of `num_candidates` drawn programs have (arXiv 2203.11171).",
    )
    num_candidates: int = Field(
        1, ge=1, description="Completions a question, for `execution_guided` (1 is greedy) and `vote` (2 or more)."
    )
    temperature: float = Field(
        0.7, ge=0.01, le=100, description="Where tokens are drawn: below 1 the probable ones more often than they are."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Where tokens are drawn: from the most probable that have this share together."
    )
    seed: int = Field(17, ge=0, description="Where tokens are drawn: the same seed draws the same.")
    batch_size: int = Field(16, ge=1, description="Completions decoded together.")
    precision: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "float32", description="Arithmetic of the transformers engine."
    )
    threads: int | None = neutral(None, "CPU threads; all cores where empty.", ge=1)

    @model_validator(mode="after")
    def _candidates_are_used(self) -> PredictOptions:
        if self.strategy == "vote" and self.num_candidates == 1:
            raise ValueError("predict.strategy: vote needs several candidates; set predict.num_candidates, as to 8")
        if self.strategy in ("greedy", "sample") and self.num_candidates > 1:
            raise ValueError(
                f"predict.num_candidates is not read with predict.strategy: {self.strategy}; "
                "set execution_guided or vote, or remove it"
            )
        if "endpoint" in self.models and self.endpoint is None:
            raise ValueError("predict.models asks for endpoint; set predict.endpoint to its address")
        return self


class MergeOptions(Options):
    """Folding the adapter into the base weights."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of the merged weights; `auto` is the base's."
    )


class ExportOptions(Options):
    """GGUF files for llama.cpp."""

    types: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("F16", "Q4_K_M"), description="GGUF types to write."
    )
    threads: int | None = neutral(None, "CPU threads; all cores where empty.", ge=1)


class Config(Options):
    """A whole run."""

    run: RunOptions = Field(default_factory=RunOptions, description="Name, folder, seed.")
    model: ModelOptions = Field(default_factory=ModelOptions, description="Base model.")
    data: DataOptions = Field(default_factory=DataOptions, description="Examples.")
    prompt: PromptOptions = Field(default_factory=PromptOptions, description="Prompt.")
    adapter: AdapterOptions = Field(default_factory=AdapterOptions, description="Adapter.")
    train: TrainOptions = Field(default_factory=TrainOptions, description="Training.")
    merge: MergeOptions = Field(default_factory=MergeOptions, description="Merge.")
    export: ExportOptions = Field(default_factory=ExportOptions, description="Export.")
    predict: PredictOptions = Field(default_factory=PredictOptions, description="Prediction.")

    @model_validator(mode="after")
    def _method_is_one(self) -> Config:
        kind, init, load = self.adapter.kind, self.adapter.init, self.model.load
        if kind == "full":
            if load == "4bit":
                raise ValueError(
                    "adapter.kind: full trains the weights themselves, which model.load: 4bit freezes; use lora"
                )
            if init != "default" or self.adapter.rslora:
                option = "adapter.rslora" if self.adapter.rslora else f"adapter.init: {init}"
                raise ValueError(f"{option} is about an adapter, and adapter.kind: full has none; remove it")
            if self.train.fused_layers == "always":
                raise ValueError("train.fused_layers: always freezes the base weights, which adapter.kind: full trains")
        if init == "pissa" and load == "4bit":
            raise ValueError("adapter.init: pissa takes from 16-bit weights; use loftq with model.load: 4bit")
        if init == "loftq" and load == "16bit":
            raise ValueError("adapter.init: loftq takes up the error of 4-bit weights; set model.load: 4bit")
        if init == "loftq" and kind == "dora":
            raise ValueError("adapter.init: loftq is unproven with adapter.kind: dora; use lora")
        if self.train.keep == "best_accuracy" and self.data.source not in ("builtin:statements", "finqa"):
            raise ValueError(
                f"train.keep: best_accuracy needs gold programs, which data.source: {self.data.source} lacks"
            )
        return self

    @model_validator(mode="after")
    def _measured_files_are_exported(self) -> Config:
        if self.data.source == "chat":
            return self  # no official verdict, so nothing is predicted
        missing = [kind for kind in self.predict.models if kind in {"F16", "Q4_K_M"} and kind not in self.export.types]
        if missing:
            raise ValueError(
                f"predict.models asks for {', '.join(missing)}, which export.types does not write; add it there"
            )
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.dir / self.run.name
