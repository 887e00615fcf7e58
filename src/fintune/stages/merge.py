"""``fintune merge``: the adapter folded into the 16-bit base weights, and proof that nothing else happened."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune import chat, models
from fintune.errors import ArtifactError, ModelError
from fintune.options import Config
from fintune.progress import track
from fintune.records import Example
from fintune.tuning.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_GOLDEN = 4
"""Prompts on which base + adapter and the merged folder are compared."""


def merge(config: Config, inputs: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Merge in float32, save in ``merge.dtype``, load the result again and compare.

    Args:
        config: The run.
        inputs: Needs ``prepare`` (golden prompts) and ``train``.
        folder: Becomes a Hugging Face model folder.

    Returns:
        Type of the weights, number of moved tensors, largest logit difference to base + adapter in float32 over the
        golden prompts, the share of positions whose best token is the same.

    Raises:
        ArtifactError: The adapter changes no weight.
        ModelError: The base model cannot be used.
    """
    ref = models.fetch(models.resolve(config.model.name, revision=config.model.revision))
    assert ref.path is not None, "fetch fills the path"
    trust = config.model.trust_remote_code
    tokenizer = models.load_tokenizer(ref, trust_remote_code=trust)
    golden = _golden_prompts(tokenizer, inputs["prepare"] / "eval.jsonl")
    dtype = stored_dtype(ref.path) if config.merge.dtype == "auto" else config.merge.dtype

    base = models.load_model(ref, dtype="float32", device="cpu", trust_remote_code=trust)
    with quiet_libraries():
        adapted = models.load_adapter(base, inputs["train"] / "adapter")
    expected = _logits(adapted, golden, "base + adapter")
    before = _sums(base, dtype)
    merged = adapted.merge_and_unload()
    num_moved = sum(before[name] != total for name, total in _sums(merged, dtype).items() if name in before)
    if num_moved == 0:
        raise ArtifactError(
            "the adapter changes no weight of the model", hint="it is untrained; look at train/metrics.jsonl"
        )
    with quiet_libraries():
        _save(merged, tokenizer, ref.path, dtype, folder)
    del base, adapted, merged
    gc.collect()

    again = models.load_model(models.resolve(str(folder)), dtype="float32", device="cpu", trust_remote_code=trust)
    found = _logits(again, golden, "merged")
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    num_same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, found, strict=True))
    return {
        "dtype": dtype,
        "num_moved": num_moved,
        "num_golden": len(golden),
        "max_logit_difference": difference,
        "same_best_token_share": num_same / sum(len(ids) for ids in golden),
        "max_logit": max(float(a.abs().max()) for a in expected),
        "summary": f"{dtype}, {num_moved} weights moved, logits within {difference:.2g} of base + adapter",
    }


def stored_dtype(folder: Path) -> str:
    """Type in which a model's floating-point weights are stored, that of its largest tensor.

    Raises:
        ModelError: No safetensors file, or weights of another type than float32, bfloat16 or float16.
    """
    from math import prod

    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - the handle is no mapping
                piece = tensors.get_slice(key)
                sizes[piece.get_dtype()] = sizes.get(piece.get_dtype(), 0) + prod(piece.get_shape())
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    most = max(sizes, key=lambda name: sizes[name], default="")
    if most not in names:
        raise ModelError(f"{folder}: weights of type {most or 'unknown'}", hint="set merge.dtype")
    return names[most]


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: Path, dtype: str, folder: Path) -> None:
    import torch

    model.to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    stops = list(chat.end_of_turn_ids(tokenizer))
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in sorted(base.iterdir()):
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")):
            shutil.copyfile(path, folder / path.name)


def _golden_prompts(tokenizer: PreTrainedTokenizerBase, path: Path) -> list[list[int]]:
    with path.open(encoding="utf-8") as lines:
        examples = [Example.model_validate_json(line) for line, _ in zip(lines, range(NUM_GOLDEN), strict=False)]
    return [chat.encode_example(tokenizer, each.messages, each.completion).input_ids for each in examples]


def _logits(model: Any, golden: Sequence[list[int]], what: str) -> list[torch.Tensor]:
    """Logits of each golden prompt, one at a time; shapes [tokens, vocabulary]."""
    import torch

    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([ids])).logits[0].clone()
            for ids in track(golden, f"logits of {what}", len(golden))
        ]


def _sums(model: PreTrainedModel, dtype: str) -> dict[str, tuple[float, float]]:
    """Two figures of each weight as it will be stored; a change that rounding swallows is no change."""
    import torch

    def figures(weight: torch.Tensor) -> tuple[float, float]:
        stored = weight.detach().to(getattr(torch, dtype)).double()
        return float(stored.sum()), float(stored.square().sum())

    return {
        name.replace(".base_layer", ""): figures(weight)
        for name, weight in model.named_parameters()
        if ".lora_" not in name
    }
