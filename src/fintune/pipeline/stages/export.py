"""``fintune export``: write the model as GGUF files for llama.cpp, with an Ollama Modelfile."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
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
from fintune.export.merge.merged_weights import (
    MergedWeights,
    NormalFloat,
    RoundedWeights,
    describe_merge_base,
    load_merged_weights,
)
from fintune.manifest import Facts
from fintune.models import adapter as adapters
from fintune.models import load as models
from fintune.models.folder import full_model_folder
from fintune.pipeline import disk_estimate
from fintune.util.console import bar, say, show_bytes, track
from fintune.util.disk import require_space
from fintune.util.files import read_json
from fintune.util.memory import peak_memory_bytes, release_memory, reset_peak_memory, resident_memory_bytes
from fintune.util.text import format_bytes

IMATRIX_TOKENS = 32_768
"""Number of tokens of training text for the importance matrix."""

MEMORY_LIMIT_BYTES = 300_000_000
"""Memory that an export may add to the process, for a model of any size."""


def gguf_path(config: Config, folder: Path, kind: str) -> Path:
    """Return the path of the file of a type in an export folder."""
    return folder / f"{config.run.name}-{kind}.gguf"


def export(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Write ``NAME-TYPE.gguf`` for every type of ``export.types``, in one pass over the weights or with a checkout.

    The weights are those of ``merge``, or of base and adapter (``train``), merged while they are read: the same bytes.
    The last type, by convention the smallest, gets a ``Modelfile``, unless Ollama's language cannot express the chat
    template. ``export.imatrix: compute`` also writes ``NAME-imatrix.gguf``, from the first training texts.

    Raises:
        ModelError: llama.cpp does not have the architecture, a tensor or the tokenizer.
        ArtifactError: The adapter does not change a weight that it adapts.
        ResourceError: The disk is full, or the quantisation library is missing.
    """
    if config.export.llama_cpp_path is not None:
        return _export_with_checkout(config, config.export.llama_cpp_path, inputs["merge"], folder)
    facts: Facts = {}
    imatrix_file = config.export.imatrix_file
    if config.export.computes_imatrix:
        imatrix_file = folder / f"{config.run.name}-imatrix.gguf"
        facts["imatrix_tokens"] = _compute_imatrix(config, inputs, imatrix_file)
        facts["imatrix_peak_memory_bytes"] = peak_memory_bytes()
        release_memory()
        reset_peak_memory()
    imatrix = None if imatrix_file is None else read_imatrix(imatrix_file)
    adapter = None if "merge" in inputs else inputs["train"] / "adapter"
    return facts | _stream(config, inputs.get("merge"), adapter, folder, imatrix)


def export_model(config: Config, folder: Path, *, adapter: Path | None = None) -> Facts:
    """Export a Hugging Face folder, or a base with an adapter (PEFT), without a run.

    Of the configuration ``model``, ``export`` and ``merge`` are used. ``run.name`` begins the names of the files.

    Raises:
        ConfigError: ``export.imatrix`` is ``compute``, but without a run there are no texts.
        FintuneError: The errors of :func:`export`.
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
        return _export_with_checkout(config, config.export.llama_cpp_path, ref.path, folder)
    if adapter is not None:
        adapters.check_base_name(config.model.name, adapter)
        adapters.check_adapter_base(ref.path, adapter, name=config.model.name)
    imatrix_file = config.export.imatrix_file
    imatrix = None if imatrix_file is None else read_imatrix(imatrix_file)
    return _stream(config, None if adapter is not None else ref.path, adapter, folder, imatrix)


def _stream(
    config: Config, model: Path | None, adapter: Path | None, folder: Path, imatrix: ImportanceMatrix | None
) -> Facts:
    """Write the files in one pass over a model folder, or over the configuration's model with an adapter."""
    facts: Facts = {}
    before = resident_memory_bytes()
    if model is not None:
        report, notes = _write(config, model, None, folder, imatrix)
    elif adapter is not None:
        quantised = _nf4(config)
        with _merged_while_read(config, adapter, folder, quantised) as (metadata, weights):
            report, notes = _write(config, metadata, weights, folder, imatrix)
        facts |= describe_merge_base(quantised)
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
        "imatrix": None if imatrix is None else imatrix.file,
        "eos_token": report.eos_token,
        "weight_bytes_read": report.num_bytes_read,
        "megabytes_per_second": round(report.num_bytes_read / 1e6 / max(report.seconds, 1e-3), 1),
        "memory_grown_bytes": grown,
        "memory_limit_bytes": MEMORY_LIMIT_BYTES,
        "memory_within_limit": grown <= MEMORY_LIMIT_BYTES,
        "notes": notes,
        "summary": ", ".join(f"{kind} {format_bytes(num)}" for kind, num in sizes.items()),
    }


