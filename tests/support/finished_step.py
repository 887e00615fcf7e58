"""The manifest of a step that is done, for folders that no stage made."""

from __future__ import annotations

from pathlib import Path

from fintune.manifest import Key, Manifest, hash_files
from fintune.util.files import write_atomically


def finish(folder: Path, *, options: dict[str, object] | None = None, **facts: object) -> None:
    """Say of a folder that its step is done, with what lies in it."""
    manifest = Manifest(
        key=Key(step=folder.name, options=options or {}, sources={}, inputs={}),
        fingerprint="",
        outputs=hash_files(folder),
        facts=facts,
        versions={},
        commit=None,
        machine={},
        seed=0,
        finished="",
        seconds=0,
        peak_memory_bytes=0,
    )
    write_atomically(folder / "manifest.json", manifest.model_dump_json())
