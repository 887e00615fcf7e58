"""The options of a run. Each is one typed field with its name, default, unit and meaning.

The YAML file, ``key=value`` overrides, ``fintune config show``, the manifest of each stage and ``docs/options.md`` all
come from these fields. A field declared with :func:`neutral` cannot change a result (threads, how often to log). It is
not part of the fingerprint that decides whether a stage is up to date.
"""

from __future__ import annotations

from fintune.config.base import Options, is_advanced, is_neutral, neutral
from fintune.config.data import DataOptions, PromptOptions, Shape, SourceOptions, StatementsOptions
from fintune.config.export import ExportOptions, MergeOptions, PublishOptions, ReplayOptions, is_hub_name
from fintune.config.predict import (
    GGUF_KINDS,
    MODE_SEPARATOR,
    DecodingMode,
    ModelKind,
    PredictOptions,
    split_kind_and_mode,
)
from fintune.config.run import Config, RunOptions
from fintune.config.train import AdapterOptions, GuardOptions, ModelOptions, TrainOptions

__all__ = [
    "GGUF_KINDS",
    "MODE_SEPARATOR",
    "AdapterOptions",
    "Config",
    "DataOptions",
    "DecodingMode",
    "ExportOptions",
    "GuardOptions",
    "MergeOptions",
    "ModelKind",
    "ModelOptions",
    "Options",
    "PredictOptions",
    "PromptOptions",
    "PublishOptions",
    "ReplayOptions",
    "RunOptions",
    "Shape",
    "SourceOptions",
    "StatementsOptions",
    "TrainOptions",
    "is_advanced",
    "is_hub_name",
    "is_neutral",
    "neutral",
    "split_kind_and_mode",
]
