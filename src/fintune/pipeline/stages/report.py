"""The stage ``report``: one HTML page of a run, from the results of its finished stages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from fintune.config import GGUF_KINDS, MODE_SEPARATOR, Config, split_kind_and_mode
from fintune.errors import ArtifactError
from fintune.evaluation.scoring import read_score, read_verdicts
from fintune.manifest import MANIFEST, Facts, Manifest
from fintune.records import Example, FinQARecord, Prediction
from fintune.report.formatting import KIND_LABELS
from fintune.report.run_data import ModelResults, RunData
from fintune.report.run_page import render_run
from fintune.util.files import write_atomically
from fintune.util.text import first_line

M = TypeVar("M", bound=BaseModel)


def report(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Write ``index.html``. Every step is optional; without it, its section is left out.

    Raises:
        ArtifactError: A file of a finished stage cannot be read.
    """
    run = collect(config, inputs)
    html = render_run(run)
    write_atomically(folder / "index.html", html)
    num_bytes = len(html.encode())
    return {
        "num_examples": len(run.records),
        "num_kinds": len(run.first_mode),
        "page_bytes": num_bytes,
        "summary": f"index.html, {num_bytes / 1e6:.1f} MB",
    }


def collect(config: Config, inputs: Mapping[str, Path]) -> RunData:
    """Read the data of the page from the folders of the finished stages.

    Raises:
        ArtifactError: A file is missing or cannot be read.
    """
    prepare, train = inputs.get("prepare"), inputs.get("train")
    examples = _models(prepare / "eval.jsonl", Example) if prepare else ()
    return RunData(
        config=config,
        results=list(_results(config, inputs)),
        metrics=list(_json_lines(train / "metrics.jsonl")) if train else [],
        replay=_json_object(inputs["replay"] / "replay.json") if "replay" in inputs else {},
        guard=_json_object(inputs["guard"] / "guard.json") if "guard" in inputs else {},
        data=_json_object(prepare / "report.json") if prepare else {},
        records=_records(prepare / "gold.json") if prepare else [],
        num_cut={example.id: example.num_cut for example in examples},
        manifests={step: _manifest(path) for step, path in inputs.items()},
        token_names=_token_names(inputs),
    )


def _results(config: Config, inputs: Mapping[str, Path]) -> Iterator[ModelResults]:
    """Read the results of every mode and kind. Steps of the first mode have the kinds' own names."""
    for index, mode in enumerate(config.predict.decoding_modes):
        for kind in KIND_LABELS:
            name = f"{kind}{MODE_SEPARATOR}{mode}" if index else kind
            predict, score = inputs.get(f"predict/{name}"), inputs.get(f"score/{name}")
            if predict is None:
                continue
            rows = _models(predict / "predictions.jsonl", Prediction)
            yield ModelResults(
                kind,
                mode if index else "",
                {row.id: row for row in rows},
                read_verdicts(score / "score.csv") if score else {},
                read_score(score / "score.json") if score else None,
                _weights_bytes(kind, inputs),
            )


def _weights_bytes(kind: str, inputs: Mapping[str, Path]) -> int | None:
    patterns: dict[str, tuple[str, str]] = {
        "adapter": ("train", "[am]*/*model*.safetensors"),  # adapter/, or model/ after full fine-tuning
        "merged": ("merge", "*.safetensors"),
        **{gguf: ("export", f"*-{gguf}.gguf") for gguf in GGUF_KINDS},
    }
    step, pattern = patterns.get(kind, ("", ""))
    files = list(inputs[step].glob(pattern)) if step in inputs else []
    return sum(file.stat().st_size for file in files) if files else None


def _manifest(folder: Path) -> Manifest:
    with _reading(folder / MANIFEST):
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())


def _token_names(inputs: Mapping[str, Path]) -> dict[int, str]:
    """Read tokens by id from a ``tokenizer.json`` of the run, as plain JSON: no tokenizer library is needed."""
    folders = [inputs[step] / below for step, below in (("merge", "."), ("train", "adapter")) if step in inputs]
    files = (folder / "tokenizer.json" for folder in folders)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return {}
    tokenizer = _json_object(file)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    names = {number: token for token, number in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    names |= {added["id"]: added["content"] for added in tokenizer.get("added_tokens", [])}
    # Byte-level BPE writes space and newline with the first two letters, SentencePiece writes a space with the third.
    return {number: token.translate({0x120: " ", 0x10A: "\n", 0x2581: " "}) for number, token in names.items()}


def _records(path: Path) -> list[FinQARecord]:
    with _reading(path):
        return [FinQARecord.model_validate(row) for row in json.loads(path.read_bytes())]


def _models(path: Path, model: type[M]) -> Iterator[M]:
    with _reading(path):
        yield from map(model.model_validate, _json_lines(path))


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with _reading(path), path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _json_object(path: Path) -> dict[str, Any]:
    with _reading(path):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file and the step to rerun if the file is missing or has another form."""
    try:
        yield
    except (OSError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        name, above = path.parent.name, path.parent.parent.name
        step = f"{above}/{name}" if split_kind_and_mode(name)[0] in KIND_LABELS else name
        message = f"{path} cannot be read ({first_line(error)})"
        raise ArtifactError(message, hint=f"--redo {step} reruns it") from None
