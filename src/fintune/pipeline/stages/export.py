"""``fintune export``: the model as GGUF files for llama.cpp, with an Ollama Modelfile."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fintune.config import Config
from fintune.errors import ArtifactError, ConfigError, ModelError
from fintune.export.gguf import llama_cpp_checkout
from fintune.export.gguf.imatrix import ImportanceMatrix, compute_imatrix, read_imatrix
from fintune.export.gguf.modelfile import render_modelfile
from fintune.export.gguf.writer import ExportReport, write_gguf
from fintune.export.merge.merge import (
    copy_metadata,
    has_padding_token,
    merged_config,
    write_json,
    write_special_tokens,
)
from fintune.export.merge.merged_weights import MergedWeights, NormalFloat, describe_merge_base
from fintune.export.merge.rounded_weights import RoundedWeights, load_merged_weights
from fintune.manifest import Facts
from fintune.models import adapter as adapters
from fintune.models import load as models
from fintune.pipeline import disk_estimate
from fintune.training import full
from fintune.util.console import Bar, bar, say, track
from fintune.util.disk import require_space
from fintune.util.files import read_json
from fintune.util.memory import peak_memory_bytes, release_memory, reset_peak_memory, resident_memory_bytes
from fintune.util.text import format_bytes

IMPORTANCE_TOKENS = 32_768
"""Tokens of training text that an importance matrix is computed on."""

MEMORY_LIMIT_BYTES = 300_000_000
"""What an export may add to the memory of the process, however large the model."""


def gguf_path(config: Config, folder: Path, kind: str) -> Path:
    """Where the file of a type lies in an export folder."""
    return folder / f"{config.run.name}-{kind}.gguf"


def export(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Write every type of ``export.types`` in one reading of the weights, or by the user's llama.cpp checkout.

    The quantised types are weighed with the matrix that ``export.imatrix`` names, or with one computed from the
    beginning of the training texts of ``prepare``, which becomes ``NAME-imatrix.gguf``.

    Args:
        config: The run.
        inputs: Needs ``merge``, or ``train``: then the adapter is folded in while the base is read, and no merged
            folder is written. Both ways give the same bytes. Computing a matrix needs ``prepare``.
        folder: Gets ``NAME-TYPE.gguf`` for each type, and ``Modelfile`` for the last, the smallest by custom, where
            Ollama's language can express the chat template.

    Raises:
        ModelError: A family, tensor or tokenizer that llama.cpp does not have.
        ArtifactError: An adapter that leaves weights as they were.
        ResourceError: The disk is full, or the quantisation library is missing.
    """
    if config.export.llama_cpp_path is not None:
        return _by_checkout(config, config.export.llama_cpp_path, inputs["merge"], folder)
    facts: Facts = {}
    importance = config.export.imatrix_file
    if config.export.computes_imatrix:
        importance = folder / f"{config.run.name}-imatrix.gguf"
        facts["importance_tokens"] = _compute_importance(config, inputs, importance)
        facts["importance_peak_memory_bytes"] = peak_memory_bytes()
        release_memory()
        reset_peak_memory()
    weighed = None if importance is None else read_imatrix(importance)
    adapter = None if "merge" in inputs else inputs["train"] / "adapter"
    return facts | _stream(config, inputs.get("merge"), adapter, folder, weighed)


