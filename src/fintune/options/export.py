"""Merged weights and GGUF files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fintune.options.base import Options, neutral


class MergeOptions(Options):
    """Folding the adapter into the base weights."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of the merged weights; `auto` is the base's."
    )
    into: Literal["16bit", "dequantised"] = Field(
        "16bit",
        description="Weights that the adapter is folded into: the base's own, or, with `model.load: 4bit`, those that "
        "training saw, rounded to 4 bits and back. How far the two lie apart is in the manifest.",
    )


class ExportOptions(Options):
    """GGUF files for llama.cpp."""

    types: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("F16", "Q4_K_M"), description="GGUF types to write."
    )
    threads: int | None = neutral(None, "CPU threads; all cores where empty.", ge=1)
