"""``fintune report``: one HTML page of a run, from whatever its stages have left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fintune.config import GGUF_KINDS, MODE_SEPARATOR, Config, DecodingMode, split_kind_and_mode
from fintune.errors import ArtifactError
from fintune.evaluation.scoring import read_score, read_verdicts
from fintune.manifest import MANIFEST, Facts, Manifest
from fintune.records import Example, FinQARecord, Prediction
from fintune.report.page import render
from fintune.report.run_page import KINDS, Made, Measured, ModeResults, RunPage
from fintune.util.files import write_atomically

M = TypeVar("M", bound=BaseModel)


def report(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Write ``index.html`` into ``folder``.

    Args:
        config: The run.
        inputs: Finished folders by step name; every one is optional, its part of the page is left out without it.
        folder: Gets the page.

    Returns:
        Number of examples and models shown, and the size of the page.

    Raises:
        ArtifactError: A file of a finished stage that cannot be read.
    """
    page = collect(config, inputs)
    html = render(page)
    write_atomically(folder / "index.html", html)
    num_bytes = len(html.encode())
    return {
        "num_examples": len(page.records),
        "num_kinds": len(page.predictions),
        "page_bytes": num_bytes,
        "summary": f"index.html, {num_bytes / 1e6:.1f} MB",
    }


def collect(config: Config, inputs: Mapping[str, Path]) -> RunPage:
    """Read what the page needs from the folders of the finished stages.

    Raises:
        ArtifactError: A file that is missing or cannot be read.
    """
    first, *others = (_way(way, place, inputs) for place, way in enumerate(config.predict.decoding_modes))
    prepare, train = inputs.get("prepare"), inputs.get("train")
    return RunPage(
        name=config.run.name,
        config=config,
        measured=first.measured,
        metrics=list(_objects(train / "metrics.jsonl")) if train else [],
        replay=_object(inputs["replay"] / "replay.json") if "replay" in inputs else {},
        guard=_object(inputs["guard"] / "guard.json") if "guard" in inputs else {},
        data=_object(prepare / "report.json") if prepare else {},
        records=_records(prepare / "gold.json") if prepare else [],
        num_cut={e.id: e.num_cut for e in _lines(prepare / "eval.jsonl", Example)} if prepare else {},
        predictions=first.predictions,
        verdicts=first.verdicts,
        made=[_made(step, path) for step, path in inputs.items()],
        token_names=_token_names(inputs),
        other_modes=[other for other in others if other.predictions],
    )


def _way(way: DecodingMode, place: int, inputs: Mapping[str, Path]) -> ModeResults:
    """One way of ``predict.constrain``, by its place there: the first has the kinds' own names."""
    names = {kind: f"{kind}{MODE_SEPARATOR}{way}" if place else kind for kind in KINDS}
    predictions = {
        kind: {prediction.id: prediction for prediction in _lines(inputs[step] / "predictions.jsonl", Prediction)}
        for kind, name in names.items()
        if (step := f"predict/{name}") in inputs
    }
    verdicts = {
        kind: read_verdicts(inputs[step] / "score.csv")
        for kind, name in names.items()
        if (step := f"score/{name}") in inputs
    }
    measured = [
        _measured(kind, inputs, inputs[f"score/{names[kind]}"] / "score.json", predictions[kind])
        for kind in verdicts
        if kind in predictions
    ]
    return ModeResults(way, measured, predictions, verdicts)


def _measured(kind: str, inputs: Mapping[str, Path], score: Path, predictions: Mapping[str, Prediction]) -> Measured:
    return Measured(
        kind=kind,
        score=read_score(score),
        num_unended=sum(prediction.finish_reason == "length" for prediction in predictions.values()),
        predict_seconds=sum(prediction.seconds for prediction in predictions.values()),
        weights_bytes=_weights_bytes(kind, inputs),
    )


def _weights_bytes(kind: str, inputs: Mapping[str, Path]) -> int | None:
    places: dict[str, tuple[str, str]] = {
        "adapter": ("train", "[am]*/*model*.safetensors"),  # adapter/, or model/ where all weights were trained
        "merged": ("merge", "*.safetensors"),
        **{gguf: ("export", f"*-{gguf}.gguf") for gguf in GGUF_KINDS},
    }
    step, pattern = places.get(kind, ("", ""))
    files = list(inputs[step].glob(pattern)) if step in inputs else []
    return sum(file.stat().st_size for file in files) if files else None


def _made(step: str, folder: Path) -> Made:
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from None
    return Made(
        step=step,
        finished=manifest.finished,
        fingerprint=manifest.fingerprint,
        seconds=manifest.seconds,
        peak_memory_bytes=manifest.peak_memory_bytes,
        seed=manifest.seed,
        commit=manifest.commit,
        versions=manifest.versions,
        machine=manifest.machine,
    )


def _token_names(inputs: Mapping[str, Path]) -> dict[int, str]:
    """Tokens by id from a ``tokenizer.json`` of the run, read as plain JSON so that no tokenizer library is needed."""
    places = [inputs[step] / below for step, below in (("merge", "."), ("train", "adapter")) if step in inputs]
    file = next((place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None)
    if file is None:
        return {}
    tokenizer = _object(file)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    names = {number: token for token, number in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    names |= {added["id"]: added["content"] for added in tokenizer.get("added_tokens", [])}
    # Byte-level BPE writes space and newline with these letters, SentencePiece writes a space with the third.
    return {number: token.translate({0x120: " ", 0x10A: "\n", 0x2581: " "}) for number, token in names.items()}


def _records(path: Path) -> list[FinQARecord]:
    try:
        return [FinQARecord.model_validate(row) for row in json.loads(path.read_bytes())]
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from None


def _lines(path: Path, kind: type[M]) -> Iterator[M]:
    for row in _objects(path):
        try:
            yield kind.model_validate(row)
        except ValidationError as error:
            raise _unreadable(path, str(error).splitlines()[0]) from None


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from None


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from None
    if not isinstance(found, dict):
        raise _unreadable(path, "not a JSON object")
    return found


def _unreadable(path: Path, reason: str) -> ArtifactError:
    name, above = path.parent.name, path.parent.parent.name
    step = f"{above}/{name}" if split_kind_and_mode(name)[0] in KINDS else name
    return ArtifactError(f"{path}: cannot be read ({reason})", hint=f"--redo {step} makes it anew")
