"""The steps of a run, made from its configuration. A stage is imported when its step runs, not before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import get_args

from fintune import disk, llama_cpp_checkout
from fintune.artifact import Facts, sha256_file
from fintune.errors import DataError, ModelError
from fintune.options import GGUF_KINDS, Config, ModelKind, PredictOptions, Way
from fintune.selection import Stage, Step
from fintune.sources.rows import local_files, tried

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
            _model,
            lambda _: _VOCABULARY_BYTES,
            check=_check_model,
            about="export",
        ),
        Step(
            "prepare",
            (),
            _EXAMPLES,
            _stage("prepare"),
            _data_and_model,
            disk.prepare_bytes,
            check=_check_data_and_model,
        ),
        *_measure(config, "base"),
        Step(
            "train",
            ("prepare",),
            ("run.seed", *_MODEL, "model.load", "adapter", "train"),
            _stage("train"),
            _model,
            disk.train_bytes,
            resumes=True,
            resume_word=_resume_training,
            check=_check_training,
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
            _model,
            lambda _: _FIGURES_BYTES,
            check=_check_model,
            about="export",
        ),
        *(step for kind in GGUF_KINDS for step in _measure(config, kind)),
        *_measure(config, "endpoint"),
    ]
    steps.append(
        Step("report", tuple(step.name for step in steps), (), _stage("report"), _nothing, lambda _: 50_000_000)
    )
    return [*steps, *_publish(config, steps)]


def _publish(config: Config, steps: Sequence[Step]) -> list[Step]:
    """Where it is asked for, the end: what the card tells of is read, not the page or the single predictions."""
    if not config.publish.repo_id:
        return []
    told = tuple(step.name for step in steps if step.verb not in ("report", "predict", "preflight"))
    stage = _stage("publish")
    return [Step("publish", told, ("publish",), stage, _nothing, lambda _: _FIGURES_BYTES, check=_check_publishing)]


def _guard(config: Config) -> list[Step]:
    """A conversation has no official verdict, so its runs are guarded unless the user says otherwise."""
    enabled = config.guard.enabled
    if not (config.data.source == "chat" if enabled is None else enabled):
        return []
    options = (*_MODEL, "model.load", "train.precision", "guard")
    stage = _stage("guard")
    return [
        Step("guard", ("train",), options, stage, _model, lambda _: _FIGURES_BYTES, check=_check_model, about="train")
    ]


def _merged(config: Config) -> tuple[str, ...]:
    return ("merge",) if config.export.source == "merged" else ()


def _merge(config: Config) -> list[Step]:
    if not _merged(config):
        return []
    options = (*_MODEL, "merge")
    return [Step("merge", ("prepare", "train"), options, _stage("merge"), _model, disk.merge_bytes, check=_check_base)]


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
        _base_and_importance if direct else _importance,
        disk.export_bytes,
        check=_check_export,
    )


def _measure(config: Config, kind: ModelKind) -> list[Step]:
    if kind not in config.predict.models or config.data.source == "chat":
        return []  # a conversation has no official verdict; train.eval_steps measures the loss on what is held out
    steps = (_predict_and_score(kind, name, way) for name, way in config.predict.named_ways(kind))
    return [step for pair in steps for step in pair]


def _predict_and_score(kind: ModelKind, name: str, way: Way) -> tuple[Step, Step]:
    """A kind of model in one way: what that way was made with says nothing of the others, which may come and go."""
    needs = NEEDS.get(kind)
    predict = Step(
        f"predict/{name}",
        ("prepare", *([needs] if needs else [])),
        (*_MODEL, *_predict_options(kind)),
        _stage("predict", kind=kind),
        _model,
        disk.predict_bytes,
        resumes=True,
        check=_check_four_bit_model if kind.endswith("_4bit") else _check_model,
        view=lambda config: config.in_way(way),
    )
    score = Step(
        f"score/{name}", ("prepare", predict.name), (), _stage("score", kind=name), _nothing, disk.predict_bytes
    )
    return predict, score


def _predict_options(kind: ModelKind) -> tuple[str, ...]:
    # Adding a kind to predict.models must not make the predictions of the others stale.
    assert kind in get_args(ModelKind)
    others = {"precision" if kind == "endpoint" else "endpoint"}
    others |= {"engine"} if kind == "endpoint" or kind in GGUF_KINDS else set()
    names = set(PredictOptions.model_fields) - {"models", "threads"} - others
    return tuple(f"predict.{name}" for name in sorted(names))


def _stage(name: str, **fixed: str) -> Stage:
    def run(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
        stage = getattr(import_module(f"fintune.stages.{name}"), name)
        facts: Facts = stage(config, inputs, folder, **fixed)
        return facts

    return run


def _nothing(config: Config) -> dict[str, str]:
    return {}


def _model(config: Config) -> dict[str, str]:
    return {"model.name": _model_fingerprint(config.model.name, config.model.revision)}


@lru_cache(maxsize=4)
def _model_fingerprint(name: str, revision: str | None) -> str:
    from fintune import builtin, models

    if name.startswith(builtin.PREFIX):
        return builtin.describe(name).wheel_sha256  # known before it is fetched
    path = models.fetch(models.resolve(name, revision=revision)).path
    assert path is not None, "fetch fills the path"
    return models.model_fingerprint(path)


def _importance(config: Config) -> dict[str, str]:
    return {option: _content(path) for option, path in _importance_file(config)}


def _base_and_importance(config: Config) -> dict[str, str]:
    return _importance(config) | _model(config)


def _data_and_model(config: Config) -> dict[str, str]:
    # The files first: a missing one is known before the model is fetched.
    found = {option: _content(path) for option, path in _files(config)}
    return found | _model(config)


def _check_data_and_model(config: Config) -> None:
    list(_files(config))
    _check_model(config)


def _check_model(config: Config) -> None:
    from fintune.model_ref import resolve

    resolve(config.model.name, revision=config.model.revision)


def _check_base(config: Config) -> None:
    """Of training, merge and export, which need its own weights."""
    from fintune import builtin
    from fintune.model_folder import check_unquantised
    from fintune.model_ref import fetch_config

    _check_model(config)
    if not config.model.name.startswith(builtin.PREFIX):
        folder = fetch_config(config.model.name, revision=config.model.revision).path
        assert folder is not None, "fetch_config fills the path"
        check_unquantised(folder)


def _check_export(config: Config) -> None:
    list(_importance_file(config))
    if config.export.llama_cpp_path is not None:
        llama_cpp_checkout.check(config.export.llama_cpp_path, config.export.types)
    _check_base(config)


def _check_publishing(config: Config) -> None:
    import_module("fintune.stages.publish").check(config)


def _check_four_bit_model(config: Config) -> None:
    # Before hours of training.
    import_module("fintune.models").check_four_bit()
    _check_model(config)


def _check_training(config: Config) -> None:
    import_module("fintune.stages.train").check(config)
    _check_base(config)


def _resume_training(folder: Path) -> str:
    if (folder / "adapter").exists() or (folder / "model").exists():
        return "resume"  # it is trained, and only what comes behind was interrupted
    from fintune.tuning import checkpoints

    kept = checkpoints.complete(folder / "checkpoints")
    return f"resume from step {checkpoints.step_of(kept[-1])}" if kept else "run"


def _files(config: Config) -> Iterator[tuple[str, Path]]:
    if config.data.source == "chat":
        for number, source in enumerate(config.data.sources):
            # A hub dataset is what its options say; its newest is looked for when it is first read.
            yield from ((f"data.sources[{number}] {path}", path) for path in local_files(source))
        return
    for name in ("train", "eval"):
        path: Path | None = getattr(config.data, name)
        if config.data.source == "finqa" and path is not None:
            if not path.is_file():
                what = "is a folder, not a file" if path.is_dir() else "no such file"
                raise DataError(what, path=path, hint=f"data.{name} must name a FinQA JSON file{tried(path)}")
            yield f"data.{name}", path


def _importance_file(config: Config) -> Iterator[tuple[str, Path]]:
    path = config.export.importance_file
    if path is not None:
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "no such file"
            raise ModelError(f"{path}: {what}", hint="export.importance must name an importance matrix, or be compute")
        yield "export.importance", path


def _content(path: Path) -> str:
    stat = path.stat()
    return _hash(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _hash(path: Path, size: int, mtime_ns: int) -> str:
    # Size and time are only the cache's key; the fingerprint is of the content.
    return sha256_file(path)
