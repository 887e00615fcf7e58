"""What a merged folder holds besides weights: configuration, tokenizer, template, generation settings, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ModelError
from fintune.export.merge.merged_weights import EMBEDDING, MergedWeights
from fintune.models import chat_template as chat
from fintune.models.chat_template import read_chat_template, special_token_texts, turn_ending

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "*.jinja"),
)
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


def carry_over(base: Path, adapter: Path, folder: Path) -> None:
    """Copy all but weights and configuration; an adapter that brings a tokenizer was trained with it."""
    tokenizer = adapter if (adapter / "tokenizer.json").is_file() else base
    for pattern in _TOKENIZER:
        for path in sorted(tokenizer.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    for path in sorted(base.iterdir()):
        if path.is_file() and (path.name == "generation_config.json" or path.name.upper().startswith(_LICENCES)):
            shutil.copyfile(path, folder / path.name)


def merged_config(base: Path, weights: MergedWeights, dtype: str) -> dict[str, Any]:
    """``config.json`` of the merged model.

    Raises:
        ModelError: The base's cannot be read.
    """
    config = read_json(base / "config.json")
    # transformers 4 reads torch_dtype and rope_theta, and takes its defaults without a word where version 5 wrote none.
    merged = config | {"dtype": dtype, "torch_dtype": dtype}
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        merged.setdefault("rope_theta", theta)
    if config.get("tie_word_embeddings") and not weights.tied:
        merged["tie_word_embeddings"] = False
    if EMBEDDING in weights.tensors and "vocab_size" in config:
        merged["vocab_size"] = weights.tensors[EMBEDDING].shape[0]
    return merged


def has_own_padding(folder: Path) -> bool:
    """Whether the tokenizer's files name a padding token that ends nothing, so that nothing is to be settled."""
    special = special_token_texts(folder)
    template = read_chat_template(folder)
    pad = special["pad_token"]
    ending = turn_ending(template, special) if template is not None else ""
    return bool(pad) and pad not in (special["eos_token"], special["bos_token"]) and pad not in ending


def settle_special_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write down which token pads and which end an answer, where the base leaves it open.

    Args:
        folder: The merged folder.
        tokenizer: Its tokenizer, with a padding token that ends nothing.
    """
    stops = list(chat.end_of_turn_ids(tokenizer))
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"pad_token_id": tokenizer.pad_token_id},
        "generation_config.json": {
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": stops if len(stops) > 1 else stops[0],
        },
        "tokenizer_config.json": {"pad_token": tokenizer.pad_token},
    }
    for name, change in changes.items():
        path = folder / name
        write_json(path, (read_json(path) if path.is_file() else {}) | change)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: Missing, unreadable, or the configuration of a quantised model.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="give a Hugging Face model folder") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    if content.get("quantization_config"):
        raise ModelError(
            f"{path.parent} is quantised, and an adapter cannot be merged into it",
            hint="name the 16-bit model that it was made from",
        )
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside and rename."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
