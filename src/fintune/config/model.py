"""The base model, and what of it is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fintune.config.base import Options


class ModelOptions(Options):
    """The base model."""

    name: str = Field(
        "builtin:smollm2-135m",
        description="`builtin:smollm2-135m`, a local Hugging Face folder, or a hub id such as `Qwen/Qwen3-1.7B`.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model; its newest where empty.")
    quantization: Literal["none", "nf4"] = Field(
        "none",
        description="How training holds the frozen base weights: `nf4` makes LoRA into QLoRA and DoRA into "
        "QDoRA (4-bit NormalFloat with double quantisation, arXiv 2305.14314). Merge, export and prediction take the "
        "stored weights.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off unless you trust its author."
    )


class AdapterOptions(Options):
    """What is trained: a low-rank adapter (LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353), or every weight."""

    kind: Literal["lora", "dora", "full"] = Field(
        "lora",
        description="`lora`; `dora`, which is LoRA with a trained magnitude; or `full`: no adapter, every weight of "
        "the model is trained (the other options here have no say then; it wants a `train.learning_rate` near 1e-5).",
    )
    r: int = Field(16, ge=1, description="Rank.")
    lora_alpha: int = Field(32, ge=1, description="Scale; the update is multiplied by alpha / r.")
    use_rslora: bool = Field(
        False, description="Multiply by alpha / sqrt(r) instead, which keeps high ranks learning (arXiv 2312.03732)."
    )
    init_lora_weights: Literal["default", "pissa", "loftq"] = Field(
        "default",
        description="Where the adapter begins: `default` changes nothing at first; `pissa` takes the largest singular "
        "directions out of the 16-bit weights (arXiv 2404.02948); `loftq` takes up the error of 4-bit weights (arXiv "
        "2310.08659). Both are saved as a plain adapter of twice the rank for the unchanged base.",
    )
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout before the adapter, as a probability.")
    target_modules: tuple[str, ...] = Field(
        ("all-linear",),
        description="Names of the layers that get an adapter; `all-linear` is every linear layer but the output head.",
    )

    @field_validator("target_modules")
    @classmethod
    def _some_or_all(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets:
            raise ValueError("adapter.target_modules: name at least one layer, or all-linear")
        if "all-linear" in targets and len(targets) > 1:
            raise ValueError(
                "adapter.target_modules: all-linear is every layer and stands alone; leave it or the others out"
            )
        return targets
