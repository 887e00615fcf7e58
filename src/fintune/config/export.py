"""Merged weights, GGUF files, and the comparison of both with the trained model."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fintune.config.base import Options, advanced, neutral

COMPUTE = Path("compute")
"""Value of ``export.imatrix`` that names no file."""
_UNQUANTIZED = {"F32", "F16", "BF16"}
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M")
"""Types that this package writes itself. The quantizer of a llama.cpp checkout has its own list."""


class MergeOptions(Options):
    """Folding the adapter into the base weights."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of the merged weights (`auto`: the base model's)."
    )
    into: Literal["16bit", "quantized_base"] = advanced(
        "16bit",
        "Weights that the adapter is folded into: the base model's own, or, with `model.quantization: nf4`, the ones "
        "that training used (rounded to 4 bits and back). The manifest states how far the two differ.",
    )


class ExportOptions(Options):
    """GGUF files for llama.cpp."""

    types: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("F16", "Q4_K_M"), description="GGUF types to write."
    )
    source: Literal["merged", "adapter"] = Field(
        "merged",
        description="What is exported: the merged folder, or base + `adapter`, folded while they are read. Both give "
        "the same bytes. `adapter` writes no merged folder, so `predict.models` may not contain `merged`.",
    )
    imatrix: Path | None = Field(
        None,
        description="Importance matrix for the quantized types: a llama.cpp file (GGUF or the older binary), or "
        "`compute`, which reads the first 32,768 tokens of the training texts with the whole model in memory. For a "
        "file called compute, write its full path.",
    )
    llama_cpp_path: Path | None = Field(
        None,
        description="A built llama.cpp checkout. Its converter and quantizer then write the files from the merged "
        "folder. Needed for architectures other than llama, mistral, qwen2 and qwen3, and for SentencePiece tokenizers "
        "(Llama 2, TinyLlama, Mistral 7B).",
    )
    threads: int | None = neutral(None, "CPU threads (default: all cores).", advanced=True, ge=1)

    @property
    def computes_imatrix(self) -> bool:
        """Whether this package computes the importance matrix."""
        return self.imatrix == COMPUTE

    @property
    def imatrix_file(self) -> Path | None:
        """The importance matrix that the user named, if any."""
        return None if self.computes_imatrix else self.imatrix

    @field_validator("types")
    @classmethod
    def _to_upper(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(kind.upper() for kind in value)

    @model_validator(mode="after")
    def _check_types(self) -> ExportOptions:
        for kind in self.types if self.llama_cpp_path is None else ():
            if kind not in GGUF_TYPES:
                near = difflib.get_close_matches(kind, GGUF_TYPES, n=1, cutoff=0.7)
                hint = f"did you mean {near[0]}?" if near else f"known types are {', '.join(GGUF_TYPES)}"
                raise ValueError(f"export.types: unknown GGUF type {kind!r}: {hint}")
        return self

    @model_validator(mode="after")
    def _check_checkout(self) -> ExportOptions:
        if self.llama_cpp_path is not None and self.source == "adapter":
            raise ValueError(
                "export.llama_cpp_path reads the merged folder, which export.source: adapter does not write; remove one"
            )
        if self.llama_cpp_path is not None and self.computes_imatrix:
            raise ValueError("export.imatrix: compute does not work with export.llama_cpp_path; name a file")
        return self

    @model_validator(mode="after")
    def _check_imatrix(self) -> ExportOptions:
        if self.imatrix is not None and _UNQUANTIZED.issuperset(self.types):
            raise ValueError(
                f"export.imatrix weights quantized types, and export.types has only {', '.join(self.types)}; "
                "add one such as Q4_K_M, or remove it"
            )
        return self


class ReplayOptions(Options):
    """Verification of the exports: held-out completions are compared token by token with base + adapter."""

    num_examples: int = Field(16, ge=1, description="Number of evaluation examples that are compared.")
    max_tokens: int = Field(64, ge=1, description="Maximum tokens of a completion that are compared, from its start.")
    min_same_share: float = advanced(
        0.98,
        "Minimum share of positions at which the merged folder and the F32, F16 and BF16 files have the same most "
        "probable token as base + adapter (Q8_0: 0.9 at most). Below it the stage fails. A single differing position "
        "never fails it, unless this is 1.",
        ge=0,
        le=1,
    )
    min_same_share_quantised: float = advanced(
        0.5,
        "The same for smaller files, whose most probable tokens may differ. Only a broken file falls below it.",
        ge=0,
        le=1,
    )
