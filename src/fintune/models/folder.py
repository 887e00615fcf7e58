"""Inspect a model folder as files: completeness, licence, safetensors headers, fingerprint. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fintune.errors import ModelError
from fintune.util.files import cache_folder, read_json, sha256_file, write_atomically

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.json",
    "*.jinja",
)
MODEL_FILES = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
"""Patterns of the files that decide a model's answers. None of them runs code when it is read (no pickled weights)."""

FULL_MODEL_FOLDER = "model"
"""Folder in that of ``train`` with the result of full fine-tuning; an adapter is in ``adapter``."""

_INDEX = "model.safetensors.index.json"
_UNKNOWN_BASE = "not named"
_LARGE_BYTES = 1 << 22
"""The hash of a file above this size is kept in the cache folder."""
_HASH_LETTERS = 64
_MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors library reads."""


class TensorEntry(NamedTuple):
    """One tensor in a safetensors file.

    Attributes:
        name: Name of the tensor.
        dtype: Type as the format writes it, such as "F32", "BF16" or "U8".
        shape: Sizes of the dimensions.
        start: Offset of its first byte in the file.
        stop: Offset after its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def check_model_folder(folder: Path) -> None:
    """Check that a folder holds a configuration, whole safetensors weights and a tokenizer. Reads only headers.

    Raises:
        ModelError: A file is missing or truncated; the message names it.
    """
    if not (folder / "config.json").is_file():
        raise _not_a_model(folder)
    for path in weight_files(folder):
        read_safetensors_header(path)
    is_fast = (folder / "tokenizer.json").is_file() or any(folder.glob("*.model"))
    if not is_fast and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise ModelError(
            f"{folder} holds no tokenizer (tokenizer.json)", hint="copy the tokenizer files of its base model into it"
        )


def _not_a_model(folder: Path) -> ModelError:
    """Explain what a folder without a configuration is, and how to get a model from it."""
    if (folder / "adapter_config.json").is_file():
        return ModelError(f"{folder} holds an adapter, not a model", hint=_hint_to_merge(folder))
    if (folder / "merge" / "config.json").is_file():
        return ModelError(f"{folder} is a run's folder, not a model", hint=f"its merged model is {folder / 'merge'}")
    adapter = folder / "train" / "adapter"
    if (adapter / "adapter_config.json").is_file():
        return ModelError(f"{folder} is a run's folder without a merged model", hint=_hint_to_merge(adapter))
    return ModelError(f"{folder} holds no config.json", hint="give a Hugging Face model folder")


def _hint_to_merge(adapter: Path) -> str:
    base = adapter_base_name(adapter)
    model = "BASE" if base == _UNKNOWN_BASE else shlex.quote(base)
    command = f"fintune merge --model {model} --adapter {shlex.quote(str(adapter))} --out DIR"
    return f"its base model is {base}; to continue training from it: {command}, then model.name=DIR"


def check_unquantised(folder: Path) -> None:
    """Refuse quantised weights as the base of training, merge or export.

    Raises:
        ModelError: ``config.json`` has a ``quantization_config``; the message names the method.
    """
    quantised = read_model_config(folder).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"{folder} is quantised{f' ({method})' if method else ''}: it can neither be trained nor have an adapter "
            "merged into it",
            hint="use the 16-bit model that it was made from; model.quantization: nf4 quantises it while it loads",
        )


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model's ``config.json``.

    Raises:
        ModelError: The file is missing or unreadable.
    """
    return read_json(folder / "config.json", ModelError)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model: those of its index, or all ``model*.safetensors`` without an index.

    Raises:
        ModelError: There are no such files, or some that the index names are missing.
    """
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json(index, ModelError).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map", hint="download the model again")
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of the {len(shards)} weight files that {_INDEX} names: {missing[0]}",
                hint="download the model again or copy the missing files",
            )
        return [folder / shard for shard in shards]
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        others = sorted({*folder.glob("pytorch_model*.bin"), *folder.glob("*.gguf"), *folder.glob("*.pth")})
        raise ModelError(
            f"{folder} holds no safetensors weights{f', only {others[0].name}' if others else ''}",
            hint="only safetensors are read; save the model with save_pretrained of a recent transformers",
        )
    return files


def read_safetensors_header(path: Path) -> list[TensorEntry]:
    """Return the tensors of a safetensors file, sorted by name, from its header alone.

    Source: github.com/huggingface/safetensors, "Format": 8 bytes little-endian header length, a JSON header, the data.

    Raises:
        ModelError: The file is truncated, too long, or not a safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 0 < header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError("no header")
            header = json.loads(file.read(header_bytes))
        data_start = 8 + header_bytes
        tensors = [
            TensorEntry(
                name,
                str(entry["dtype"]),
                tuple(map(int, entry["shape"])),
                data_start + int(entry["data_offsets"][0]),
                data_start + int(entry["data_offsets"][1]),
            )
            for name, entry in sorted(header.items())
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path} is not a readable safetensors file", hint="download or copy it again") from error
    expected_size = max((tensor.stop for tensor in tensors), default=data_start)
    if size != expected_size:
        raise ModelError(
            f"{path} has {size:,} bytes, but its header describes {expected_size:,}",
            hint="it is truncated or damaged; download or copy it again",
        )
    return tensors


def context_tokens(config: Mapping[str, object]) -> int | None:
    """Return the context length in tokens by a model's ``config.json``, scaled positions included; None if unknown."""
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    positions = text.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    if not isinstance(scaling, dict) or not isinstance(factor := scaling.get("factor"), int | float):
        return positions
    # max_position_embeddings is the scaled length in Llama 3.1's files, the original length in Qwen2.5's for YaRN.
    original = scaling.get("original_max_position_embeddings", positions)
    return max(positions, int(factor * original)) if isinstance(original, int) else positions


def full_model_folder(train: Path) -> Path | None:
    """Return the model folder that full fine-tuning left in the folder of ``train``; None if it left an adapter."""
    folder = train / FULL_MODEL_FOLDER
    return folder if folder.is_dir() else None


def adapter_base_name(folder: Path) -> str:
    """Return the name of the base model that a PEFT adapter's configuration gives."""
    config = read_json(folder / "adapter_config.json", ModelError)
    return str(config.get("base_model_name_or_path") or _UNKNOWN_BASE)


def stated_licence(folder: Path) -> str | None:
    """Return the ``license:`` value in the front matter of the folder's README.md, or None."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    line = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return line[1] if line else None


def model_fingerprint(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of a model's or adapter's files (``MODEL_FILES``).

    Raises:
        ModelError: The folder holds no such file.
    """
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise ModelError(f"{folder} holds no model files")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{cached_sha256(path)}\n".encode())
    return digest.hexdigest()


def cached_sha256(path: Path) -> str:
    """Return a file's SHA-256. A large file is hashed once for its path, size and modification time."""
    stat = path.stat()
    if stat.st_size <= _LARGE_BYTES:
        return sha256_file(path)
    key = hashlib.sha256(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    cached = cache_folder() / "hashes" / key
    if cached.is_file() and len(digest := cached.read_text(encoding="ascii")) == _HASH_LETTERS:
        return digest
    digest = sha256_file(path)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, digest)
    except OSError:
        # Without a writable cache folder, the file is hashed again the next time.
        pass
    return digest
