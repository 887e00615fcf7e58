"""The steps of a run, made from its configuration. A stage is imported when its step runs, not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import get_args

from fintune.config import GGUF_KINDS, Config, DecodingMode, ModelKind, PredictOptions
from fintune.manifest import Facts
from fintune.pipeline import disk_estimate as disk
from fintune.pipeline import inputs as step_inputs
from fintune.pipeline.step import Stage, Step

NEEDS: Mapping[ModelKind, str] = {
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
"""A GGUF of a quarter of a million tokens and 32 numbers for each, which goes when the stage ends."""
_FIGURES_BYTES = 1_000_000


def build(config: Config) -> list[Step]:
    """All steps of a run, in an order in which every input comes before what reads it."""
    steps = [
        Step(
            "preflight",
            (),
            (*_MODEL, "export.llama_cpp_path"),
            _stage("preflight"),
            step_inputs.model,
            lambda _: _VOCABULARY_BYTES,
            check=step_inputs.check_model,
            about="export",
        ),
        Step(
            "prepare",
            (),
            _EXAMPLES,
            _stage("prepare"),
            step_inputs.data_and_model,
            disk.prepare_bytes,
            check=step_inputs.check_data_and_model,
        ),
        *_measure(config, "base"),
        Step(
            "train",
            ("prepare",),
            ("run.seed", *_MODEL, "model.load", "adapter", "train"),
            _stage("train"),
            step_inputs.model,
            disk.train_bytes,
            resumes=True,
            resume_word=_resume_training,
            check=step_inputs.check_training,
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
            ("prepare", "train", *_merged(config), "export"),
            (*_MODEL, "merge.into", "predict.precision", "replay"),
            _stage("replay"),
            step_inputs.model,
            lambda _: _FIGURES_BYTES,
            check=step_inputs.check_model,
            about="export",
        ),
        *(step for kind in GGUF_KINDS for step in _measure(config, kind)),
        *_measure(config, "endpoint"),
    ]
    steps.append(
        Step(
            "report",
            tuple(step.name for step in steps),
            (),
            _stage("report"),
            step_inputs.nothing,
            lambda _: 50_000_000,
        )
    )
    return [*steps, *_publish(config, steps)]


def _publish(config: Config, steps: Sequence[Step]) -> list[Step]:
    """Where it is asked for, the end: what the card tells of is read, not the page or the single predictions."""
    if not config.publish.repo_id:
        return []
    told = tuple(step.name for step in steps if step.verb not in ("report", "predict", "preflight"))
    stage = _stage("publish")
    return [
        Step(
            "publish",
            told,
            ("publish",),
            stage,
            step_inputs.nothing,
            lambda _: _FIGURES_BYTES,
            check=step_inputs.check_publishing,
        )
    ]


def _guard(config: Config) -> list[Step]:
    """A conversation has no official verdict, so its runs are guarded unless the user says otherwise."""
    enabled = config.guard.enabled
    if not (config.data.source == "chat" if enabled is None else enabled):
        return []
    options = (*_MODEL, "model.load", "train.precision", "guard")
    stage = _stage("guard")
    return [
        Step(
            "guard",
            ("train",),
            options,
            stage,
            step_inputs.model,
            lambda _: _FIGURES_BYTES,
            check=step_inputs.check_model,
            about="train",
        )
    ]


def _merged(config: Config) -> tuple[str, ...]:
    return ("merge",) if config.export.source == "merged" else ()


def _merge(config: Config) -> list[Step]:
    if not _merged(config):
        return []
    options = (*_MODEL, "merge")
    return [
        Step(
            "merge",
            ("prepare", "train"),
            options,
            _stage("merge"),
            step_inputs.model,
            disk.merge_bytes,
            check=step_inputs.check_base,
        )
    ]


def _export(config: Config) -> Step:
    """It reads the base only where no merged folder holds all that it needs, the data only to weigh with them."""
    direct, weighs = config.export.source == "adapter", config.export.computes_importance
    return Step(
        "export",
        (*(["prepare"] if weighs else []), *(_merged(config) or ("train",))),
        (
            *("export", "prompt.max_length"),  # what the Modelfile says of the context
            *((*_MODEL, "merge") if direct else ()),
            *(("model.trust_remote_code", "predict.precision") if weighs else ()),
        ),
        _stage("export"),
        step_inputs.base_and_importance if direct else step_inputs.importance,
        disk.export_bytes,
        check=step_inputs.check_export,
    )


def _measure(config: Config, kind: ModelKind) -> list[Step]:
    if kind not in config.predict.models or config.data.source == "chat":
        return []  # a conversation has no official verdict; train.eval_steps measures the loss on what is held out
    steps = (_predict_and_score(kind, name, mode) for name, mode in config.predict.named_modes(kind))
    return [step for pair in steps for step in pair]


def _predict_and_score(kind: ModelKind, name: str, mode: DecodingMode) -> tuple[Step, Step]:
    """The two steps of a kind of model in one decoding mode; they depend on no other mode."""
    needs = NEEDS.get(kind)
    predict = Step(
        f"predict/{name}",
        ("prepare", *([needs] if needs else [])),
        (*_MODEL, *_predict_options(kind)),
        _stage("predict", kind=kind),
        step_inputs.model,
        disk.predict_bytes,
        resumes=True,
        check=step_inputs.check_four_bit_model if kind.endswith("_4bit") else step_inputs.check_model,
        view=lambda config: config.with_decoding_mode(mode),
        may_change=("predict.batch_size",),  # what the advice on memory lowers, amid a run whose other kinds are done
    )
    score = Step(
        f"score/{name}",
        ("prepare", predict.name),
        (),
        _stage("score", kind=name),
        step_inputs.nothing,
        disk.predict_bytes,
    )
    return predict, score


def _predict_options(kind: ModelKind) -> tuple[str, ...]:
    # Adding a kind to predict.models must not make the predictions of the others stale.
    assert kind in get_args(ModelKind)
    others = {"precision" if kind == "endpoint" else "endpoint"}
    others |= {"engine"} if kind == "endpoint" or kind in GGUF_KINDS else set()
    names = set(PredictOptions.model_fields) - {"models", "threads", "timeout_seconds"} - others
    return tuple(f"predict.{name}" for name in sorted(names))


def _stage(name: str, **fixed: str) -> Stage:
    def run(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
        stage = getattr(import_module(f"fintune.pipeline.stages.{name}"), name)
        facts: Facts = stage(config, inputs, folder, **fixed)
        return facts

    return run


def _resume_training(folder: Path) -> str:
    if (folder / "adapter").exists() or (folder / "model").exists():
        return "resume"  # it is trained, and only what comes behind was interrupted
    from fintune.training import checkpoints

    kept = checkpoints.complete(folder / "checkpoints")
    return f"resume from step {checkpoints.step_of(kept[-1])}" if kept else "run"
