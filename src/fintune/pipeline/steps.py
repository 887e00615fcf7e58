"""The steps of a run, built from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from fintune.config import GGUF_KINDS, Config, ModelKind, PredictOptions
from fintune.pipeline import disk_estimate, inputs
from fintune.pipeline.stages.export import export
from fintune.pipeline.stages.guard import guard
from fintune.pipeline.stages.merge import merge
from fintune.pipeline.stages.predict import predict
from fintune.pipeline.stages.preflight import preflight
from fintune.pipeline.stages.prepare import prepare
from fintune.pipeline.stages.publish import check_push, publish
from fintune.pipeline.stages.replay import replay
from fintune.pipeline.stages.report import report
from fintune.pipeline.stages.score import score
from fintune.pipeline.stages.train import train
from fintune.pipeline.step import Step
from fintune.training import checkpoints

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


def build_steps(config: Config) -> list[Step]:
    """Build all steps of a run, every input before the steps that read it."""
    is_chat, is_direct = config.data.source == "chat", config.export.source == "adapter"
    reads_texts = config.export.computes_imatrix
    merged = () if is_direct else ("merge",)
    examines = partial(Step, sources=inputs.model_source, check=inputs.check_model, is_cheap=True)
    steps = [
        # A temporary GGUF of a quarter of a million tokens with 32 numbers each.
        examines(
            "preflight",
            (),
            (*_MODEL, "export.llama_cpp_path"),
            preflight,
            needed_bytes=_fixed(100),
            about="export",
        ),
        Step(
            "prepare",
            (),
            _EXAMPLES,
            prepare,
            inputs.data_and_model_sources,
            disk_estimate.prepare_bytes,
            check=inputs.check_data_and_model,
        ),
        *_measure(config, "base"),
        Step(
            "train",
            ("prepare",),
            ("run.seed", *_MODEL, "model.quantization", "adapter", "train"),
            train,
            inputs.base_and_adapter_sources,
            disk_estimate.train_bytes,
            resumes=True,
            resume_word=_describe_resumed_training,
            check=inputs.check_training_inputs,
        ),
    ]
    # A conversation has no official verdict, so its runs are guarded by default.
    if is_chat if config.guard.enabled is None else config.guard.enabled:
        options = (*_MODEL, "model.quantization", "train.dtype", "guard")
        steps.append(examines("guard", ("train",), options, guard, about="train"))
    steps += [*_measure(config, "adapter"), *_measure(config, "adapter_4bit")]
    if merged:
        steps.append(
            Step(
                "merge",
                ("prepare", "train"),
                (*_MODEL, "merge"),
                merge,
                inputs.model_source,
                disk_estimate.merge_bytes,
                check=inputs.check_base,
                is_cheap=True,
            )
        )
    steps += [*_measure(config, "merged"), *_measure(config, "merged_4bit")]
    steps += [
        Step(
            "export",
            (*(["prepare"] if reads_texts else []), *(merged or ("train",))),
            (
                *("export", "prompt.max_length"),  # the Modelfile states the context's length
                *((*_MODEL, "merge") if is_direct else ()),
                *(("model.trust_remote_code", "predict.dtype") if reads_texts else ()),
            ),
            export,
            inputs.base_and_importance_sources if is_direct else inputs.importance_source,
            disk_estimate.export_bytes,
            check=inputs.check_export,
            is_cheap=True,
        ),
        examines(
            "replay",
            ("prepare", "train", *merged, "export"),
            (*_MODEL, "merge.into", "predict.dtype", "replay"),
            replay,
            about="export",
        ),
        *(step for kind in GGUF_KINDS for step in _measure(config, kind)),
        *_measure(config, "endpoint"),
    ]
    steps.append(Step("report", tuple(step.name for step in steps), (), report, needed_bytes=_fixed(50), is_cheap=True))
    if config.publish.repo_id:
        # The card reads the manifests of these; it needs neither the page nor single predictions.
        shown = tuple(step.name for step in steps if step.verb not in ("report", "predict", "preflight"))
        steps.append(Step("publish", shown, ("publish",), publish, check=lambda _: check_push()))
    return steps


def _fixed(megabytes: int) -> Callable[[Config], int]:
    return lambda _: megabytes * 1_000_000


def _measure(config: Config, kind: ModelKind) -> Iterator[Step]:
    """Yield the steps of one kind of model; decoding modes can be added and removed independently."""
    if kind not in config.predict.models or config.data.source == "chat":
        return  # a conversation has no official verdict; train.eval_steps measures the held-out loss
    # Adding a kind to predict.models must not make the predictions of the others stale.
    unused = {"models", "threads", "timeout_seconds", "dtype" if kind == "endpoint" else "endpoint"}
    unused |= {"engine"} if kind == "endpoint" or kind in GGUF_KINDS else set()
    options = (*_MODEL, *(f"predict.{name}" for name in sorted(PredictOptions.model_fields.keys() - unused)))
    for name, mode in config.predict.named_modes(kind):
        yield Step(
            f"predict/{name}",
            ("prepare", *([SOURCE_STEPS[kind]] if kind in SOURCE_STEPS else [])),
            options,
            partial(predict, kind=kind),
            inputs.model_source,
            _fixed(20),
            resumes=True,
            check=inputs.check_four_bit_model if kind.endswith("_4bit") else inputs.check_model,
            view=partial(Config.with_decoding_mode, mode=mode),
            may_change=("predict.batch_size",),  # a user lowers it after running out of memory in the middle of a run
        )
        reads = ("prepare", f"predict/{name}")
        yield Step(f"score/{name}", reads, (), partial(score, kind=name), needed_bytes=_fixed(20), is_cheap=True)


def _describe_resumed_training(folder: Path) -> str:
    if (folder / "adapter").exists() or (folder / "model").exists():
        return "resume"  # training is finished, and only what follows it was interrupted
    complete = checkpoints.complete_checkpoints(folder / "checkpoints")
    return f"resume from step {checkpoints.step_of(complete[-1])}" if complete else "run"
