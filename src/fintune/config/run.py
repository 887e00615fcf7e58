"""A whole run: its sections, and which options work together."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from fintune.config.base import Options, neutral
from fintune.config.data import DataOptions, PromptOptions
from fintune.config.export import ExportOptions, MergeOptions, ReplayOptions
from fintune.config.model import AdapterOptions, ModelOptions
from fintune.config.predict import GGUF_KINDS, DecodingMode, PredictOptions
from fintune.config.publish import PublishOptions
from fintune.config.train import BETA, GuardOptions, TrainOptions


class RunOptions(Options):
    """Where the run is stored and what makes it repeatable."""

    name: str = neutral("", "Name of the run's folder (default: the name of the configuration file).")
    dir: Path = neutral(Path("runs"), "Folder that contains all runs.")
    seed: int = Field(
        17, ge=0, lt=2**32, description="Seed of data generation, sampling, adapter initialization and shuffling."
    )


class Config(Options):
    """A whole run."""

    run: RunOptions = Field(default_factory=RunOptions, description="Name, folder, seed.")
    model: ModelOptions = Field(default_factory=ModelOptions, description="Base model.")
    data: DataOptions = Field(default_factory=DataOptions, description="Examples.")
    prompt: PromptOptions = Field(default_factory=PromptOptions, description="Prompt.")
    adapter: AdapterOptions = Field(default_factory=AdapterOptions, description="Adapter.")
    train: TrainOptions = Field(default_factory=TrainOptions, description="Training.")
    guard: GuardOptions = Field(default_factory=GuardOptions, description="Forgetting check.")
    merge: MergeOptions = Field(default_factory=MergeOptions, description="Merge.")
    export: ExportOptions = Field(default_factory=ExportOptions, description="Export.")
    replay: ReplayOptions = Field(default_factory=ReplayOptions, description="Verification of the exports.")
    predict: PredictOptions = Field(default_factory=PredictOptions, description="Prediction.")
    publish: PublishOptions = Field(default_factory=PublishOptions, description="Publishing.")

    @model_validator(mode="after")
    def _check_adapter(self) -> Config:
        kind, init, quantization = self.adapter.kind, self.adapter.init_lora_weights, self.model.quantization
        if kind == "full":
            if quantization == "nf4":
                raise ValueError(
                    "adapter.kind: full trains the weights themselves, which model.quantization: nf4 freezes; use lora"
                )
            if init != "default" or self.adapter.use_rslora:
                option = "adapter.use_rslora" if self.adapter.use_rslora else f"adapter.init_lora_weights: {init}"
                raise ValueError(f"{option} is about an adapter, and adapter.kind: full has none; remove it")
            if self.export.source == "adapter":
                raise ValueError("export.source: adapter needs an adapter, which adapter.kind: full lacks; use merged")
            if self.train.fused_layers == "always":
                raise ValueError("train.fused_layers: always freezes the base weights, which adapter.kind: full trains")
        if init == "pissa" and quantization == "nf4":
            raise ValueError(
                "adapter.init_lora_weights: pissa needs 16-bit weights; use loftq with model.quantization: nf4"
            )
        if init == "loftq" and quantization == "none":
            raise ValueError("adapter.init_lora_weights: loftq needs 4-bit weights; set model.quantization: nf4")
        if init == "loftq" and kind == "dora":
            raise ValueError("adapter.init_lora_weights: loftq is not supported with adapter.kind: dora; use lora")
        if self.merge.into == "quantized_base" and quantization == "none":
            raise ValueError(
                "merge.into: quantized_base needs 4-bit training; set model.quantization: nf4, or remove it"
            )
        if self.train.select_checkpoint == "best_accuracy" and self.data.source == "chat":
            raise ValueError(
                "train.select_checkpoint: best_accuracy needs gold programs, which data.source: chat lacks"
            )
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> Config:
        if reason := self._unsupported_objective():
            raise ValueError(reason)
        return self

    def _unsupported_objective(self) -> str | None:
        """Return which option is not supported with ``train.objective`` and what to do, or None."""
        train, adapter = self.train, self.adapter
        objective = f"train.objective: {train.objective}"
        weights = ("desirable_weight", "undesirable_weight")
        weight = next((name for name in weights if getattr(train, name) is not None), None)
        if train.objective == "sft":
            if train.beta != BETA:
                return "train.beta has no effect with train.objective: sft; set dpo, orpo or kto, or remove it"
            if train.rpo_alpha:
                return "train.rpo_alpha belongs to train.objective: dpo; remove it"
            return f"train.{weight} belongs to train.objective: kto; remove it" if weight else None
        rows = "preference rows (prompt, chosen, rejected)"
        if train.objective == "kto":
            rows += " or labelled answers (prompt, completion, label)"
        reasons = {
            f"{objective} compares answers, which data.source: {self.data.source} lacks; set data.source: chat and "
            f"name {rows} in data.sources": self.data.source != "chat",
            f"{objective} is not supported with adapter.kind: full, since its reference is the model without the "
            "adapter; use lora or dora": adapter.kind == "full",
            f"{objective} is not supported with adapter.init_lora_weights: {adapter.init_lora_weights}, whose adapter "
            "changes the model before the first step; use default": adapter.init_lora_weights != "default",
            f"{objective} is not supported with adapter.lora_dropout: model and reference must be equal at first; set "
            "it to 0": adapter.lora_dropout > 0,
            f"{objective} is not supported with train.fused_layers: always; set it to auto or never": (
                train.fused_layers == "always"
            ),
            f"{objective} is not supported with train.select_checkpoint: best_accuracy, which needs gold programs; use "
            "best_loss": train.select_checkpoint == "best_accuracy",
            f"train.rpo_alpha belongs to train.objective: dpo, not to {train.objective}; remove it": (
                train.rpo_alpha > 0 and train.objective != "dpo"
            ),
            f"train.{weight} belongs to train.objective: kto, not to {train.objective}; remove it": (
                weight is not None and train.objective != "kto"
            ),
            f"{objective} compares answers of different prompts in a forward pass; set "
            "train.per_device_train_batch_size to 2 or more": (
                train.objective == "kto" and train.per_device_train_batch_size < 2
            ),
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    @model_validator(mode="after")
    def _check_measured_files(self) -> Config:
        if self.data.source == "chat":
            return self  # no official verdict, so nothing is predicted
        merged = [kind for kind in self.predict.models if kind.startswith("merged")]
        if self.export.source == "adapter" and merged:
            raise ValueError(
                "export.source: adapter writes no merged folder, which predict.models asks for; "
                f"remove {' and '.join(merged)} there"
            )
        missing = [kind for kind in self.predict.models if kind in GGUF_KINDS and kind not in self.export.types]
        if missing:
            raise ValueError(
                f"predict.models asks for {', '.join(missing)}, which export.types does not write; add it there"
            )
        return self

    @model_validator(mode="after")
    def _check_publish(self) -> Config:
        if reason := self.publish.unsupported_reason(self.adapter.kind, self.export.source):
            raise ValueError(reason)
        return self

    def with_decoding_mode(self, mode: DecodingMode) -> Config:
        """Return a copy whose completions are constrained in this mode only."""
        return self.model_copy(update={"predict": self.predict.model_copy(update={"constrain": mode})})

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.dir / self.run.name
