"""``fintune merge``: merge the adapter into the base weights, and prove that the model did not change otherwise."""

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
from fintune.models.folder import full_model_folder
from fintune.records import Example, Message
from fintune.training import full
from fintune.util.console import bar, quiet_libraries, track

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

GoldenPrompt = tuple[Sequence[Message], str]
"""A conversation and its answer."""

NUM_GOLDEN = 4
"""Number of golden prompts, on which base + adapter and the merged folder are compared."""


def merge(config: Config, inputs: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Merge row by row in float32, store in ``merge.dtype``, and compare the result with the trained model.

    With ``merge.into: quantized_base`` the adapter goes into the weights that 4-bit training used. Otherwise it goes
    into the base's own weights, also after 4-bit training.

    Args:
        config: The run.
        inputs: Step name -> folder of ``prepare`` (for golden prompts) and ``train``.
        folder: Folder for the Hugging Face model.

    Returns:
        Type of the weights, number of moved tensors and share of moved values; over the golden prompts the largest
        logit difference to base + adapter in float32 and the share of positions with the same best token; and whether
        the models were compared layer by layer or as a whole.

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


def merge_adapter(config: Config, adapter: Path, folder: Path) -> dict[str, Any]:
    """Merge a base and an adapter without a run, and compare them on prompts of the guard's fixed set.

    Args:
        config: Configuration of which ``model`` and ``merge`` are used.
        adapter: PEFT folder.
        folder: Folder for the Hugging Face model.

    Returns:
        The facts that :func:`merge` returns.

    Raises:
        FintuneError: The errors of :func:`merge`.
    """
    adapters.check_base_name(config.model.name, adapter)
    ref = models.fetch_base(config)
    adapters.check_adapter_base(ref.path, adapter, name=config.model.name)
    golden = [(prompt.messages, prompt.answer) for prompt in regression_prompts()[:NUM_GOLDEN]]
    return _merge(config, ref.path, adapter, folder, golden)


def _merge(config: Config, base: Path, adapter: Path, folder: Path, golden: Sequence[GoldenPrompt]) -> dict[str, Any]:
    """Merge base and adapter, and compare them with the result."""
    trust = config.model.trust_remote_code
    quantised = NormalFloat() if config.merge.into == "quantized_base" else None
    with bar("merge", 1.0) as shown:
        report = merge_folders(
            base,
            adapter,
            folder,
            dtype=config.merge.dtype,
            transform=quantised,
            progress=_shares(shown.advance),
        )
    tokenizer = models.load_tokenizer(models.fetch(str(folder)), trust_remote_code=trust)
    write_special_tokens(folder, tokenizer)

    proof = _compare((base, adapter), (folder, None), _encoded(tokenizer, golden), trust_remote_code=trust)
    return {
        **_facts(report, quantised),
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
    trust = config.model.trust_remote_code
    tokenizer = models.load_tokenizer(models.fetch(str(folder)), trust_remote_code=trust)
    write_special_tokens(folder, tokenizer)
    golden = _encoded(tokenizer, _golden_of(inputs["prepare"] / "eval.jsonl"))
    proof = _compare((trained, None), (folder, None), golden, trust_remote_code=trust)
    return {
        "dtype": dtype,
        "num_moved": num_moved,
        **proof,
        "summary": (
            f"{dtype}, {num_moved} weights moved, "
            f"largest logit difference to the trained ones {proof['max_logit_difference']:.2g}"
        ),
    }


def _compare(
    expected: tuple[Path, Path | None],
    actual: tuple[Path, Path | None],
    golden: Sequence[Sequence[int]],
    *,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Compare two models on the golden prompts in float32, as a whole if not possible layer by layer."""
    by_layers = all(layerwise.can_compare_layers(*model) for model in (expected, actual))
    with quiet_libraries():
        if by_layers:
            with bar("proof, layer by layer", 1.0) as shown:
                agreement = layerwise.compare_layers(expected, actual, golden, progress=shown.advance)
        else:
            agreement = _compare_whole(expected, actual, golden, trust_remote_code=trust_remote_code)
    if not isfinite(agreement.max_difference):
        path = actual[0] if isfinite(agreement.max_logit) else expected[1] or expected[0]
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
        model: Any = adapters.load_with_adapter(
            models.fetch(str(path)), adapter, dtype="float32", device="cpu", trust_remote_code=trust_remote_code
        )
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


def _facts(report: MergeReport, quantised: NormalFloat | None) -> dict[str, Any]:
    return {
        "dtype": report.dtype,
        "num_moved": report.num_moved,
        "moved_share": report.moved_share,
        "weight_bytes": report.num_bytes,
        "embeddings_parted": report.untied,
        **describe_merge_base(quantised),
    }


def _shares(advance: Callable[[float], None]) -> Callable[[int, int], None]:
    """Return a function that turns progress in bytes into the shares of a bar that counts to one."""
    shown = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        advance(done / total - shown)
        shown = done / total

    return progress


def _golden_of(path: Path) -> list[GoldenPrompt]:
    """Read the first examples of a run's evaluation split."""
    with path.open(encoding="utf-8") as lines:
        examples = [Example.model_validate_json(line) for line, _ in zip(lines, range(NUM_GOLDEN), strict=False)]
    return [(example.messages, example.completion) for example in examples]


def _encoded(tokenizer: PreTrainedTokenizerBase, golden: Sequence[GoldenPrompt]) -> list[list[int]]:
    return [chat.encode_example(tokenizer, messages, completion).input_ids for messages, completion in golden]


def _logits(model: Any, golden: Sequence[Sequence[int]], what: str) -> list[torch.Tensor]:
    """Return the logits of every golden prompt, [tokens, vocabulary]."""
    import torch

    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([list(ids)])).logits[0].clone()
            for ids in track(golden, f"logits of {what}", len(golden))
        ]
