"""A whole run: its sections, and which options do not work together."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, model_validator

from fintune.config.base import Options, neutral
from fintune.config.data import DataOptions, PromptOptions
from fintune.config.export import GGUF_TYPES, ExportOptions, MergeOptions, PublishOptions, ReplayOptions, is_hub_name
from fintune.config.predict import GGUF_KINDS, DecodingMode, PredictOptions
from fintune.config.train import ADAM_BETA2, BETA, AdapterOptions, GuardOptions, ModelOptions, TrainOptions


class RunOptions(Options):
    """Where the run is stored and what makes it repeatable."""

    name: str = neutral("")
    """Name of the run's folder (default: the name of the configuration file)."""
    dir: Path = neutral(Path("runs"))
    """Folder that contains all runs."""
    seed: int = Field(17, ge=0, lt=2**32)
    """Seed of data generation, sampling, adapter initialization and shuffling."""


class Config(Options):
    """A whole run."""

    run: RunOptions = RunOptions()
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    prompt: PromptOptions = PromptOptions()
    adapter: AdapterOptions = AdapterOptions()
    train: TrainOptions = TrainOptions()
    guard: GuardOptions = GuardOptions()
    merge: MergeOptions = MergeOptions()
    export: ExportOptions = ExportOptions()
    replay: ReplayOptions = ReplayOptions()
    predict: PredictOptions = PredictOptions()
    publish: PublishOptions = PublishOptions()

    @model_validator(mode="after")
    def _check_rules(self) -> Config:
        for rules in (_data_rules, _export_rules, _training_rules, _preference_rules):
            if reason := next((message for is_broken, message in rules(self) if is_broken), None):
                raise ValueError(reason)
        return self

    def with_decoding_mode(self, mode: DecodingMode) -> Config:
        """Return a copy whose completions are constrained in this mode only."""
        return self.model_copy(update={"predict": self.predict.model_copy(update={"constrain": mode})})

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.dir / self.run.name


Rules = Iterator[tuple[bool, str]]
"""Rules about options: whether a configuration breaks each, and what is wrong and how to fix it."""


def _data_rules(config: Config) -> Rules:
    data, predict = config.data, config.predict
    yield (
        data.source == "finqa" and (data.train is None or data.eval is None),
        "data.source: finqa needs data.train and data.eval; set both to FinQA JSON files",
    )
    yield (
        data.source == "chat" and not data.sources,
        "data.source: chat needs data.sources; set it to a list of files, folders or hub:OWNER/NAME",
    )
    yield (
        data.source != "chat" and bool(data.sources),
        f"data.sources is not read with data.source: {data.source}; set data.source: chat",
    )
    yield (
        predict.strategy == "vote" and predict.num_candidates == 1,
        "predict.strategy: vote needs several candidates; set predict.num_candidates to 8, for example",
    )
    yield (
        predict.strategy in ("greedy", "sample") and predict.num_candidates > 1,
        f"predict.num_candidates is not read with predict.strategy: {predict.strategy}; "
        "set execution_guided or vote, or remove it",
    )
    yield (
        "endpoint" in predict.models and predict.endpoint is None,
        "predict.models asks for endpoint; set predict.endpoint to its address",
    )