def _compute_imatrix(config: Config, inputs: Mapping[str, Path], path: Path) -> int:
    """Compute the importance matrix of the merged model. Without a merged folder, the base gets the merged weights."""
    from datasets import load_from_disk

    base = models.fetch_base(config)
    ref = models.fetch(str(inputs["merge"])) if "merge" in inputs else base
    model: Any = models.load_model(ref, dtype=config.predict.dtype, trust_remote_code=config.model.trust_remote_code)
    if ref is base:
        with MergedWeights(base.path, inputs["train"] / "adapter", transform=_nf4(config)) as weights:
            rounded = RoundedWeights(weights, config.merge.dtype)
            load_merged_weights(model, rounded, track(rounded.tensors.values(), "merge", len(rounded.tensors)))
    rows = load_from_disk(str(inputs["prepare"] / "tokens" / "train"))
    texts = track((row["input_ids"] for row in rows), "importance matrix", len(rows))
    return compute_imatrix(model, texts, path, dataset="train", max_tokens=IMATRIX_TOKENS)


def _nf4(config: Config) -> NormalFloat | None:
    return NormalFloat() if config.merge.into == "quantized_base" else None


def _write(
    config: Config, model: Path, weights: RoundedWeights | None, folder: Path, imatrix: ImportanceMatrix | None
) -> tuple[ExportReport, list[str]]:
    outputs = {kind: gguf_path(config, folder, kind) for kind in config.export.types}
    with bar("export", 1.0) as shown:
        report = write_gguf(
            model,
            outputs,
            threads=config.export.threads or os.cpu_count() or 1,
            progress=show_bytes(shown),
            name=config.run.name,
            weights=weights,
            imatrix=imatrix,
        )
    return report, [*report.notes, *_write_modelfile(config, model, outputs[config.export.types[-1]])]


def _write_modelfile(config: Config, model: Path, file: Path) -> list[str]:
    """Write the Modelfile of a GGUF file, and return notes on differences or on why there is none."""
    try:
        text, differences = render_modelfile(model, file.name, context_tokens=config.prompt.max_length)
    except ModelError as error:
        # The GGUF files hold the chat template. Only Ollama, which has its own template language, lacks it.
        return [f"no Modelfile: {error}"]
    file.with_name("Modelfile").write_text(text, encoding="utf-8")
    return [f"Modelfile: {line}" for line in differences]


def _export_with_checkout(config: Config, path: Path, model: Path, folder: Path) -> Facts:
    """Write the files from a merged folder with the tools of a llama.cpp checkout."""
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
        "imatrix": None if config.export.imatrix_file is None else str(config.export.imatrix_file),
        "tools_seconds": round(time.monotonic() - started, 1),
        "notes": notes,
        "summary": ", ".join(f"{kind} {format_bytes(num)}" for kind, num in sizes.items())
        + ", by a llama.cpp checkout",
    }


@contextmanager
def _merged_while_read(
    config: Config, adapter: Path, folder: Path, quantised: NormalFloat | None
) -> Iterator[tuple[Path, RoundedWeights]]:
    """Yield a folder with all of a merged model but its weights, and the weights, which are computed when read."""
    if full_model_folder(adapter.parent) is not None:
        raise ArtifactError(
            f"{adapter.parent} holds a whole model and no adapter", hint="export it from the merge stage"
        )
    ref = models.fetch_base(config)
    with (
        tempfile.TemporaryDirectory(prefix=".model-", dir=folder) as temporary,
        MergedWeights(ref.path, adapter, transform=quantised) as merged,
    ):
        weights = RoundedWeights(merged, config.merge.dtype)
        # The same name as the merge stage's folder, because metadata of the file may come from the name.
        model = Path(temporary) / "merge"
        model.mkdir()
        copy_metadata(ref.path, adapter, model)
        write_json(model / "config.json", merged_config(ref.path, merged, weights.dtype))
        if not has_padding_token(model):
            write_special_tokens(model, models.load_tokenizer(replace(ref, path=model)))
        yield model, weights
