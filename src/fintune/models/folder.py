"""A model folder seen as files: whether it is complete, what licence it names, its fingerprint. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fintune.errors import ModelError
from fintune.util.files import cache_folder

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
"""What makes a model's answers; nothing that runs code when it is read (no pickled weights)."""

_INDEX = "model.safetensors.index.json"
_NOT_NAMED = "not named"
_CHUNK_BYTES = 1 << 22
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


def check_model_folder(folder: Path) -> None:
    """Checks that a folder holds a configuration, whole safetensors weights and a tokenizer; reads only headers.

    Raises:
        ModelError: Something is missing or cut off; the message names the file.
    """
    if not (folder / "config.json").is_file():
        raise _no_model(folder)
    _check_weights(folder)
    fast = (folder / "tokenizer.json").is_file() or any(folder.glob("*.model"))
    if not fast and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise ModelError(
            f"{folder} holds no tokenizer (tokenizer.json)", hint="copy the tokenizer files of its base model into it"
        )


def _no_model(folder: Path) -> ModelError:
    """What a folder without a configuration is, and how a model comes of it."""
    if (folder / "adapter_config.json").is_file():
        return ModelError(f"{folder} holds an adapter, not a model", hint=_merging(folder))
    if (folder / "merge" / "config.json").is_file():
        return ModelError(f"{folder} is a run's folder, not a model", hint=f"its merged model is {folder / 'merge'}")
    adapter = folder / "train" / "adapter"
    if (adapter / "adapter_config.json").is_file():
        return ModelError(f"{folder} is a run's folder without a merged model", hint=_merging(adapter))
    return ModelError(f"{folder} holds no config.json", hint="give a Hugging Face model folder")


def _merging(adapter: Path) -> str:
    base = adapter_base(adapter)
    known = "BASE" if base == _NOT_NAMED else shlex.quote(base)
    given = f"--model {known} --adapter {shlex.quote(str(adapter))}"
    return f"its base model is {base}; to train on from it: fintune merge {given} --out DIR, then model.name=DIR"


def check_unquantised(folder: Path) -> None:
    """Refuses a base of training, merge and export whose configuration says that its weights are quantised.

    Raises:
        ModelError: With the method.
    """
    quantised = read_json(folder / "config.json").get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"{folder} is quantised{f' ({method})' if method else ''}: it can neither be trained nor have an adapter "
            "merged into it",
            hint="name the 16-bit model that it was made from; model.load: 4bit quantises that while it loads",
        )


def _check_weights(folder: Path) -> None:
    for file in weight_files(folder):
        check_safetensors(file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model is read from: those of its index, or those that there are.

    Raises:
        ModelError: There are none, or some that the index names are missing.
    """
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map", hint="download the model again")
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of the {len(shards)} weight files that {_INDEX} names: {missing[0]}",
                hint="download the model again or copy the missing files",
            )
        files = [folder / shard for shard in shards]
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if not files:
        others = sorted({*folder.glob("pytorch_model*.bin"), *folder.glob("*.gguf"), *folder.glob("*.pth")})
        found = f", only {others[0].name}" if others else ""
        raise ModelError(
            f"{folder} holds no safetensors weights{found}",
            hint="only safetensors are read; save the model with save_pretrained of a recent transformers",
        )
    return files


def check_safetensors(file: Path) -> None:
    """Compares a safetensors file's size with what its header promises.

    Raises:
        ModelError: The file is cut off, too long, or none of that format.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            if not 0 < header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError("no header")
            header = json.loads(opened.read(header_bytes))
        data_bytes = max((e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is no readable safetensors file", hint="download or copy it again") from error
    if size != 8 + header_bytes + data_bytes:
        raise ModelError(
            f"{file} has {size} bytes where its header promises {8 + header_bytes + data_bytes}",
            hint="it was cut off; download or copy it again",
        )


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a model folder.

    Raises:
        ModelError: Unreadable, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


def context_tokens(config: Mapping[str, object]) -> int | None:
    """Tokens that a model reads at most by its ``config.json``, stretched positions included; None where not said."""
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    most = text.get("max_position_embeddings")
    if not isinstance(most, int):
        return None
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    if not isinstance(scaling, dict) or not isinstance(factor := scaling.get("factor"), int | float):
        return most
    # Llama 3.1's files name the stretched length, Qwen2.5's for YaRN the one before.
    original = scaling.get("original_max_position_embeddings", most)
    return max(most, int(factor * original)) if isinstance(original, int) else most


def adapter_base(folder: Path) -> str:
    """Name of the model that a PEFT adapter says it was trained on."""
    return str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or _NOT_NAMED)


def licence_of(folder: Path) -> str | None:
    """The ``license:`` line in the front matter of the folder's README.md, or None."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    line = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return line[1] if line else None


def model_fingerprint(path: Path) -> str:
    """sha256 over the names and contents of a model's or adapter's files (``MODEL_FILES``), whatever their age.

    The hash of each large file is kept in the cache folder under its path, size and modification time, so that a model
    is read through once.

    Raises:
        ModelError: The folder holds no such file.
    """
    files = sorted({file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    if not files:
        raise ModelError(f"{path} holds no model files")
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name}\0{file_hash(file)}\n".encode())
    return whole.hexdigest()


def file_hash(file: Path) -> str:
    """sha256 of a file, remembered as :func:`model_fingerprint` says."""
    stat = file.stat()
    large = stat.st_size > _CHUNK_BYTES
    key = hashlib.sha256(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    remembered = cache_folder() / "hashes" / key
    if large and remembered.is_file():
        return remembered.read_text(encoding="ascii")
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_CHUNK_BYTES):
            digest.update(block)
    if large:
        _remember(remembered, digest.hexdigest())
    return digest.hexdigest()


def _remember(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="ascii") as beside:
            beside.write(text)
        Path(beside.name).replace(path)
    except OSError:
        # A cache folder that cannot be written costs time the next time, nothing else.
        return
