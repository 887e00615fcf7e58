"""How the models answer the evaluation questions."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from fintune.config.base import Options, advanced, neutral

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
    # The branch is chosen before the values are checked, so that the error names the value at fault.
    return "several" if isinstance(value, (list, tuple)) else "one"


class PredictOptions(Options):
    """Answers to the evaluation questions from each kind of model."""

    models: Annotated[tuple[ModelKind, ...], Field(min_length=1)] = ("base", "adapter", "merged", "F16", "Q4_K_M")
    """What is measured: the model before training (`base`), base + adapter, the merged folder, and GGUF files by type
    (`export.types` must write them). `adapter_4bit` and `merged_4bit` load those weights in 4 bits (NF4, bitsandbytes).
    `endpoint` is the server at `predict.endpoint`."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server (llama.cpp, vLLM, Ollama, ...), such as `http://127.0.0.1:8080/v1#MODEL`.
    The server applies its own chat template. A key is read from the environment variable FINTUNE_API_KEY or
    OPENAI_API_KEY."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What runs Hugging Face folders (`auto`: transformers). llama.cpp runs GGUF files."""
    num_fewshot: int = Field(0, ge=0)
    """Number of solved training questions, with evidence and program, before each question: the most similar ones, none
    from a scored page. Those that do not fit `prompt.max_length` are left out."""
    max_new_tokens: int = Field(96, ge=1)
    """Maximum tokens of a completion. The longest gold program of FinQA needs about 90."""
    constrain: Annotated[
        Annotated[DecodingMode, Tag("one")]
        | Annotated[tuple[DecodingMode, ...], BeforeValidator(tuple), Tag("several")],
        Discriminator(_one_or_several),
    ] = Field("none", json_schema_extra={"shown_type": f"{' or '.join(get_args(DecodingMode))}, or a list of these"})
    """What a completion may contain: anything (`none`), only programs (`general`), or only programs of the numbers and
    rows on its page and FinQA's constants (`page`). A list such as `[none, page]` measures each kind of model in each
    of these modes; steps named after the kind alone use the first."""
    strategy: Literal["greedy", "sample", "execution_guided", "vote"] = "greedy"
    """`greedy`: the most probable token each time. `sample`: sampled tokens. `execution_guided`: the most probable of
    the greedy and `num_candidates` - 1 sampled completions whose program runs (arXiv 1807.03100). `vote`: the most
    frequent result of `num_candidates` sampled programs (arXiv 2203.11171)."""
    num_candidates: int = Field(1, ge=1)
    """Completions per question, for `execution_guided` (1: greedy) and `vote` (2 or more)."""
    temperature: float = Field(0.7, ge=0.01, le=100)
    """Sampling temperature. Below 1, probable tokens are drawn more often."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sampling: draw only from the most probable tokens with this total probability."""
    seed: int = advanced(17, ge=0)
    """Sampling seed. The same seed draws the same tokens."""
    batch_size: int = Field(16, ge=1)
    """Completions that are decoded together."""
    timeout_seconds: float = neutral(600.0, advanced=True, gt=0, le=604_800)
    """Seconds that a server may take to answer a request, including the time that the request waits there."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32"
    """Arithmetic of the transformers engine."""
    threads: int | None = neutral(None, advanced=True, ge=1)
    """CPU threads (default: all cores)."""

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
    def _check_modes(cls, value: DecodingMode | tuple[DecodingMode, ...]) -> DecodingMode | tuple[DecodingMode, ...]:
        if not isinstance(value, tuple):
            return value
        if not value:
            raise ValueError("predict.constrain is an empty list; name a mode, such as none")
        if twice := next((mode for index, mode in enumerate(value) if mode in value[:index]), None):
            raise ValueError(f"predict.constrain names {twice} twice; name each mode once")
        return value if len(value) > 1 else value[0]
