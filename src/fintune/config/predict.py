"""How completions are made."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from fintune.config.base import Options, neutral

GgufKind = Literal["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M"]
ModelKind = Literal["base", "adapter", "adapter_4bit", "merged", "merged_4bit", GgufKind, "endpoint"]
GGUF_KINDS: tuple[GgufKind, ...] = get_args(GgufKind)
DecodingMode = Literal["none", "general", "page"]
"""What a completion may contain: anything, any program, or a program of the numbers and rows on its page."""
MODE_SEPARATOR = "+"
"""Separates the kind of model from the decoding mode in a step's name: ``predict/merged+page``."""


def split_kind_and_mode(name: str) -> tuple[str, str]:
    """Split ``merged+page`` into ``merged`` and ``page``; the mode is "" if the name has none."""
    kind, _, mode = name.rpartition(MODE_SEPARATOR)
    return (kind, mode) if kind and mode in get_args(DecodingMode) else (name, "")


def _one_or_several(value: object) -> str:
    # Told apart before they are checked, so that what is refused is the value that is wrong.
    return "several" if isinstance(value, (list, tuple)) else "one"


def _as_tuple(value: object) -> object:
    # Behind a validator in Python, strict checking takes no list for it.
    return tuple(value) if isinstance(value, list) else value


class PredictOptions(Options):
    """Programs for the evaluation questions from each kind of model."""

    models: Annotated[tuple[ModelKind, ...], Field(min_length=1)] = Field(
        ("base", "adapter", "merged", "F16", "Q4_K_M"),
        description="What is measured: the model before training, base + adapter, merged folder, GGUF files by type "
        "(`export.types` has to write them); "
        "`adapter_4bit` and `merged_4bit` with the base's or the merged weights packed in 4 bits while they load (NF4, "
        "bitsandbytes); and `endpoint`, whatever is served at `predict.endpoint`.",
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
    num_fewshot: int = Field(
        0,
        ge=0,
        description="Training questions with evidence and program that stand before each question: the most similar "
        "ones, none from a page that is scored. Those that do not fit `prompt.max_length` are left out.",
    )
    max_new_tokens: int = Field(
        96, ge=1, description="Tokens of a completion at most; the longest gold of FinQA needs about 90."
    )
    constrain: Annotated[
        Annotated[DecodingMode, Tag("one")]
        | Annotated[tuple[DecodingMode, ...], BeforeValidator(_as_tuple), Tag("several")],
        Discriminator(_one_or_several),
    ] = Field(
        "none",
        json_schema_extra={"shown_type": f"{' or '.join(get_args(DecodingMode))}, or a list of these"},
        description="What a completion may say: anything; only programs (`general`); or only programs of the numbers "
        "and rows on its page and FinQA's constants (`page`). A list, as `[none, page]`, measures each kind of "
        "model in each of these modes; steps that are named after the kind alone use the first.",
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
    timeout_seconds: float = neutral(
        600.0,
        "Seconds in which a server has to answer a request, those in which it waits there among them.",
        gt=0,
        le=604_800,
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "float32", description="Arithmetic of the transformers engine."
    )
    threads: int | None = neutral(None, "CPU threads; all cores where empty.", ge=1)

    @property
    def decoding_modes(self) -> tuple[DecodingMode, ...]:
        """`constrain` as a list: each kind of model is measured in each of these modes."""
        return self.constrain if isinstance(self.constrain, tuple) else (self.constrain,)

    def named_modes(self, kind: ModelKind) -> list[tuple[str, DecodingMode]]:
        """Name each decoding mode of a kind; the first has the kind's own name: ``merged``, ``merged+page``."""
        first, *others = self.decoding_modes
        return [(kind, first), *((f"{kind}{MODE_SEPARATOR}{mode}", mode) for mode in others)]

    @field_validator("constrain")
    @classmethod
    def _each_mode_once(cls, value: DecodingMode | tuple[DecodingMode, ...]) -> DecodingMode | tuple[DecodingMode, ...]:
        if not isinstance(value, tuple):
            return value
        if not value:
            raise ValueError("predict.constrain is an empty list; name a mode, such as none")
        if twice := next((mode for index, mode in enumerate(value) if mode in value[:index]), None):
            raise ValueError(f"predict.constrain names {twice} twice; name each mode once")
        return value if len(value) > 1 else value[0]

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
