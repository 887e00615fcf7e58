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
            for reason in rules(self):
                raise ValueError(reason)
        return self

    def with_decoding_mode(self, mode: DecodingMode) -> Config:
        """Return a copy whose completions are constrained in this mode only."""
        return self.model_copy(update={"predict": self.predict.model_copy(update={"constrain": mode})})

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.dir / self.run.name


# Each yields what is wrong and how to fix it, for every rule that a configuration breaks.


def _data_rules(config: Config) -> Iterator[str]:
    data, predict = config.data, config.predict
    if data.source == "finqa" and (data.train is None or data.eval is None):
        yield "data.source: finqa needs data.train and data.eval; set both to FinQA JSON files"
    if data.source == "chat" and not data.sources:
        yield "data.source: chat needs data.sources; set it to a list of files, folders or hub:OWNER/NAME"
    if data.source != "chat" and data.sources:
        yield f"data.sources is not read with data.source: {data.source}; set data.source: chat"
    if predict.strategy == "vote" and predict.num_candidates == 1:
        yield "predict.strategy: vote needs several candidates; set predict.num_candidates to 8, for example"
    if predict.strategy in ("greedy", "sample") and predict.num_candidates > 1:
        yield (
            f"predict.num_candidates is not read with predict.strategy: {predict.strategy}; "
            "set execution_guided or vote, or remove it"
        )
    if "endpoint" in predict.models and predict.endpoint is None:
        yield "predict.models asks for endpoint; set predict.endpoint to its address"