def export_model(config: Config, folder: Path, *, adapter: Path | None = None) -> Facts:
    """``fintune export --model``: any Hugging Face folder, or a base with an adapter, without a run.

    Args:
        config: ``model``, ``export`` and ``merge``; ``run.name`` begins the files' names.
        folder: As for :func:`export`.
        adapter: PEFT folder, folded in while the base is read.

    Raises:
        ConfigError: ``export.imatrix: compute``, for which there are no texts.
        FintuneError: As for :func:`export`.
    """
    if config.export.computes_imatrix:
        raise ConfigError(
            "export.imatrix: compute reads the training texts of a run",
            hint="name a file, or export the run",
            option="export.imatrix",
        )
    ref = models.fetch_base(config)
    if config.export.llama_cpp_path is not None:
        if adapter is not None:
            raise ConfigError(
                "export.llama_cpp_path reads a merged folder",
                hint="make one with fintune merge --model --adapter",
                option="export.llama_cpp_path",
            )
        require_space(folder, disk_estimate.export_bytes(config), "the GGUF files")
        return _by_checkout(config, config.export.llama_cpp_path, ref.path, folder)
    if adapter is not None:
        adapters.check_base_name(config.model.name, adapter)
        adapters.check_adapter_base(ref.path, adapter, name=config.model.name)
    importance = config.export.imatrix_file
    weighed = None if importance is None else read_imatrix(importance)
    return _stream(config, None if adapter is not None else ref.path, adapter, folder, weighed)


def _stream(
    config: Config, model: Path | None, adapter: Path | None, folder: Path, weighed: ImportanceMatrix | None
) -> Facts:
    """One reading of a folder, or of the configuration's model with an adapter."""
    facts: Facts = {}
    seen = NormalFloat() if config.merge.into == "quantized_base" else None
    before = resident_memory_bytes()
    if adapter is None:
        assert model is not None, "one of them is given"
        report, notes = _write(config, model, None, folder, weighed)
    else:
        with _merged_while_read(config, adapter, folder, seen) as (place, weights):
            report, notes = _write(config, place, weights, folder, weighed)
        facts |= describe_merge_base(seen)
    grown = max(0, peak_memory_bytes() - before)
    if grown > MEMORY_LIMIT_BYTES:
        notes.append(
            f"the export took {format_bytes(grown)} of memory, "
            f"more than the {format_bytes(MEMORY_LIMIT_BYTES)} it should"
        )
    for note in notes:
        say(note)
    sizes = {file.kind: file.num_bytes for file in report.files}
    return facts | {
        "source": "merged folder" if adapter is None else "base + adapter",
        "file_bytes": sizes,
        "tensors_by_type": {file.kind: dict(file.num_tensors_by_type) for file in report.files},
        "importance": None if weighed is None else weighed.file,
        "eos_token": report.eos_token,
        "weight_bytes_read": report.num_bytes_read,
        "megabytes_per_second": round(report.num_bytes_read / 1e6 / max(report.seconds, 1e-3), 1),
        "memory_grown_bytes": grown,
        "memory_limit_bytes": MEMORY_LIMIT_BYTES,
        "memory_within_limit": grown <= MEMORY_LIMIT_BYTES,
        "notes": notes,
        "summary": ", ".join(f"{kind} {format_bytes(num)}" for kind, num in sizes.items()),
    }


def _compute_importance(config: Config, inputs: Mapping[str, Path], path: Path) -> int:
    """Over the merged model; where there is no folder of it, over the base, filled with the same rounded weights."""
    from datasets import load_from_disk

    merged = inputs.get("merge")
    trust = config.model.trust_remote_code
    base = models.fetch_base(config)
    ref = base if merged is None else models.fetch(str(merged))
    model: Any = models.load_model(ref, dtype=config.predict.dtype, trust_remote_code=trust)
    if merged is None:
        seen = NormalFloat() if config.merge.into == "quantized_base" else None
        with MergedWeights(base.path, inputs["train"] / "adapter", transform=seen) as weights:
            rounded = RoundedWeights(weights, config.merge.dtype)
            load_merged_weights(model, rounded, track(rounded.tensors.values(), "merge", len(rounded.tensors)))
    rows = load_from_disk(str(inputs["prepare"] / "tokens" / "train"))
    texts = track((row["input_ids"] for row in rows), "importance", len(rows))
    return compute_imatrix(model, texts, path, dataset="train", max_tokens=IMPORTANCE_TOKENS)


