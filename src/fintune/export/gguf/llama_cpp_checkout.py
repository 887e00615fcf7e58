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

_OPTION = "export.llama_cpp_path"
_CONVERTER = "convert_hf_to_gguf.py"
_BUILD = "cmake -B build -S . && cmake --build build"
_QUANTIZERS = ("build/bin/llama-quantize", "build/bin/llama-quantize.exe", "build/bin/Release/llama-quantize.exe")
_HELP_SECONDS = 120
_TYPE = re.compile(r"\bor\s+(\w+)\s+:")
"""A type in the usage of llama-quantize: ``15  or  Q4_K_M  :  4.58G, +0.1754 ppl``."""
_UNQUANTISED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Type of the weights -> the converter's type that holds them exactly."""


@dataclass(frozen=True)
class Checkout:
    """The tools of a llama.cpp checkout: the paths of ``convert_hf_to_gguf.py`` and of ``llama-quantize``."""

    converter: Path
    quantizer: Path


def check_checkout(folder: Path, kinds: Sequence[str] = ()) -> Checkout:
    """Find both tools, run them once, and check that the quantiser lists the types that will be exported.

    Raises:
        ResourceError: A tool is missing or does not run.
        ConfigError: The quantiser does not list one of the types.
    """
    converter, leave_out = folder / _CONVERTER, "or leave the option out: fintune then writes the GGUF files itself"
    if not converter.is_file():
        missing = f"there is no {_CONVERTER}" if folder.is_dir() else "no such folder"
        raise ResourceError(f"{_OPTION} {folder}: {missing}", hint=f"name a llama.cpp checkout, {leave_out}")
    quantizer = next((folder / path for path in _QUANTIZERS if (folder / path).is_file()), None)
    if quantizer is None:
        raise ResourceError(
            f"{_OPTION} {folder}: there is no build/bin/llama-quantize", hint=f"build it in {folder}: {_BUILD}"
        )
    command = (sys.executable, str(converter.absolute()), "--help")
    _usage(command, _CONVERTER, f"pip install -r {folder}/requirements.txt")
    rebuild = f"build it again in {folder}: {_BUILD}"
    known = _TYPE.findall(_usage((str(quantizer.absolute()), "--help"), "llama-quantize", rebuild))
    for kind in kinds:
        if known and kind.upper() not in {*known, *_UNQUANTISED.values()}:
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
    """Convert a merged folder to a GGUF file that is not quantised. The file gets its name only when it is complete.

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
    options = ["--outtype", outtype, *(["--model-name", name] if name else []), *["--vocab-only"] * vocabulary_only]
    _run([sys.executable, str(checkout.converter), str(model), *options, "--outfile", _PART], _CONVERTER, target)


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
    """Write GGUF files of several types from a merged folder. Each gets its name only when it is complete.

    The quantised files come from an intermediate file that holds the weights exactly. It is removed unless ``outputs``
    names its type.

    Args:
        checkout: The tools.
        model: Hugging Face folder.
        outputs: Type -> file.
        name: ``general.name`` of the files.
        dtype: Type of the folder's weights, and so of the intermediate file.
        threads: Number of CPU threads of the quantiser, or None for its own choice.
        imatrix: File of an importance matrix for the quantised types.

    Raises:
        ResourceError: A tool fails; the message has its last line.
    """
    exact = _UNQUANTISED.get(dtype, "F32")
    converted = {kind: path for kind, path in outputs.items() if kind in _UNQUANTISED.values()}
    quantised = {kind: path for kind, path in outputs.items() if kind not in converted}
    is_extra = bool(quantised) and exact not in converted
    source = next(iter(outputs.values())).with_name(f".{name}-{exact}.gguf") if is_extra else outputs.get(exact)
    try:
        for kind, path in (converted | ({exact: source} if is_extra and source else {})).items():
            convert_model(checkout, model, path, outtype=kind.lower(), name=name)
        weighting = [] if imatrix is None else ["--imatrix", str(imatrix)]
        for kind, path in quantised.items():
            command = [str(checkout.quantizer), *weighting, str(source), _PART, kind]
            _run(command + ([] if threads is None else [str(threads)]), "llama-quantize", path)
    finally:
        if is_extra and source is not None:
            source.unlink(missing_ok=True)


_PART = "PART"
""":func:`_run` replaces it by the path of the unfinished file."""


def _run(command: list[str], name: str, target: Path) -> None:
    say(f"{name}: {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part.gguf")
    command = [str(part) if word is _PART else word for word in command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")  # noqa: S603
        if done.returncode != 0 or not part.is_file():
            raise ResourceError(f"{name} failed ({_last_line(done)})", hint=f"it was called as: {' '.join(command)}")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
