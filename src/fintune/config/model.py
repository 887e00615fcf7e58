"""The base model, and which of its weights are trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fintune.config.base import Options, advanced


class ModelOptions(Options):
    """The base model."""

    name: str = Field(
        "builtin:smollm2-135m",
        description="`builtin:smollm2-135m`, a local Hugging Face folder, or a hub id such as `Qwen/Qwen3-1.7B`. The "
        "built-in model was unpacked from 4-bit weights.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model (default: the newest).")
    quantization: Literal["none", "nf4"] = Field(
        "none",
        description="How training stores the frozen base weights. `nf4` (4-bit NormalFloat with double quantization, "
        "arXiv 2305.14314) turns LoRA into QLoRA and DoRA into QDoRA. Merge, export and prediction use the original "
        "weights.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Enable it only if you trust its author."
    )


class AdapterOptions(Options):
    """What is trained: a low-rank adapter (LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353), or every weight."""

    kind: Literal["lora", "dora", "full"] = Field(
        "lora",
        description="`lora`; `dora` (LoRA with a trained magnitude); or `full`: no adapter, all weights are trained. "
        "With `full` the other options of this section are ignored, and `train.learning_rate` should be near 1e-5.",
    )
    r: int = Field(16, ge=1, description="Rank.")
    lora_alpha: int = Field(32, ge=1, description="Scale: the update is multiplied by lora_alpha / r.")
    use_rslora: bool = Field(
        False,
        description="Multiply by lora_alpha / sqrt(r) instead, which keeps high ranks learning (arXiv 2312.03732).",
    )
    init_lora_weights: Literal["default", "pissa", "loftq"] = advanced(
        "default",
        "How the adapter is initialized. `default`: the first step changes nothing. `pissa`: the largest singular "
        "directions of the 16-bit weights (arXiv 2404.02948). `loftq`: the quantization error of the 4-bit weights "
        "(arXiv 2310.08659). Both are saved as a plain adapter of twice the rank for the unchanged base.",
    )
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout probability of the adapter's input.")
    target_modules: tuple[str, ...] = Field(
        ("all-linear",),
        description="Names of the layers that get an adapter. `all-linear`: every linear layer but the output head.",
    )

    @field_validator("target_modules")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("adapter.target_modules: name at least one layer, or all-linear")
        if "all-linear" in names and len(names) > 1:
            raise ValueError("adapter.target_modules: all-linear already means every layer; remove it or the others")
        return names
