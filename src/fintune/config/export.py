"""Merged weights, GGUF files, and the replay that compares them."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fintune.config.base import Options, neutral

COMPUTE = Path("compute")
"""``export.imatrix`` that names no file."""
_NOT_QUANTISED = {"F32", "F16", "BF16"}
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M")
"""What this package writes by itself; the quantiser of a llama.cpp checkout has its own list."""


class MergeOptions(Options):
    """Folding the adapter into the base weights."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of the merged weights; `auto` is the base's."
    )
    into: Literal["16bit", "quantized_base"] = Field(
        "16bit",
        description="Weights that the adapter is folded into: the base's own, or, with `model.quantization: nf4`, "
        "those that training saw, rounded to 4 bits and back. How far the two lie apart is in the manifest.",
    )


class ExportOptions(Options):
    """GGUF files for llama.cpp."""

    types: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("F16", "Q4_K_M"), description="GGUF types to write."
    )
    source: Literal["merged", "adapter"] = Field(
        "merged",
        description="What is read: the merged folder; or base + `adapter`, folded while they are read: the same bytes, "
        "and no merged folder is written (then no `merged` in `predict.models`).",
    )
    imatrix: Path | None = Field(
        None,
        description="Importance matrix that the quantised types are weighed with: a file of llama.cpp's (GGUF or the "
        "older binary), or `compute`: from the first 32,768 tokens of the training texts, with the whole model in "
        "memory (a file of that name: write its whole path).",
    )
    llama_cpp_path: Path | None = Field(
        None,
        description="A built llama.cpp checkout: its converter and quantiser write the files from the merged folder. "
        "Needed for families other than llama, mistral, qwen2 and qwen3, and for SentencePiece tokenizers (Llama 2, "
        "TinyLlama, Mistral 7B).",
    )
    threads: int | None = neutral(None, "CPU threads; all cores where empty.", ge=1)

    @property
    def computes_imatrix(self) -> bool:
        """Whether the matrix is made here."""
        return self.imatrix == COMPUTE

    @property
    def imatrix_file(self) -> Path | None:
        """The user's matrix."""
        return None if self.computes_imatrix else self.imatrix

    @field_validator("types")
    @classmethod
    def _in_capitals(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(kind.upper() for kind in value)

    @model_validator(mode="after")
    def _types_are_known(self) -> ExportOptions:
        for kind in self.types if self.llama_cpp_path is None else ():
            if kind not in GGUF_TYPES:
                near = difflib.get_close_matches(kind, GGUF_TYPES, n=1, cutoff=0.7)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(GGUF_TYPES)}"
                raise ValueError(f"export.types: unknown GGUF type {kind!r}: {hint}")
        return self

    @model_validator(mode="after")
    def _checkout_reads_a_folder(self) -> ExportOptions:
        if self.llama_cpp_path is not None and self.source == "adapter":
            raise ValueError(
                "export.llama_cpp_path reads the merged folder, which export.source: adapter does without; remove one"
            )
        if self.llama_cpp_path is not None and self.computes_imatrix:
            raise ValueError(
                "export.imatrix: compute is for this package's own export; with export.llama_cpp_path name a file"
            )
        return self

    @model_validator(mode="after")
    def _importance_is_used(self) -> ExportOptions:
        if self.imatrix is not None and _NOT_QUANTISED.issuperset(self.types):
            raise ValueError(
                f"export.imatrix weighs quantised types, and export.types has only {', '.join(self.types)}; "
                "add one, as Q4_K_M, or remove it"
            )
        return self


class ReplayOptions(Options):
    """Held-out completions through base + adapter, merged folder and GGUF files, token by token."""

    num_examples: int = Field(16, ge=1, description="Examples of the evaluation data that are replayed.")
    max_tokens: int = Field(
        64, ge=1, description="Tokens of a completion that are compared; the beginning of a longer one."
    )
    min_same_share: float = Field(
        0.98,
        ge=0,
        le=1,
        description="Share of the positions at which merged folder, F32, F16 and BF16 file must have the likeliest "
        "token of base + adapter, Q8_0 at 0.9 at most; else the stage fails. One position alone fails none (of few it "
        "is a large share), unless 1 is asked for.",
    )
    min_same_share_quantised: float = Field(
        0.5,
        ge=0,
        le=1,
        description="The same for smaller files, whose likeliest tokens may differ: a floor that only a ruined file "
        "falls below.",
    )
