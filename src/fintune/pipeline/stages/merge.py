"""``fintune merge``: merge the adapter into the base weights, and prove that the model did not change otherwise."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import Config
from fintune.errors import ArtifactError
from fintune.evaluation.questions import regression_prompts
from fintune.export.merge import layerwise
from fintune.export.merge.merge import merge_folders, write_special_tokens
from fintune.export.merge.merged_weights import NormalFloat, describe_merge_base
from fintune.models import adapter as adapters
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.models.folder import full_model_folder
from fintune.records import Example, Message
from fintune.training import full
from fintune.util.console import bar, quiet_libraries, show_bytes, track

if TYPE_CHECKING:
    import torch

GoldenPrompt = tuple[Sequence[Message], str | Message]
"""A conversation and its answer."""

NUM_GOLDEN = 4
"""Number of golden prompts, on which base + adapter and the merged folder are compared."""


def merge(config: Config, inputs: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Merge row by row in float32, store in ``merge.dtype``, and compare the result with the trained model.

    With ``merge.into: quantized_base`` the adapter goes into the weights that 4-bit training used. Otherwise it goes
    into the base's own weights, also after 4-bit training. The comparison is on the first evaluation examples, in
    float32, layer by layer where that is possible.

    Raises:
        ArtifactError: The adapter does not change a weight that it adapts, or a logit is not finite.
        ModelError: The base model cannot be used, or is not the adapter's.
        ResourceError: The disk is too small, or bitsandbytes is missing for ``merge.into: quantized_base``.
    """
    ref = models.fetch_base(config)
    trained = full_model_folder(inputs["train"])
    if trained is not None:
        return _store_trained(config, inputs, ref.path, trained, folder)
    return _merge(config, ref.path, inputs["train"] / "adapter", folder, _golden_of(inputs["prepare"] / "eval.jsonl"))


def merge_adapter(config: Config, folder: Path, *, adapter: Path) -> dict[str, Any]:
    """Merge a base and an adapter (PEFT) without a run, and compare them on prompts of the guard's fixed set.

    Raises:
        FintuneError: The errors of :func:`merge`.
    """
    adapters.check_base_name(config.model.name, adapter)
    ref = models.fetch_base(config)
    adapters.check_adapter_base(ref.path, adapter, name=config.model.name)
    golden: list[GoldenPrompt] = [(prompt.messages, prompt.answer) for prompt in regression_prompts()[:NUM_GOLDEN]]
    return _merge(config, ref.path, adapter, folder, golden)


def _merge(config: Config, base: Path, adapter: Path, folder: Path, golden: Sequence[GoldenPrompt]) -> dict[str, Any]:
    """Merge base and adapter, and compare them with the result."""
    quantised = NormalFloat() if config.merge.into == "quantized_base" else None
    with bar("merge", 1.0) as shown:
        report = merge_folders(
            base,
            adapter,
            folder,
            dtype=config.merge.dtype,
            transform=quantised,
            progress=show_bytes(shown),
        )
    proof = _prove(config, (base, adapter), folder, golden)
    return {
        "dtype": report.dtype,
        "num_moved": report.num_moved,
        "moved_share": report.moved_share,
        "weight_bytes": report.num_bytes,
        "embeddings_parted": report.untied,
        **describe_merge_base(quantised),
        **adapters.merged_facts(adapter),
        **proof,
        "summary": (
            f"{report.dtype}, {report.num_moved} weights moved, "
            f"largest logit difference to base + adapter {proof['max_logit_difference']:.2g}"
        ),
    }


def _store_trained(
    config: Config, inputs: Mapping[str, Path], base: Path, trained: Path, folder: Path
) -> dict[str, Any]:
    """Store the weights of full fine-tuning, which has no adapter to merge, in ``merge.dtype``."""
    dtype = full.stored_dtype(base) if config.merge.dtype == "auto" else config.merge.dtype
    num_moved = full.convert_full_model(trained, base, folder, dtype)
    if num_moved == 0:
        raise ArtifactError(
            f"{trained} has the weights of the base model", hint="it is untrained; look at train/metrics.jsonl"
        )
    proof = _prove(config, (trained, None), folder, _golden_of(inputs["prepare"] / "eval.jsonl"))
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
    config: Config, expected: tuple[Path, Path | None], folder: Path, prompts: Sequence[GoldenPrompt]
) -> dict[str, Any]:
    """Complete the folder, and compare it with a model on the golden prompts in float32."""
    trust, actual = config.model.trust_remote_code, (folder, None)
    tokenizer = models.load_tokenizer(models.fetch(str(folder)), trust_remote_code=trust)
    write_special_tokens(folder, tokenizer)
    golden = [chat.encode_example(tokenizer, messages, answer).input_ids for messages, answer in prompts]
    by_layers = all(layerwise.can_compare_layers(*model) for model in (expected, actual))
    with quiet_libraries():
        if by_layers:
            with bar("proof, layer by layer", 1.0) as shown:
                agreement = layerwise.compare_layers(expected, actual, golden, progress=shown.advance)
        else:
            agreement = _compare_whole(expected, actual, golden, trust_remote_code=trust)
    if not isfinite(agreement.max_difference):
        path = folder if isfinite(agreement.max_logit) else expected[1] or expected[0]
        raise ArtifactError(
            f"{path}: the logits of the model are not finite",
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
    actual: tuple[Path, Path | None],
    golden: Sequence[Sequence[int]],
    *,
    trust_remote_code: bool,
) -> layerwise.LogitAgreement:
    import torch

    logits: list[list[torch.Tensor]] = []
    for path, adapter in (expected, actual):
        model: Any = models.load_model(
            models.fetch(str(path)), dtype="float32", device="cpu", trust_remote_code=trust_remote_code
        )
        model = model if adapter is None else adapters.load_adapter(model, adapter)
        logits.append(_logits(model, golden, path.name))
        del model
        gc.collect()
    pairs = list(zip(*logits, strict=True))
    return layerwise.LogitAgreement(
        # torch's max keeps NaN; Python's max could drop it.
        max_difference=float(torch.stack([(a - b).abs().max() for a, b in pairs]).max()),
        num_same=sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs),
        num_positions=sum(len(ids) for ids in golden),
        max_logit=float(torch.stack([a.abs().max() for a, _ in pairs]).max()),
    )


def _golden_of(path: Path) -> list[GoldenPrompt]:
    """Read the first examples of a run's evaluation split."""
    with path.open(encoding="utf-8") as lines:
        examples = [Example.model_validate_json(line) for line, _ in zip(lines, range(NUM_GOLDEN), strict=False)]
    return [(example.messages, example.answer) for example in examples]


def _logits(model: Any, golden: Sequence[Sequence[int]], what: str) -> list[torch.Tensor]:
    """Return the logits of every golden prompt, [tokens, vocabulary]."""
    import torch

    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([list(ids)])).logits[0].clone()
            for ids in track(golden, f"logits of {what}", len(golden))
        ]
