"""``fintune merge``: the adapter folded into the 16-bit base weights, and proof that nothing else happened."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import Config
from fintune.errors import ArtifactError
from fintune.evaluation.questions import regression_prompts
from fintune.export.merge import layerwise
from fintune.export.merge.merge import MergeReport, merge_folders, write_special_tokens
from fintune.export.merge.merged_weights import NormalFloat, describe_merge_base
from fintune.models import adapter as adapters
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.records import Example, Message
from fintune.training import full
from fintune.util.console import bar, quiet_libraries, track

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Turns = tuple[Sequence[Message], str]
"""A conversation and its answer."""

NUM_GOLDEN = 4
"""Prompts on which base + adapter and the merged folder are compared."""


def merge(config: Config, inputs: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Merge in float32 and save in ``merge.dtype``, row by row; then compare the result with what was trained.

    With ``merge.into: quantized_base`` the adapter goes into the weights that training in 4 bits saw, else into the
    base's own, whatever it was trained on.

    Args:
        config: The run.
        inputs: Needs ``prepare`` (golden prompts) and ``train``.
        folder: Becomes a Hugging Face model folder.

    Returns:
        Type of the weights, number of moved tensors and share of numbers that moved, largest logit difference to base
        + adapter in float32 over the golden prompts, the share of positions whose best token is the same, and whether
        both were compared layer by layer or had to be loaded.

    Raises:
        ArtifactError: A weight that the adapter should change and does not, or logits that are not finite.
        ModelError: The base model cannot be used, or is not the adapter's.
        ResourceError: The disk is too small, or bitsandbytes is missing for ``merge.into: quantized_base``.
    """
    ref = models.fetch_base(config)
    whole = full.full_model_folder(inputs["train"])
    if whole is not None:
        return _convert(config, inputs, ref.path, whole, folder)
    return _fold(config, ref.path, inputs["train"] / "adapter", folder, _golden_of(inputs["prepare"] / "eval.jsonl"))


def merge_adapter(config: Config, adapter: Path, folder: Path) -> dict[str, Any]:
    """``fintune merge --model``: a base and an adapter without a run, compared on prompts of the guard's fixed set.

    Args:
        config: ``model`` and ``merge``.
        adapter: PEFT folder.
        folder: Becomes a Hugging Face model folder.

    Returns:
        As :func:`merge`.

    Raises:
        FintuneError: As :func:`merge`.
    """
    adapters.check_base_name(config.model.name, adapter)
    ref = models.fetch_base(config)
    adapters.check_adapter_base(ref.path, adapter, name=config.model.name)
    asked = [(each.messages, each.answer) for each in regression_prompts()[:NUM_GOLDEN]]
    return _fold(config, ref.path, adapter, folder, asked)


def _fold(config: Config, base: Path, adapter: Path, folder: Path, golden: Sequence[Turns]) -> dict[str, Any]:
    """Base and adapter to a folder, and the proof on golden prompts."""
    trust = config.model.trust_remote_code
    seen = NormalFloat() if config.merge.into == "quantized_base" else None
    with bar("merge", 1.0) as shown:
        report = merge_folders(
            base,
            adapter,
            folder,
            dtype=config.merge.dtype,
            transform=seen,
            progress=_shares(shown.advance),
        )
    tokenizer = models.load_tokenizer(models.fetch(str(folder)), trust_remote_code=trust)
    write_special_tokens(folder, tokenizer)

    proof = _prove((base, adapter), (folder, None), _encoded(tokenizer, golden), trust_remote_code=trust)
    return {
        **_facts(report, seen),
        **adapters.merged_facts(adapter),
        **proof,
        "summary": (
            f"{report.dtype}, {report.num_moved} weights moved, "
            f"largest logit difference to base + adapter {proof['max_logit_difference']:.2g}"
        ),
    }


