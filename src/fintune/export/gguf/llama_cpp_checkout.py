"""Export with the converter and the quantiser of a llama.cpp checkout, which are checked before training."""

from __future__ import annotations

import difflib
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
_QUANTIZERS = ("build/bin/llama-quantize", "build/bin/llama-quantize.exe", "build/bin/Release/llama-quantize.exe")
_HELP_SECONDS = 120
_TYPE = re.compile(r"\bor\s+(\w+)\s+:")
"""A type in the usage of llama-quantize: ``15  or  Q4_K_M  :  4.58G, +0.1754 ppl``."""
UNQUANTISED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Type of the weights -> the converter's type that holds them exactly."""


@dataclass(frozen=True)
class Checkout:
    """The tools of a llama.cpp checkout.

    Attributes:
        converter: Path of ``convert_hf_to_gguf.py``.
        quantizer: Path of ``llama-quantize``.
    """

    converter: Path
    quantizer: Path


def check_checkout(folder: Path, kinds: Sequence[str] = ()) -> Checkout:
    """Find both tools and run them once.

    Args:
        folder: The checkout.
        kinds: Types that will be exported.

    Raises:
        ResourceError: A tool is missing or does not run.
        ConfigError: The quantiser does not list one of the types.
    """
    if not folder.is_dir():
        hint = "name a llama.cpp checkout, or leave the option out: fintune then writes the GGUF files itself"
        raise ResourceError(f"{OPTION} {folder}: no such folder", hint=hint)
    converter = folder / CONVERTER
    if not converter.is_file():
        hint = f"name a llama.cpp checkout with {CONVERTER}, or leave the option out"
        raise ResourceError(f"{OPTION} {folder}: there is no {CONVERTER}", hint=hint)
    quantizer = next((folder / path for path in _QUANTIZERS if (folder / path).is_file()), None)
    if quantizer is None:
        raise ResourceError(
            f"{OPTION} {folder}: there is no build/bin/llama-quantize", hint=f"build it in {folder}: {_BUILD}"
        )
    _usage(
        (sys.executable, str(converter.absolute()), "--help"), CONVERTER, f"pip install -r {folder}/requirements.txt"
    )
    rebuild = f"build it again in {folder}: {_BUILD}"
    known = _TYPE.findall(_usage((str(quantizer.absolute()), "--help"), "llama-quantize", rebuild))
    for kind in kinds:
        if known and kind.upper() not in {*known, *UNQUANTISED.values()}:
            near = difflib.get_close_matches(kind.upper(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its types are {', '.join(known)}"
            raise ConfigError(
                f"export.types: the llama-quantize of {folder} has no type {kind}", hint=hint, option="export.types"
            )
    return Checkout(converter, quantizer)


@lru_cache(maxsize=4)
def _usage(command: tuple[str, ...], name: str, hint: str) -> str:
    # Cached, because the converter loads torch to print its usage, and several stages of a run check it.
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_HELP_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"{name} does not run ({error})", hint=hint) from None
    # llama-quantize prints its usage with status 1, so the status says nothing.
    usage = done.stdout + done.stderr
    if "usage" not in usage.lower():
        raise ResourceError(f"{name} does not run ({_last_line(done)})", hint=hint)
    return usage


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1][:300] if lines else f"status {done.returncode}"


def convert_model(
    checkout: Checkout,
    model: Path,
    target: Path,
    *,
    outtype: str = "f16",
    name: str | None = None,
    vocabulary_only: bool = False,
) -> None:
    """Convert a merged folder to a GGUF file that is not quantised.

    The file gets its name only when it is complete.

    Args:
        checkout: The tools.
        model: Hugging Face folder.
        target: The GGUF file.
        outtype: Type of the file: "f32", "f16" or "bf16".
        name: ``general.name`` of the file, or None for the converter's choice.
        vocabulary_only: Whether to leave the weights out.

    Raises:
        ResourceError: The converter fails; the message has its last line.
    """
    part = target.with_name(f".{target.name}.part.gguf")
    command = [sys.executable, str(checkout.converter), str(model), "--outtype", outtype, "--outfile", str(part)]
    command += [] if name is None else ["--model-name", name]
    _run(command + ["--vocab-only"] * vocabulary_only, CONVERTER, part, target)


def quantize_gguf(
    checkout: Checkout,
    source: Path,
    target: Path,
    kind: str,
    *,
    imatrix: Path | None = None,
    threads: int | None = None,
) -> None:
    """Quantise a GGUF file.

    The new file gets its name only when it is complete.

    Args:
        checkout: The tools.
        source: GGUF file that is not quantised.
        target: The quantised file.
        kind: Type of the quantised file, such as "Q4_K_M".
        imatrix: File of an importance matrix, or None.
        threads: Number of CPU threads, or None for the tool's choice.

    Raises:
        ResourceError: The quantiser fails; the message has its last line.
    """
    part = target.with_name(f".{target.name}.part.gguf")
    weighting = [] if imatrix is None else ["--imatrix", str(imatrix)]
    command = [str(checkout.quantizer), *weighting, str(source), str(part), kind]
    _run(command + ([] if threads is None else [str(threads)]), "llama-quantize", part, target)


def export_with_checkout(
    checkout: Checkout,
    model: Path,
    outputs: Mapping[str, Path],
    *,
    name: str,
    dtype: str,
    threads: int | None = None,
    imatrix: Path | None = None,
) -> None:
    """Write GGUF files of several types from a merged folder.

    The quantised files come from an intermediate file that holds the weights exactly. It is removed unless ``outputs``
    names its type.

    Args:
        checkout: The tools.
        model: Hugging Face folder.
        outputs: Type -> file.
        name: ``general.name`` of the files.
        dtype: Type of the folder's weights, and so of the intermediate file.
        threads: Number of CPU threads of the quantiser.
        imatrix: File of an importance matrix for the quantised types.

    Raises:
        ResourceError: A tool fails; the message has its last line.
    """
    exact = UNQUANTISED.get(dtype, "F32")
    quantised = [kind for kind in outputs if kind not in UNQUANTISED.values()]
    for kind in [kind for kind in outputs if kind in UNQUANTISED.values()]:
        convert_model(checkout, model, outputs[kind], outtype=kind.lower(), name=name)
    if not quantised:
        return
    requested = outputs.get(exact)
    source = requested or next(iter(outputs.values())).with_name(f".{name}-{exact}.gguf")
    try:
        if requested is None:
            convert_model(checkout, model, source, outtype=exact.lower(), name=name)
        for kind in quantised:
            quantize_gguf(checkout, source, outputs[kind], kind, imatrix=imatrix, threads=threads)
    finally:
        if requested is None:
            source.unlink(missing_ok=True)


def _run(command: list[str], name: str, part: Path, target: Path) -> None:
    say(f"{name}: {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")  # noqa: S603
        if done.returncode != 0 or not part.is_file():
            raise ResourceError(f"{name} failed ({_last_line(done)})", hint=f"it was called as: {' '.join(command)}")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
