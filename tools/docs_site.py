"""MkDocs hooks: the measured results of bench/ become files of the site, so that the pages' links to them work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


def on_files(files: Files, *, config: Any) -> Files:
    """Add every result file as results/NAME."""
    for path in sorted(RESULTS.glob("*.json")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to ../bench/results/ at the files of the site."""
    return markdown.replace("](../bench/results/", "](results/")