def _convert(config: Config, inputs: Mapping[str, Path], base: Path, trained: Path, folder: Path) -> dict[str, Any]:
    """Full fine-tuning left nothing to fold in: its weights are stored in ``merge.dtype``."""
    dtype = full.stored_dtype(base) if config.merge.dtype == "auto" else config.merge.dtype
    num_moved = full.convert_full_model(trained, base, folder, dtype)
    if num_moved == 0:
        raise ArtifactError(
            f"{trained} differs from the base model in no weight", hint="it is untrained; look at train/metrics.jsonl"
        )
    trust = config.model.trust_remote_code
    tokenizer = models.load_tokenizer(models.fetch(str(folder)), trust_remote_code=trust)
    write_special_tokens(folder, tokenizer)
    golden = _encoded(tokenizer, _golden_of(inputs["prepare"] / "eval.jsonl"))
    proof = _prove((trained, None), (folder, None), golden, trust_remote_code=trust)
    return {
        "dtype": dtype,
        "num_moved": num_moved,
        **proof,
        "summary": (
            f"{dtype}, {num_moved} weights moved, "
            f"largest logit difference to the trained ones {proof['max_logit_difference']:.2g}"
        ),
    }


def _prove(
    expected: tuple[Path, Path | None],
    found: tuple[Path, Path | None],
    golden: Sequence[Sequence[int]],
    *,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Both models on the golden prompts in float32: layer by layer, or whole where the family is not known."""
    by_layers = all(layerwise.can_compare_layers(*each) for each in (expected, found))
    with quiet_libraries():
        if by_layers:
            with bar("proof, layer by layer", 1.0) as shown:
                agreement = layerwise.compare_layers(expected, found, golden, progress=shown.advance)
        else:
            agreement = _compare_whole(expected, found, golden, trust_remote_code=trust_remote_code)
    if not isfinite(agreement.max_difference):
        whose = found[0] if isfinite(agreement.max_logit) else expected[1] or expected[0]
        raise ArtifactError(
            f"{whose}: the logits of the model are not finite",
            hint="the training diverged, look at train/metrics.jsonl; or merge.dtype=float32",
        )
    return {
        "num_golden": len(golden),
        "max_logit_difference": agreement.max_difference,
        "same_best_token_share": agreement.num_same / agreement.num_positions,
        "max_logit": agreement.max_logit,
        "proof": "layer by layer" if by_layers else "whole models in memory",
    }


def _compare_whole(
    expected: tuple[Path, Path | None],
    found: tuple[Path, Path | None],
    golden: Sequence[Sequence[int]],
    *,
    trust_remote_code: bool,
) -> layerwise.LogitAgreement:
    import torch

    logits: list[list[torch.Tensor]] = []
    for path, adapter in (expected, found):
        ref = models.fetch(str(path))
        model: Any = models.load_model(ref, dtype="float32", device="cpu", trust_remote_code=trust_remote_code)
        if adapter is not None:
            model = adapters.load_adapter(model, adapter)
        logits.append(_logits(model, golden, path.name))
        del model
        gc.collect()
    pairs = list(zip(*logits, strict=True))
    return layerwise.LogitAgreement(
        # Python's max would lose what is no number.
        max_difference=float(torch.stack([(a - b).abs().max() for a, b in pairs]).max()),
        num_same=sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs),
        num_positions=sum(len(ids) for ids in golden),
        max_logit=float(torch.stack([a.abs().max() for a, _ in pairs]).max()),
    )


def _facts(report: MergeReport, seen: NormalFloat | None) -> dict[str, Any]:
    return {
        "dtype": report.dtype,
        "num_moved": report.num_moved,
        "moved_share": report.moved_share,
        "weight_bytes": report.num_bytes,
        "embeddings_parted": report.untied,
        **describe_merge_base(seen),
    }


def _shares(advance: Callable[[float], None]) -> Callable[[int, int], None]:
    """Progress in bytes for a bar that counts to one."""
    shown = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        advance(done / total - shown)
        shown = done / total

    return progress


def _golden_of(path: Path) -> list[Turns]:
    """The first examples of a run's evaluation split."""
    with path.open(encoding="utf-8") as lines:
        examples = [Example.model_validate_json(line) for line, _ in zip(lines, range(NUM_GOLDEN), strict=False)]
    return [(each.messages, each.completion) for each in examples]


def _encoded(tokenizer: PreTrainedTokenizerBase, golden: Sequence[Turns]) -> list[list[int]]:
    return [chat.encode_example(tokenizer, messages, completion).input_ids for messages, completion in golden]


def _logits(model: Any, golden: Sequence[Sequence[int]], what: str) -> list[torch.Tensor]:
    """Logits of each golden prompt, one at a time; shapes [tokens, vocabulary]."""
    import torch

    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([list(ids)])).logits[0].clone()
            for ids in track(golden, f"logits of {what}", len(golden))
        ]
