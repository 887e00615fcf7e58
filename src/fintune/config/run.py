"""A whole run: its sections, and which options go together."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from fintune.config.base import Options, neutral
from fintune.config.data import DataOptions, PromptOptions
from fintune.config.export import ExportOptions, MergeOptions, ReplayOptions
from fintune.config.guard import GuardOptions
from fintune.config.model import AdapterOptions, ModelOptions
from fintune.config.predict import GGUF_KINDS, DecodingMode, PredictOptions
from fintune.config.preference import obstacle
from fintune.config.publish import PublishOptions
from fintune.config.train import TrainOptions


class RunOptions(Options):
    """Where the run lives and what makes it repeatable."""

    name: str = neutral("", "Name of the run's folder; the configuration file's name where empty.")
    dir: Path = neutral(Path("runs"), "Folder that holds all runs.")
    seed: int = Field(
        17, ge=0, lt=2**32, description="Seed of data generation, sampling, adapter initialisation and shuffling."
    )


class Config(Options):
    """A whole run."""

    run: RunOptions = Field(default_factory=RunOptions, description="Name, folder, seed.")
    model: ModelOptions = Field(default_factory=ModelOptions, description="Base model.")
    data: DataOptions = Field(default_factory=DataOptions, description="Examples.")
    prompt: PromptOptions = Field(default_factory=PromptOptions, description="Prompt.")
    adapter: AdapterOptions = Field(default_factory=AdapterOptions, description="Adapter.")
    train: TrainOptions = Field(default_factory=TrainOptions, description="Training.")
    guard: GuardOptions = Field(default_factory=GuardOptions, description="Guard.")
    merge: MergeOptions = Field(default_factory=MergeOptions, description="Merge.")
    export: ExportOptions = Field(default_factory=ExportOptions, description="Export.")
    replay: ReplayOptions = Field(default_factory=ReplayOptions, description="Replay.")
    predict: PredictOptions = Field(default_factory=PredictOptions, description="Prediction.")
    publish: PublishOptions = Field(default_factory=PublishOptions, description="Publishing.")

    @model_validator(mode="after")
    def _method_is_one(self) -> Config:
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
                "adapter.init_lora_weights: pissa takes from 16-bit weights; use loftq with model.quantization: nf4"
            )
        if init == "loftq" and quantization == "none":
            raise ValueError(
                "adapter.init_lora_weights: loftq takes up the error of 4-bit weights; set model.quantization: nf4"
            )
        if init == "loftq" and kind == "dora":
            raise ValueError("adapter.init_lora_weights: loftq is unproven with adapter.kind: dora; use lora")
        if self.merge.into == "quantized_base" and quantization == "none":
            raise ValueError(
                "merge.into: quantized_base is about 4-bit training; set model.quantization: nf4, or remove it"
            )
        if self.train.select_checkpoint == "best_accuracy" and self.data.source not in ("builtin:statements", "finqa"):
            raise ValueError(
                "train.select_checkpoint: best_accuracy needs gold programs, which "
                f"data.source: {self.data.source} lacks"
            )
        return self

    @model_validator(mode="after")
    def _objective_is_proven(self) -> Config:
        if reason := obstacle(self):
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _measured_files_are_exported(self) -> Config:
        if self.data.source == "chat":
            return self  # no official verdict, so nothing is predicted
        merged = [kind for kind in self.predict.models if kind.startswith("merged")]
        if self.export.source == "adapter" and merged:
            raise ValueError(
                "export.source: adapter writes no merged folder, which predict.models asks for; "
                f"take {' and '.join(merged)} out there"
            )
        missing = [kind for kind in self.predict.models if kind in GGUF_KINDS and kind not in self.export.types]
        if missing:
            raise ValueError(
                f"predict.models asks for {', '.join(missing)}, which export.types does not write; add it there"
            )
        return self

    @model_validator(mode="after")
    def _published_is_made(self) -> Config:
        if found := self.publish.obstacle(self.adapter.kind, self.export.source):
            raise ValueError(found)
        return self

    def with_decoding_mode(self, mode: DecodingMode) -> Config:
        """Return the same options with a single decoding mode."""
        return self.model_copy(update={"predict": self.predict.model_copy(update={"constrain": mode})})

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.dir / self.run.name