def _export_rules(config: Config) -> Rules:
    export, publish, kind = config.export, config.publish, config.adapter.kind
    is_direct = export.source == "adapter"
    for type_ in export.types:
        near = difflib.get_close_matches(type_, GGUF_TYPES, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else f"known types are {', '.join(GGUF_TYPES)}"
        is_unknown = export.llama_cpp_path is None and type_ not in GGUF_TYPES
        yield is_unknown, f"export.types: unknown GGUF type {type_!r}: {hint}"
    yield (
        export.llama_cpp_path is not None and is_direct,
        "export.llama_cpp_path reads the merged folder, which export.source: adapter does not write; remove one",
    )
    yield (
        export.llama_cpp_path is not None and export.computes_imatrix,
        "export.imatrix: compute does not work with export.llama_cpp_path; name a file",
    )
    yield (
        export.imatrix is not None and {"F32", "F16", "BF16"}.issuperset(export.types),
        f"export.imatrix weights quantized types, and export.types has only {', '.join(export.types)}; "
        "add one such as Q4_K_M, or remove it",
    )
    for option in ("repo_id", "base_model"):
        name = getattr(publish, option)
        is_wrong = name is not None and not is_hub_name(name)
        yield is_wrong, f"publish.{option}: {name!r} is not a valid hub name; write OWNER/NAME"
    has_twice = len(set(publish.artifacts)) < len(publish.artifacts)
    yield has_twice, "publish.artifacts names something twice; once is enough"
    yield (
        publish.each_epoch and not publish.repo_id,
        "publish.each_epoch needs a repository; set publish.repo_id",
    )
    yield (
        is_direct and kind == "full",
        "export.source: adapter needs an adapter, which adapter.kind: full lacks; use merged",
    )
    if publish.repo_id:
        pushed = "publish.each_epoch" if publish.each_epoch else "publish.artifacts: adapter"
        yield (
            kind == "full" and ("adapter" in publish.artifacts or publish.each_epoch),
            f"{pushed} pushes an adapter, and adapter.kind: full has none; set publish.artifacts to merged or gguf",
        )
        yield (
            is_direct and "merged" in publish.artifacts,
            "publish.artifacts: merged needs the merged folder, which export.source: adapter does not write",
        )
    if config.data.source != "chat":  # a conversation has no official verdict, so nothing is predicted
        merged = [measured for measured in config.predict.models if measured.startswith("merged")]
        yield (
            is_direct and bool(merged),
            "export.source: adapter writes no merged folder, which predict.models asks for; "
            f"remove {' and '.join(merged)} there",
        )
        missing = [type_ for type_ in config.predict.models if type_ in GGUF_KINDS and type_ not in export.types]
        yield (
            bool(missing),
            f"predict.models asks for {', '.join(missing)}, which export.types does not write; add it there",
        )


def _training_rules(config: Config) -> Rules:
    adapter, train = config.adapter, config.train
    init, is_four_bit, is_full = adapter.init_lora_weights, config.model.quantization == "nf4", adapter.kind == "full"
    names = adapter.target_modules
    yield not names, "adapter.target_modules: name at least one layer, or all-linear"
    yield (
        "all-linear" in names and len(names) > 1,
        "adapter.target_modules: all-linear already means every layer; remove it or the others",
    )
    needing = [f"train.select_checkpoint: {train.select_checkpoint}"] if train.select_checkpoint != "last" else []
    needing += ["train.early_stopping_patience"] if train.early_stopping_patience is not None else []
    yield (
        bool(needing) and not train.has_evaluations,
        f"{' and '.join(needing)} needs evaluations; set train.eval_steps",
    )
    yield (
        train.adam_beta2 != ADAM_BETA2 and "adamw" not in train.optim,
        f"train.adam_beta2 is not read with train.optim: {train.optim}; remove it, or set it to {ADAM_BETA2}",
    )
    yield (
        train.eval_strategy == "epoch" and train.eval_steps is not None,
        "train.eval_steps is not read with train.eval_strategy: epoch; remove one of them",
    )
    yield (
        is_full and is_four_bit,
        "adapter.kind: full trains the weights themselves, which model.quantization: nf4 freezes; use lora",
    )
    option = "adapter.use_rslora" if adapter.use_rslora else f"adapter.init_lora_weights: {init}"
    yield (
        is_full and (init != "default" or adapter.use_rslora),
        f"{option} is about an adapter, and adapter.kind: full has none; remove it",
    )
    yield (
        is_full and train.fused_layers == "always",
        "train.fused_layers: always freezes the base weights, which adapter.kind: full trains",
    )
    yield (
        init == "pissa" and is_four_bit,
        "adapter.init_lora_weights: pissa needs 16-bit weights; use loftq with model.quantization: nf4",
    )
    yield (
        init == "loftq" and not is_four_bit,
        "adapter.init_lora_weights: loftq needs 4-bit weights; set model.quantization: nf4",
    )
    yield (
        init == "loftq" and adapter.kind == "dora",
        "adapter.init_lora_weights: loftq is not supported with adapter.kind: dora; use lora",
    )
    yield (
        config.merge.into == "quantized_base" and not is_four_bit,
        "merge.into: quantized_base needs 4-bit training; set model.quantization: nf4, or remove it",
    )
    yield (
        train.select_checkpoint == "best_accuracy" and config.data.source == "chat",
        "train.select_checkpoint: best_accuracy needs gold programs, which data.source: chat lacks",
    )


def _preference_rules(config: Config) -> Rules:
    train, adapter, source = config.train, config.adapter, config.data.source
    objective = f"train.objective: {train.objective}"
    weights = [name for name in ("desirable_weight", "undesirable_weight") if getattr(train, name) is not None]
    other = "" if train.objective == "sft" else f", not to {train.objective}"
    if train.objective == "sft":
        has_beta = train.beta != BETA
        yield has_beta, "train.beta has no effect with train.objective: sft; set dpo, orpo or kto, or remove it"
    else:
        labelled = " or labelled answers (prompt, completion, label)" if train.objective == "kto" else ""
        yield (
            source != "chat",
            f"{objective} compares answers, which data.source: {source} lacks; set data.source: chat and name "
            f"preference rows (prompt, chosen, rejected){labelled} in data.sources",
        )
        yield (
            adapter.kind == "full",
            f"{objective} is not supported with adapter.kind: full, since its reference is the model without the "
            "adapter; use lora or dora",
        )
        yield (
            adapter.init_lora_weights != "default",
            f"{objective} is not supported with adapter.init_lora_weights: {adapter.init_lora_weights}, whose adapter "
            "changes the model before the first step; use default",
        )
        yield (
            adapter.lora_dropout > 0,
            f"{objective} is not supported with adapter.lora_dropout: model and reference must be equal at first; "
            "set it to 0",
        )
        yield (
            train.fused_layers == "always",
            f"{objective} is not supported with train.fused_layers: always; set it to auto or never",
        )
        yield (
            train.objective == "kto" and train.per_device_train_batch_size * train.gradient_accumulation_steps < 2,
            f"{objective} compares answers to different prompts in a step; set "
            "train.per_device_train_batch_size to 2 or more",
        )
    is_wrong = train.rpo_alpha > 0 and train.objective != "dpo"
    yield is_wrong, f"train.rpo_alpha belongs to train.objective: dpo{other}; remove it"
    for name in weights:
        yield train.objective != "kto", f"train.{name} belongs to train.objective: kto{other}; remove it"
