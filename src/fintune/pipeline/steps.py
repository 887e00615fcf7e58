"""The steps of a run, built from its configuration. A stage is imported when its step runs, not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from fintune.config import GGUF_KINDS, Config, DecodingMode, ModelKind, PredictOptions
from fintune.manifest import Facts
from fintune.pipeline import disk_estimate, inputs
from fintune.pipeline.step import Stage, Step

SOURCE_STEPS: Mapping[ModelKind, str] = {
    "adapter": "train",
    "adapter_4bit": "train",
    "merged": "merge",
    "merged_4bit": "merge",
    **dict.fromkeys(GGUF_KINDS, "export"),
}
"""The step whose result each kind of model is read from; "base" needs none."""

_EXAMPLES = ("run.seed", "model.name", "model.revision", "data", "prompt", "train.objective")
_MODEL = ("model.name", "model.revision", "model.trust_remote_code")
_VOCABULARY_BYTES = 100_000_000
"""A temporary GGUF of a quarter of a million tokens with 32 numbers each."""
_FIGURES_BYTES = 1_000_000
_PAGE_BYTES = 50_000_000


def build_steps(config: Config) -> list[Step]:
    """Build all steps of a run, every input before the steps that read it."""
    steps = [
        Step(
            "preflight",
            (),
            (*_MODEL, "export.llama_cpp_path"),
            _run_preflight,
            inputs.model_source,
            lambda _: _VOCABULARY_BYTES,
            check=inputs.check_model,
            about="export",
        ),
        Step(
            "prepare",
            (),
            _EXAMPLES,
            _run_prepare,
            inputs.data_and_model_sources,
            disk_estimate.prepare_bytes,
            check=inputs.check_data_and_model,
        ),
        *_measure(config, "base"),
        Step(
            "train",
            ("prepare",),
            ("run.seed", *_MODEL, "model.quantization", "adapter", "train"),
            _run_train,
            inputs.model_source,
            disk_estimate.train_bytes,
            resumes=True,
            resume_word=_describe_resumed_training,
            check=inputs.check_training_inputs,
        ),
        *_guard(config),
        *_measure(config, "adapter"),
        *_measure(config, "adapter_4bit"),
        *_merge(config),
        *_measure(config, "merged"),
        *_measure(config, "merged_4bit"),
        _export(config),
        Step(
            "replay",
            ("prepare", "train", *_merge_input(config), "export"),
            (*_MODEL, "merge.into", "predict.dtype", "replay"),
            _run_replay,
            inputs.model_source,
            lambda _: _FIGURES_BYTES,
            check=inputs.check_model,
            about="export",
        ),
        *(step for kind in GGUF_KINDS for step in _measure(config, kind)),
        *_measure(config, "endpoint"),
    ]
    names = tuple(step.name for step in steps)
    steps.append(Step("report", names, (), _run_report, inputs.no_sources, lambda _: _PAGE_BYTES))
    return [*steps, *_publish(config, steps)]


def _guard(config: Config) -> list[Step]:
    # A conversation has no official verdict, so its runs are guarded by default.
    is_enabled = config.guard.enabled
    if not (config.data.source == "chat" if is_enabled is None else is_enabled):
        return []
    options = (*_MODEL, "model.quantization", "train.dtype", "guard")
    check, size = inputs.check_model, _FIGURES_BYTES
    return [
        Step("guard", ("train",), options, _run_guard, inputs.model_source, lambda _: size, check=check, about="train")
    ]


def _merge_input(config: Config) -> tuple[str, ...]:
    return ("merge",) if config.export.source == "merged" else ()


def _merge(config: Config) -> list[Step]:
    if not _merge_input(config):
        return []
    reads, options, size = ("prepare", "train"), (*_MODEL, "merge"), disk_estimate.merge_bytes
    return [Step("merge", reads, options, _run_merge, inputs.model_source, size, check=inputs.check_base)]


def _export(config: Config) -> Step:
    """Without a merged folder, export reads the base; it reads the data only to compute an importance matrix."""
    is_direct, computes_matrix = config.export.source == "adapter", config.export.computes_imatrix
    return Step(
        "export",
        (*(["prepare"] if computes_matrix else []), *(_merge_input(config) or ("train",))),
        (
            *("export", "prompt.max_length"),  # the Modelfile states the context's length
            *((*_MODEL, "merge") if is_direct else ()),
            *(("model.trust_remote_code", "predict.dtype") if computes_matrix else ()),
        ),
        _run_export,
        inputs.base_and_importance_sources if is_direct else inputs.importance_source,
        disk_estimate.export_bytes,
        check=inputs.check_export,
    )


def _publish(config: Config, steps: Sequence[Step]) -> list[Step]:
    if not config.publish.repo_id:
        return []
    # The card reads the manifests of these; it needs neither the page nor single predictions.
    reads = tuple(step.name for step in steps if step.verb not in ("report", "predict", "preflight"))
    check, size = inputs.check_publishing, _FIGURES_BYTES
    return [Step("publish", reads, ("publish",), _run_publish, inputs.no_sources, lambda _: size, check=check)]


def _measure(config: Config, kind: ModelKind) -> list[Step]:
    if kind not in config.predict.models or config.data.source == "chat":
        return []  # a conversation has no official verdict; train.eval_steps measures the held-out loss
    pairs = (_predict_and_score(kind, name, mode) for name, mode in config.predict.named_modes(kind))
    return [step for pair in pairs for step in pair]


def _predict_and_score(kind: ModelKind, name: str, mode: DecodingMode) -> tuple[Step, Step]:
    """Build the steps of one model kind in one decoding mode; modes can be added and removed independently."""
    source = SOURCE_STEPS.get(kind)
    predict = Step(
        f"predict/{name}",
        ("prepare", *([source] if source else [])),
        (*_MODEL, *_predict_options(kind)),
        _run_predict(kind),
        inputs.model_source,
        disk_estimate.predict_bytes,
        resumes=True,
        check=inputs.check_four_bit_model if kind.endswith("_4bit") else inputs.check_model,
        view=lambda config: config.with_decoding_mode(mode),
        may_change=("predict.batch_size",),  # a user lowers it after running out of memory in the middle of a run
    )
    reads = ("prepare", predict.name)
    score = Step(f"score/{name}", reads, (), _run_score(name), inputs.no_sources, disk_estimate.predict_bytes)
    return predict, score


def _predict_options(kind: ModelKind) -> tuple[str, ...]:
    # Adding a kind to predict.models must not make the predictions of the others stale.
    assert kind in get_args(ModelKind)
    unused = {"dtype" if kind == "endpoint" else "endpoint"}
    unused |= {"engine"} if kind == "endpoint" or kind in GGUF_KINDS else set()
    names = set(PredictOptions.model_fields) - {"models", "threads", "timeout_seconds"} - unused
    return tuple(f"predict.{name}" for name in sorted(names))


def _describe_resumed_training(folder: Path) -> str:
    if (folder / "adapter").exists() or (folder / "model").exists():
        return "resume"  # training is finished, and only what follows it was interrupted
    from fintune.training import checkpoints

    complete = checkpoints.complete_checkpoints(folder / "checkpoints")
    return f"resume from step {checkpoints.step_of(complete[-1])}" if complete else "run"


def _run_preflight(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    from fintune.pipeline.stages.preflight import preflight

    return preflight(config, inputs, folder)


def _run_prepare(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    from fintune.pipeline.stages.prepare import prepare

    return prepare(config, inputs, folder)


def _run_train(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    from fintune.pipeline.stages.train import train

    return train(config, inputs, folder)


def _run_guard(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    from fintune.pipeline.stages.guard import guard

    return guard(config, inputs, folder)


def _run_merge(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    from fintune.pipeline.stages.merge import merge

    return merge(config, inputs, folder)


def _run_export(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    from fintune.pipeline.stages.export import export

    return export(config, inputs, folder)


def _run_replay(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    from fintune.pipeline.stages.replay import replay

    return replay(config, inputs, folder)


def _run_report(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    from fintune.pipeline.stages.report import report

    return report(config, inputs, folder)


def _run_publish(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    from fintune.pipeline.stages.publish import publish

    return publish(config, inputs, folder)


def _run_predict(kind: ModelKind) -> Stage:
    def run(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
        from fintune.pipeline.stages.predict import predict

        return predict(config, inputs, folder, kind=kind)

    return run


def _run_score(name: str) -> Stage:
    def run(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
        from fintune.pipeline.stages.score import score

        return score(config, inputs, folder, kind=name)

    return run
