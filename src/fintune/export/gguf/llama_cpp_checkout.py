"""A llama.cpp checkout of the user's: checked before training, then its converter and quantiser called."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fintune.errors import ConfigError, ResourceError
from fintune.util.console import say

OPTION = "export.llama_cpp_path"
CONVERTER = "convert_hf_to_gguf.py"
_BUILD = "cmake -B build -S . && cmake --build build"
_PLACES = ("build/bin/llama-quantize", "build/bin/llama-quantize.exe", "build/bin/Release/llama-quantize.exe")
_HELP_SECONDS = 120
_TYPE = re.compile(r"\bor\s+(\w+)\s+:")
"""How llama-quantize lists them: ``15  or  Q4_K_M  :  4.58G, +0.1754 ppl``."""
PLAIN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Types that the converter writes, by the type of the weights that each holds exactly."""


@dataclass(frozen=True)
class Checkout:
    """Both tools of a checkout.

    Attributes:
        converter: ``convert_hf_to_gguf.py``.
        quantizer: ``llama-quantize``.
    """

    converter: Path
    quantizer: Path


def check(folder: Path, kinds: Sequence[str] = ()) -> Checkout:
    """Find and try both tools.

    Args:
        folder: The checkout.
        kinds: Types that will be asked for.

    Raises:
        ResourceError: A tool is missing or does not run, with what to do.
        ConfigError: The quantiser lists its types, and one that will be asked for is not among them.
    """
    if not folder.is_dir():
        hint = "give a llama.cpp checkout, or leave the option out: fintune then writes the GGUF files itself"
        raise ResourceError(f"{OPTION} {folder}: no such folder", hint=hint)
    converter = folder / CONVERTER
    if not converter.is_file():
        hint = f"it must be a llama.cpp checkout that holds {CONVERTER}, or leave the option out"
        raise ResourceError(f"{OPTION} {folder}: there is no {CONVERTER}", hint=hint)
    quantizer = next((folder / place for place in _PLACES if (folder / place).is_file()), None)
    if quantizer is None:
        raise ResourceError(
            f"{OPTION} {folder}: there is no build/bin/llama-quantize", hint=f"build it in {folder}: {_BUILD}"
        )
    _usage(
        (sys.executable, str(converter.absolute()), "--help"), CONVERTER, f"pip install -r {folder}/requirements.txt"
    )
    rebuild = f"build it anew in {folder}: {_BUILD}"
    known = _TYPE.findall(_usage((str(quantizer.absolute()), "--help"), "llama-quantize", rebuild))
    for kind in kinds:
        if known and kind.upper() not in {*known, *PLAIN.values()}:
            near = difflib.get_close_matches(kind.upper(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}"
            raise ConfigError(f"export.types: the llama-quantize of {folder} knows no {kind}", hint=hint)
    return Checkout(converter, quantizer)


@lru_cache(maxsize=4)
def _usage(command: tuple[str, ...], name: str, hint: str) -> str:
    # Once a process: the converter loads torch to tell its usage, and a run looks at it in every stage that needs it.
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_HELP_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"{name} does not run ({error})", hint=hint) from None
    # llama-quantize tells its usage with status 1; a tool that does not run says nothing about usage.
    told = done.stdout + done.stderr
    if "usage" not in told.lower():
        lines = (done.stderr or done.stdout).strip().splitlines()
        why = lines[-1][:200] if lines else f"status {done.returncode}"
        raise ResourceError(f"{name} does not run ({why})", hint=hint)
    return told


def convert(
    checkout: Checkout,
    model: Path,
    target: Path,
    *,
    outtype: str = "f16",
    name: str | None = None,
    vocabulary_only: bool = False,
) -> None:
    """Merged folder to a GGUF file that is not quantised, which appears whole.

    Args:
        checkout: The tools.
        model: Hugging Face folder.
        target: The file.
        outtype: "f32", "f16" or "bf16".
        name: ``general.name`` of the file; what the converter makes up where None.
        vocabulary_only: Leave the weights out.

    Raises:
        ResourceError: The converter fails, with its last line.
    """
    part = target.with_name(f".{target.name}.part.gguf")
    command = [sys.executable, str(checkout.converter), str(model), "--outtype", outtype, "--outfile", str(part)]
    command += [] if name is None else ["--model-name", name]
    _run(command + ["--vocab-only"] * vocabulary_only, CONVERTER, part, target)


def quantize(
    checkout: Checkout,
    source: Path,
    target: Path,
    kind: str,
    *,
    importance: Path | None = None,
    threads: int | None = None,
) -> None:
    """GGUF file that is not quantised to one that is, which appears whole.

    Args:
        checkout: The tools.
        source: The former.
        target: The latter.
        kind: Its type, such as "Q4_K_M".
        importance: File of an importance matrix.
        threads: CPU threads; the tool's own choice where None.

    Raises:
        ResourceError: The quantiser fails, with its last line.
    """
    part = target.with_name(f".{target.name}.part.gguf")
    weighed = [] if importance is None else ["--imatrix", str(importance)]
    command = [str(checkout.quantizer), *weighed, str(source), str(part), kind]
    _run(command + ([] if threads is None else [str(threads)]), "llama-quantize", part, target)


def export(
    checkout: Checkout,
    model: Path,
    outputs: Mapping[str, Path],
    *,
    name: str,
    dtype: str,
    threads: int | None = None,
    importance: Path | None = None,
) -> None:
    """Merged folder to GGUF files of several types, by way of one that holds the weights exactly.

    Args:
        checkout: The tools.
        model: Hugging Face folder.
        outputs: Type -> file.
        name: ``general.name`` of the files.
        dtype: Type of the folder's weights, which the file in between has: it is removed unless it is asked for.
        threads: CPU threads of the quantiser.
        importance: File of an importance matrix for the quantised types.

    Raises:
        ResourceError: A tool fails, with its last line.
    """
    exact = PLAIN.get(dtype, "F32")
    quantised = [kind for kind in outputs if kind not in PLAIN.values()]
    for kind in [kind for kind in outputs if kind in PLAIN.values()]:
        convert(checkout, model, outputs[kind], outtype=kind.lower(), name=name)
    if not quantised:
        return
    between = outputs.get(exact)
    source = between or next(iter(outputs.values())).with_name(f".{name}-{exact}.gguf")
    try:
        if between is None:
            convert(checkout, model, source, outtype=exact.lower(), name=name)
        for kind in quantised:
            quantize(checkout, source, outputs[kind], kind, importance=importance, threads=threads)
    finally:
        if between is None:
            source.unlink(missing_ok=True)


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
