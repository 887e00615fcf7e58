"""A llama.cpp checkout whose tools are stand-ins: they say what they were called with, and write files that load."""

from __future__ import annotations

from pathlib import Path

# Writes a real file by way of this package, which knows the family by its other name.
CONVERTER = """import json, shutil, sys, tempfile
from pathlib import Path
if "--help" in sys.argv:
    sys.exit("usage: convert_hf_to_gguf.py MODEL")
from fintune.export.gguf.writer import write_gguf
words = sys.argv[1:]
kind = words[words.index("--outtype") + 1].upper()
out = Path(words[words.index("--outfile") + 1])
with (Path(__file__).parent / "calls.txt").open("a") as calls:
    calls.write(f"convert {kind}{' vocabulary' * ('--vocab-only' in words)}\\n")
with tempfile.TemporaryDirectory() as place:
    model = Path(shutil.copytree(words[0], Path(place) / "model"))
    config = json.loads((model / "config.json").read_text()) | {"model_type": "llama"}
    (model / "config.json").write_text(json.dumps(config))
    write_gguf(model, {kind: out}, name=words[words.index("--model-name") + 1] if "--model-name" in words else None)
"""
QUANTIZER = """#!/bin/sh
[ "$1" = --help ] && { echo "usage: llama-quantize" >&2; exit 1; }
[ "$1" = --imatrix ] && { weighed=" weighed"; shift 2; }
echo "quantise $3$weighed" >> "$(dirname "$0")/../../calls.txt"
[ "$3" = Q9 ] && { echo "invalid ftype Q9" >&2; exit 1; }
cp "$1" "$2"
"""


def make_checkout(folder: Path, *, converter: str | None = CONVERTER, quantizer: str | None = QUANTIZER) -> Path:
    """A checkout with these tools; None leaves one out."""
    tool = folder / "build" / "bin" / "llama-quantize"
    tool.parent.mkdir(parents=True)
    if converter is not None:
        (folder / "convert_hf_to_gguf.py").write_text(converter, encoding="utf-8")
    if quantizer is not None:
        tool.write_text(quantizer, encoding="utf-8")
        tool.chmod(0o755)
    return folder


def calls(checkout: Path) -> list[str]:
    """What its tools were asked for, in order."""
    return (checkout / "calls.txt").read_text(encoding="utf-8").splitlines()