def _write(
    config: Config, model: Path, weights: RoundedWeights | None, folder: Path, importance: ImportanceMatrix | None
) -> tuple[ExportReport, list[str]]:
    outputs = {kind: gguf_path(config, folder, kind) for kind in config.export.types}
    with bar("export", 1.0) as shown:
        report = write_gguf(
            model,
            outputs,
            threads=config.export.threads or os.cpu_count() or 1,
            progress=_speed(shown),
            name=config.run.name,
            weights=weights,
            imatrix=importance,
        )
    return report, [*report.notes, *_write_modelfile(config, model, outputs[config.export.types[-1]])]


def _write_modelfile(config: Config, model: Path, file: Path) -> list[str]:
    """Beside a GGUF file; a note where there can be none, or where it renders otherwise."""
    try:
        text, unlike = render_modelfile(model, file.name, context_tokens=config.prompt.max_length)
    except ModelError as error:
        # The GGUF files hold the template itself; only Ollama, which has a language of its own, goes without.
        return [f"no Modelfile: {error}"]
    file.with_name("Modelfile").write_text(text, encoding="utf-8")
    return [f"Modelfile: {line}" for line in unlike]


def _by_checkout(config: Config, path: Path, model: Path, folder: Path) -> Facts:
    """Merged folder -> a file that holds it exactly -> the quantised ones, by llama.cpp's own tools."""
    checkout = llama_cpp_checkout.check_checkout(path, config.export.types)
    outputs = {kind: gguf_path(config, folder, kind) for kind in config.export.types}
    merged = read_json(model / "config.json", ModelError)
    started = time.monotonic()
    llama_cpp_checkout.export_with_checkout(
        checkout,
        model,
        outputs,
        name=config.run.name,
        dtype=str(merged.get("dtype") or merged.get("torch_dtype")),
        threads=config.export.threads or os.cpu_count(),
        imatrix=config.export.imatrix_file,
    )
    notes = _write_modelfile(config, model, outputs[config.export.types[-1]])
    for note in notes:
        say(note)
    sizes = {kind: file.stat().st_size for kind, file in outputs.items()}
    return {
        "source": "merged folder, by a llama.cpp checkout",
        "file_bytes": sizes,
        "importance": None if config.export.imatrix_file is None else str(config.export.imatrix_file),
        "tools_seconds": round(time.monotonic() - started, 1),
        "notes": notes,
        "summary": ", ".join(f"{kind} {format_bytes(num)}" for kind, num in sizes.items())
        + ", by a llama.cpp checkout",
    }


@contextmanager
def _merged_while_read(
    config: Config, adapter: Path, folder: Path, seen: NormalFloat | None
) -> Iterator[tuple[Path, RoundedWeights]]:
    """A folder of all that a merged model holds but its weights, and the weights, which lie nowhere."""
    if full.full_model_folder(adapter.parent) is not None:
        raise ArtifactError(
            f"{adapter.parent} holds all weights of a model and no adapter", hint="export it from the merge stage"
        )
    ref = models.fetch_base(config)
    with (
        tempfile.TemporaryDirectory(prefix=".model-", dir=folder) as place,
        MergedWeights(ref.path, adapter, transform=seen) as merged,
    ):
        weights = RoundedWeights(merged, config.merge.dtype)
        # The name under which the merge stage's folder is known: what the file says of itself may come from there.
        model = Path(place) / "merge"
        model.mkdir()
        copy_metadata(ref.path, adapter, model)
        write_json(model / "config.json", merged_config(ref.path, merged, weights.dtype))
        if not has_padding_token(model):
            beside = replace(ref, path=model)
            write_special_tokens(model, models.load_tokenizer(beside))
        yield model, weights


def _speed(shown: Bar) -> Callable[[int, int], None]:
    """Progress in bytes for a bar that counts to one, with the speed behind it."""
    started, share = time.monotonic(), 0.0

    def progress(num_read: int, num_total: int) -> None:
        nonlocal share
        shown.advance(num_read / num_total - share)
        share = num_read / num_total
        shown.note(f"{num_read / 1e6 / max(time.monotonic() - started, 1e-3):.0f} MB/s")

    return progress