def _export_rules(config: Config) -> Iterator[str]:  # noqa: PLR0912 - a branch for each rule
    export, publish, kind = config.export, config.publish, config.adapter.kind
    is_direct = export.source == "adapter"
    for type_ in export.types:
        near = difflib.get_close_matches(type_, GGUF_TYPES, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else f"known types are {', '.join(GGUF_TYPES)}"
        if export.llama_cpp_path is None and type_ not in GGUF_TYPES:
            yield f"export.types: unknown GGUF type {type_!r}: {hint}"
    if export.llama_cpp_path is not None and is_direct:
        yield "export.llama_cpp_path reads the merged folder, which export.source: adapter does not write; remove one"
    if export.llama_cpp_path is not None and export.computes_imatrix:
        yield "export.imatrix: compute does not work with export.llama_cpp_path; name a file"
    if export.imatrix is not None and {"F32", "F16", "BF16"}.issuperset(export.types):
        yield (
            f"export.imatrix weights quantized types, and export.types has only {', '.join(export.types)}; "
            "add one such as Q4_K_M, or remove it"
        )
    for option in ("repo_id", "base_model"):
        name = getattr(publish, option)
        if name is not None and not is_hub_name(name):
            yield f"publish.{option}: {name!r} is not a valid hub name; write OWNER/NAME"
    if len(set(publish.artifacts)) < len(publish.artifacts):
        yield "publish.artifacts names something twice; once is enough"
    if publish.each_epoch and not publish.repo_id:
        yield "publish.each_epoch needs a repository; set publish.repo_id"
    if is_direct and kind == "full":
        yield "export.source: adapter needs an adapter, which adapter.kind: full lacks; use merged"
    if publish.repo_id:
        pushed = "publish.each_epoch" if publish.each_epoch else "publish.artifacts: adapter"
        if kind == "full" and ("adapter" in publish.artifacts or publish.each_epoch):
            yield (
                f"{pushed} pushes an adapter, and adapter.kind: full has none; set publish.artifacts to merged or gguf"
            )
        if is_direct and "merged" in publish.artifacts:
            yield "publish.artifacts: merged needs the merged folder, which export.source: adapter does not write"
    if config.data.source != "chat":  # a conversation has no official verdict, so nothing is predicted
        merged = [measured for measured in config.predict.models if measured.startswith("merged")]
        if is_direct and merged:
            yield (
                "export.source: adapter writes no merged folder, which predict.models asks for; "
                f"remove {' and '.join(merged)} there"
            )
        missing = [type_ for type_ in config.predict.models if type_ in GGUF_KINDS and type_ not in export.types]
        if missing:
            yield f"predict.models asks for {', '.join(missing)}, which export.types does not write; add it there"


def _training_rules(config: Config) -> Iterator[str]:  # noqa: PLR0912 - a branch for each rule
    adapter, train = config.adapter, config.train
    init, is_four_bit, is_full = adapter.init_lora_weights, config.model.quantization == "nf4", adapter.kind == "full"
    names = adapter.target_modules
    if not names:
        yield "adapter.target_modules: name at least one layer, or all-linear"
    if "all-linear" in names and len(names) > 1:
        yield "adapter.target_modules: all-linear already means every layer; remove it or the others"
    needing = [f"train.select_checkpoint: {train.select_checkpoint}"] if train.select_checkpoint != "last" else []
    needing += ["train.early_stopping_patience"] if train.early_stopping_patience is not None else []
    if needing and not train.has_evaluations:
        yield f"{' and '.join(needing)} needs evaluations; set train.eval_steps"
    if train.adam_beta2 != ADAM_BETA2 and "adamw" not in train.optim:
        yield f"train.adam_beta2 is not read with train.optim: {train.optim}; remove it, or set it to {ADAM_BETA2}"
    if train.eval_strategy == "epoch" and train.eval_steps is not None:
        yield "train.eval_steps is not read with train.eval_strategy: epoch; remove one of them"
    if is_full and is_four_bit:
        yield "adapter.kind: full trains the weights themselves, which model.quantization: nf4 freezes; use lora"
    option = "adapter.use_rslora" if adapter.use_rslora else f"adapter.init_lora_weights: {init}"
    if is_full and (init != "default" or adapter.use_rslora):
        yield f"{option} is about an adapter, and adapter.kind: full has none; remove it"
    if adapter.continue_from is not None and (is_full or init != "default"):
        cause = "adapter.kind: full" if is_full else f"adapter.init_lora_weights: {init}"
        yield f"adapter.continue_from trains a given adapter, which {cause} does not allow; remove one of them"
    if is_full and train.fused_layers == "always":
        yield "train.fused_layers: always freezes the base weights, which adapter.kind: full trains"
    if init == "pissa" and is_four_bit:
        yield "adapter.init_lora_weights: pissa needs 16-bit weights; use loftq with model.quantization: nf4"
    if init == "loftq" and not is_four_bit:
        yield "adapter.init_lora_weights: loftq needs 4-bit weights; set model.quantization: nf4"
    if init == "loftq" and adapter.kind == "dora":
        yield "adapter.init_lora_weights: loftq is not supported with adapter.kind: dora; use lora"
    if config.merge.into == "quantized_base" and not is_four_bit:
        yield "merge.into: quantized_base needs 4-bit training; set model.quantization: nf4, or remove it"
    if train.select_checkpoint == "best_accuracy" and config.data.source == "chat":
        yield "train.select_checkpoint: best_accuracy needs gold programs, which data.source: chat lacks"


def _preference_rules(config: Config) -> Iterator[str]:
    train, adapter, source = config.train, config.adapter, config.data.source
    objective = f"train.objective: {train.objective}"
    weights = [name for name in ("desirable_weight", "undesirable_weight") if getattr(train, name) is not None]
    other = "" if train.objective == "sft" else f", not to {train.objective}"
    if train.objective == "sft":
        if train.beta != BETA:
            yield "train.beta has no effect with train.objective: sft; set dpo, orpo or kto, or remove it"
    else:
        labelled = " or labelled answers (prompt, completion, label)" if train.objective == "kto" else ""
        if source != "chat":
            yield (
                f"{objective} compares answers, which data.source: {source} lacks; set data.source: chat and name "
                f"preference rows (prompt, chosen, rejected){labelled} in data.sources"
            )
        if adapter.kind == "full":
            yield (
                f"{objective} is not supported with adapter.kind: full, since its reference is the model without the "
                "adapter; use lora or dora"
            )
        if adapter.init_lora_weights != "default":
            yield (
                f"{objective} is not supported with adapter.init_lora_weights: {adapter.init_lora_weights}, whose "
                "adapter changes the model before the first step; use default"
            )
        if adapter.lora_dropout > 0:
            yield (
                f"{objective} is not supported with adapter.lora_dropout: model and reference must be equal at first; "
                "set it to 0"
            )
        if train.fused_layers == "always":
            yield f"{objective} is not supported with train.fused_layers: always; set it to auto or never"
        if train.objective == "kto" and train.per_device_train_batch_size * train.gradient_accumulation_steps < 2:
            yield (
                f"{objective} compares answers to different prompts in a step; set "
                "train.per_device_train_batch_size to 2 or more"
            )
    if train.rpo_alpha > 0 and train.objective != "dpo":
        yield f"train.rpo_alpha belongs to train.objective: dpo{other}; remove it"
    for name in weights:
        if train.objective != "kto":
            yield f"train.{name} belongs to train.objective: kto{other}; remove it"
