"""``fintune replay``: verify that every export matches the trained model, token by token."""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import Config
from fintune.errors import ArtifactError
from fintune.export.verify import GgufReplay, TokenAgreement, compare_distributions, distribution_from_logits
from fintune.inference.likelihood import LogitsReader
from fintune.manifest import Facts
from fintune.models import adapter as adapters
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.models.folder import full_model_folder
from fintune.records import Example
from fintune.util.console import track
from fintune.util.files import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LOSSLESS_KINDS = ("merged", "F32", "F16", "BF16", "Q8_0")
"""Exports with the weights of the trained model, to which ``replay.min_same_share`` applies.

``replay.min_same_share_quantised`` applies to all others.
"""
MAX_Q8_0_SHARE = 0.9
"""Largest share that Q8_0 must reach. A correct file of a small model measured 0.977; few positions can give less."""
_REFERENCES = ("adapter", "trained")


@dataclass(frozen=True)
class _Row:
    """Tokens of an example and the positions of its completion."""

    ids: list[int]
    positions: list[int]


def replay(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Compare the next-token distributions of every export with the trained model, on held-out completions.

    The facts, also written to ``replay.json``, hold for the base without adapter and for every export: mean KL
    divergence in nats from base + adapter in ``predict.dtype``, share of positions with the same likeliest token, and
    perplexity of the completions. With ``merge.into: quantized_base`` the reference is the adapter on the base in 4
    bits, as in training.

    Raises:
        ArtifactError: An export does not match the trained model, a figure is not finite, or there is no example.
        ModelError: A model or file cannot be loaded.
        ResourceError: xllamacpp is not installed.
    """
    base = models.fetch_base(config)
    tokenizer = models.load_tokenizer(base, trust_remote_code=config.model.trust_remote_code)
    rows = _rows(config, tokenizer, inputs["prepare"] / "eval.jsonl")
    full_model = full_model_folder(inputs["train"])
    trained = base if full_model is None else models.fetch(str(full_model))
    adapter = inputs["train"] / "adapter" if full_model is None else None
    model = _load(config, trained, adapter)
    references = _logits(model, rows, "what was trained")
    targets = [row.ids[position] for row in rows for position in row.positions]

    def compare_logits(logits: Sequence[NDArray[np.float32]]) -> TokenAgreement:
        pairs = zip(logits, targets, strict=True)
        return compare_distributions(references, [distribution_from_logits(row, target) for row, target in pairs])

    agreements = {}
    if adapter is not None:
        with model.disable_adapter():
            agreements["base"] = compare_logits(_logits(model, rows, "the base"))
    agreements["adapter" if full_model is None else "trained"] = compare_logits(references)
    del model
    gc.collect()
    if "merge" in inputs:
        merged = _load(config, models.fetch(str(inputs["merge"])), None)
        agreements["merged"] = compare_logits(_logits(merged, rows, "merged"))
        del merged
        gc.collect()
    threads = config.export.threads or os.cpu_count() or 1
    for kind in config.export.types:
        path = inputs["export"] / f"{config.run.name}-{kind}.gguf"
        with GgufReplay(path, context_tokens=max(len(row.ids) for row in rows), threads=threads) as file:
            distributions = [
                distribution
                for row in track(rows, f"replay of {kind}", len(rows))
                for distribution in file.distributions(row.ids, row.positions)
            ]
        agreements[kind] = compare_distributions(references, distributions)
    quantised = config.merge.into == "quantized_base"
    facts: Facts = {
        "reference": f"{'what was trained' if full_model else 'base + adapter'}{' in 4 bits' if quantised else ''}",
        "precision": config.predict.dtype,
        "num_examples": len(rows),
    }
    return _verify(facts, agreements, config, folder)


def _verify(facts: Facts, agreements: Mapping[str, TokenAgreement], config: Config, folder: Path) -> Facts:
    """Add the figures to the facts, and fail if an export does not match the trained model."""
    # The base is another model on purpose, so its figures are no reason to fail.
    agreements = {
        kind: agreement
        for kind, agreement in agreements.items()
        if kind != "base" or math.isfinite(agreement.mean_kl * agreement.perplexity)
    }
    exports = {kind: agreement for kind, agreement in agreements.items() if kind not in ("base", *_REFERENCES)}
    facts |= {
        "num_positions": next(iter(agreements.values())).num_positions,
        "replayed": {kind: asdict(agreement) for kind, agreement in agreements.items()},
        "min_same_share": {kind: _min_share(kind, config) for kind in exports},
    }
    for kind, agreement in agreements.items():
        _check_finite(kind, agreement, config)
    for kind, min_share in facts["min_same_share"].items():
        agreement = exports[kind]
        num_different = round((1 - agreement.same_best_token_share) * agreement.num_positions)
        if num_different > _num_allowed(min_share, agreement.num_positions):
            raise ArtifactError(
                f"{_file_name(kind, config)} gives the trained model's best token at "
                f"{agreement.same_best_token_share:.1%} of {agreement.num_positions} positions "
                f"(KL {agreement.mean_kl:.2g}, perplexity {agreement.perplexity:.3g}); "
                f"replay.{_min_share_option(kind)} requires {min_share:.0%}",
                hint="it is not the model that was trained; --redo merge and export"
                if kind in LOSSLESS_KINDS
                else "the file is damaged, or the type is too small for this model: --redo export, or a larger type",
            )
    facts["summary"] = _summary(agreements, exports)
    write_atomically(folder / "replay.json", json.dumps(facts, indent=1) + "\n")
    return facts


def _summary(agreements: Mapping[str, TokenAgreement], exports: Mapping[str, TokenAgreement]) -> str:
    same = ", ".join(
        f"{kind} {figures.same_best_token_share:.1%} (KL {figures.mean_kl:.2g})" for kind, figures in exports.items()
    )
    if "base" not in agreements:
        return f"same best token: {same}"
    before, after = agreements["base"].perplexity, agreements["adapter"].perplexity
    return f"held-out perplexity {before:.4g} before training, {after:.4g} after; same best token: {same}"


def _min_share_option(kind: str) -> str:
    return "min_same_share" if kind in LOSSLESS_KINDS else "min_same_share_quantised"


def _min_share(kind: str, config: Config) -> float:
    share: float = getattr(config.replay, _min_share_option(kind))
    return min(share, MAX_Q8_0_SHARE) if kind == "Q8_0" else share


def _file_name(kind: str, config: Config) -> str:
    names = {"merged": "the merged folder", **dict.fromkeys(_REFERENCES, "what was trained")}
    return names.get(kind, f"{config.run.name}-{kind}.gguf")


def _check_finite(kind: str, agreement: TokenAgreement, config: Config) -> None:
    figures = {"KL": agreement.mean_kl, "perplexity": agreement.perplexity}
    not_finite = ", ".join(f"{name} {value}" for name, value in figures.items() if not math.isfinite(value))
    if not_finite:
        raise ArtifactError(
            f"{_file_name(kind, config)} gives probabilities that are not finite ({not_finite})",
            hint="the training diverged, look at train/metrics.jsonl; or predict.dtype=float32"
            if kind in _REFERENCES
            else "its weights are damaged, or overflow in this type: --redo merge and export, or export another type",
        )


def _num_allowed(min_share: float, num_positions: int) -> int:
    # At least one, because one near-tie is a large share of few positions.
    return max(math.floor((1 - min_share) * num_positions + 1e-9), int(min_share < 1))


def _rows(config: Config, tokenizer: Any, path: Path) -> list[_Row]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for line in islice(lines, config.replay.num_examples):
            example = Example.model_validate_json(line)
            encoded = chat.encode_example(tokenizer, example.messages, example.answer)
            positions = [at for at, trained in enumerate(encoded.completion_mask) if trained and at]
            positions = positions[: config.replay.max_tokens]
            rows.append(_Row(list(encoded.input_ids[: positions[-1] + 1]), positions))
    if not rows:
        raise ArtifactError(
            f"{path} holds no example to replay", hint="prepare with data.max_eval_samples of at least 1"
        )
    return rows


def _load(config: Config, ref: models.ModelFolder, adapter: Path | None) -> Any:
    model: Any = models.load_model(
        ref,
        dtype=config.predict.dtype,
        quantization="nf4" if adapter is not None and config.merge.into == "quantized_base" else "none",
        trust_remote_code=config.model.trust_remote_code,
    )
    return model if adapter is None else adapters.load_adapter(model, adapter)


def _logits(model: Any, rows: Sequence[_Row], what: str) -> list[NDArray[np.float32]]:
    """Return the logits that predict the token of every position, each (vocabulary,), float32.

    The common prefix of successive rows, such as a page with several questions, is computed once.
    """
    logits_of_positions, reader = [], LogitsReader(model)
    for row in track(rows, f"replay of {what}", len(rows)):
        first = row.positions[0]
        logits = reader.read(row.ids, first)
        logits_of_positions += [logits[position - first].float().cpu().numpy() for position in row.positions]
    return logits_of_positions
