"""``fintune export``: the merged model as GGUF files for llama.cpp, with an Ollama Modelfile."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fintune.artifact import Facts
from fintune.errors import ModelError
from fintune.gguf.export import export as write_gguf
from fintune.gguf.modelfile import modelfile
from fintune.machine import size
from fintune.options import Config
from fintune.progress import bar, say


def gguf_path(config: Config, folder: Path, kind: str) -> Path:
    """Where the file of a type lies in an export folder."""
    return folder / f"{config.run.name}-{kind}.gguf"


def export(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Write every type of ``export.types`` in one reading of the merged weights.

    Args:
        config: The run.
        inputs: Needs ``merge``.
        folder: Gets ``NAME-TYPE.gguf`` for each type, and ``Modelfile`` for the last, the smallest by custom, where
            Ollama's language can express the chat template.

    Raises:
        ModelError: A family, tensor or tokenizer that llama.cpp does not have.
        ResourceError: The disk is full, or the quantisation library is missing.
    """
    outputs = {kind: gguf_path(config, folder, kind) for kind in config.export.types}
    with bar("export", 1.0) as shown:
        done = 0.0

        def progress(num_read: int, num_total: int) -> None:
            nonlocal done
            shown.advance(num_read / num_total - done)
            done = num_read / num_total

        report = write_gguf(
            inputs["merge"],
            outputs,
            threads=config.export.threads or os.cpu_count() or 1,
            progress=progress,
            name=config.run.name,
        )
    notes = list(report.notes)
    last = config.export.types[-1]
    try:
        text = modelfile(inputs["merge"], outputs[last].name, context_tokens=config.prompt.max_length)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    except ModelError as error:
        # The GGUF files hold the template itself; only Ollama, which has a language of its own, goes without.
        notes.append(f"no Modelfile: {error}")
    for note in notes:
        say(note)
    sizes = {file.kind: file.num_bytes for file in report.files}
    return {
        "file_bytes": sizes,
        "tensors_by_type": {file.kind: dict(file.num_tensors_by_type) for file in report.files},
        "eos_token": report.eos_token,
        "notes": notes,
        "summary": ", ".join(f"{kind} {size(num)}" for kind, num in sizes.items()),
    }
