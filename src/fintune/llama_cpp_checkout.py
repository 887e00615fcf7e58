"""A llama.cpp checkout of the user's: checked before training, then its converter and quantiser called."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fintune.errors import ResourceError
from fintune.progress import say

CONVERTER = "convert_hf_to_gguf.py"
_BUILD = "cmake -B build -S . && cmake --build build"
_PLACES = ("build/bin/llama-quantize", "build/bin/llama-quantize.exe", "build/bin/Release/llama-quantize.exe")
_HELP_SECONDS = 120


@dataclass(frozen=True)
class Checkout:
    """Both tools of a checkout.

    Attributes:
        converter: ``convert_hf_to_gguf.py``.
        quantizer: ``llama-quantize``.
    """

    converter: Path
    quantizer: Path


def check(folder: Path) -> Checkout:
    """Find and try both tools.

    Args:
        folder: The checkout.

    Raises:
        ResourceError: One is missing or does not run, with what to do.
    """
    if not folder.is_dir():
        hint = "give a llama.cpp checkout, or leave the flag out: fintune then writes the GGUF files itself"
        raise ResourceError(f"--llama_cpp_path {folder}: no such folder", hint=hint)
    converter = folder / CONVERTER
    if not converter.is_file():
        hint = f"it must be a llama.cpp checkout that holds {CONVERTER}, or leave the flag out"
        raise ResourceError(f"--llama_cpp_path {folder}: there is no {CONVERTER}", hint=hint)
    quantizer = next((folder / place for place in _PLACES if (folder / place).is_file()), None)
    if quantizer is None:
        raise ResourceError(
            f"--llama_cpp_path {folder}: there is no build/bin/llama-quantize", hint=f"build it in {folder}: {_BUILD}"
        )
    for command, name, hint in (
        ([sys.executable, str(converter), "--help"], CONVERTER, f"pip install -r {folder}/requirements.txt"),
        ([str(quantizer), "--help"], "llama-quantize", f"build it anew in {folder}: {_BUILD}"),
    ):
        _try(command, name, hint)
    return Checkout(converter, quantizer)


def _try(command: list[str], name: str, hint: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_HELP_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"{name} does not run ({error})", hint=hint) from None
    # llama-quantize tells its usage with status 1; a tool that does not run says nothing about usage.
    if "usage" not in (done.stdout + done.stderr).lower():
        lines = (done.stderr or done.stdout).strip().splitlines()
        why = lines[-1][:200] if lines else f"status {done.returncode}"
        raise ResourceError(f"{name} does not run ({why})", hint=hint)


def convert(checkout: Checkout, model: Path, target: Path) -> None:
    """Merged folder to a 16-bit GGUF file, which appears whole.

    Raises:
        ResourceError: The converter fails, with its last line.
    """
    part = target.with_name(f".{target.name}.part.gguf")
    command = [sys.executable, str(checkout.converter), str(model), "--outtype", "f16", "--outfile", str(part)]
    _run(command, CONVERTER, part, target)


def quantize(checkout: Checkout, source: Path, target: Path, kind: str) -> None:
    """16-bit GGUF file to a quantised one, which appears whole.

    Raises:
        ResourceError: The quantiser fails, with its last line.
    """
    part = target.with_name(f".{target.name}.part.gguf")
    _run([str(checkout.quantizer), str(source), str(part), kind], "llama-quantize", part, target)


def _run(command: list[str], name: str, part: Path, target: Path) -> None:
    say(f"{name}: {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")  # noqa: S603
        if done.returncode != 0 or not part.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines()
            why = lines[-1][:300] if lines else f"status {done.returncode}"
            raise ResourceError(f"{name} failed ({why})", hint=f"it was called as: {' '.join(command)}")
        os.replace(part, target)  # noqa: PTH105 - beside, then in place
    finally:
        part.unlink(missing_ok=True)
