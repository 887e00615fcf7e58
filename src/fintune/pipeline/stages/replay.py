"""``fintune replay``: the same positions through base + adapter, the merged folder and each GGUF file, side by side."""

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
from fintune.inference.likelihood import Reader
from fintune.manifest import Facts
from fintune.models import adapter as adapters
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.records import Example
from fintune.training import full
from fintune.util.console import quiet_libraries, track
from fintune.util.files import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

JUDGED = ("merged", "F32", "F16", "BF16", "Q8_0")
"""Forms that are the same model as base + adapter: ``replay.min_same_share`` holds for them, for all others the floor
``replay.min_same_share_quantised``."""
Q8_0_SAME_SHARE = 0.9
"""Asked of Q8_0 at most: of a sound file of a small model 0.977 was measured, and of few positions less can be."""
_REFERENCES = ("adapter", "trained")


@dataclass(frozen=True)
class _Row:
    """Tokens of an example and the positions of its completion."""

    ids: list[int]
    positions: list[int]


def replay(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Compare what each form of the model answers at the completions of held-out examples.

    Args:
        config: The run.
        inputs: Needs ``prepare``, ``train`` and ``export``; ``merge`` is compared where it is there.
        folder: Gets ``replay.json``.

    Returns:
        By kind, the base without its adapter first: mean KL divergence from base + adapter in ``predict.dtype``
        (nats), share of positions with the same likeliest token, perplexity of the completions. Where the adapter was
        merged into dequantised weights, the reference is the adapter on the base in 4 bits, as training had it.

    Raises:
        ArtifactError: A form that should be the same model and is not, a quantised file that is ruined, figures that
            are not finite, or no example to replay.
        ModelError: A model or file that cannot be loaded.
        ResourceError: xllamacpp is not installed.
    """
    ref = models.fetch_base(config)
    tokenizer = models.load_tokenizer(ref, trust_remote_code=config.model.trust_remote_code)
    rows = _rows(config, tokenizer, inputs["prepare"] / "eval.jsonl")
    whole = full.full_model_folder(inputs["train"])
    trained = ref if whole is None else models.fetch(str(whole))
    adapter = inputs["train"] / "adapter" if whole is None else None
    model = _load(config, trained, adapter)
    references = _logits(model, rows, "what was trained")
    targets = [row.ids[position] for row in rows for position in row.positions]

    def own(logits: Sequence[NDArray[np.float32]]) -> TokenAgreement:
        return compare_distributions(
            references, [distribution_from_logits(each, target) for each, target in zip(logits, targets, strict=True)]
        )

    found = {}
    if adapter is not None:
        with model.disable_adapter():
            found["base"] = own(_logits(model, rows, "the base"))
    found["adapter" if whole is None else "trained"] = own(references)
    del model
    gc.collect()
    if "merge" in inputs:
        merged = _load(config, models.fetch(str(inputs["merge"])), None)
        found["merged"] = own(_logits(merged, rows, "merged"))
        del merged
        gc.collect()
    threads = config.export.threads or os.cpu_count() or 1
    for kind in config.export.types:
        path = inputs["export"] / f"{config.run.name}-{kind}.gguf"
        with GgufReplay(path, context_tokens=max(len(row.ids) for row in rows), threads=threads) as file:
            answers = [
                each
                for row in track(rows, f"replay of {kind}", len(rows))
                for each in file.distributions(row.ids, row.positions)
            ]
        found[kind] = compare_distributions(references, answers)
    dequantised = config.merge.into == "quantized_base"
    facts: Facts = {
        "reference": f"{'what was trained' if whole else 'base + adapter'}{' in 4 bits' if dequantised else ''}",
        "precision": config.predict.dtype,
        "num_examples": len(rows),
    }
    return _judged(facts, found, config, folder)


def _judged(facts: Facts, found: Mapping[str, TokenAgreement], config: Config, folder: Path) -> Facts:
    # Another model by intent, which is nothing to fail for.
    found = {
        kind: each for kind, each in found.items() if kind != "base" or math.isfinite(each.mean_kl * each.perplexity)
    }
    files = {kind: each for kind, each in found.items() if kind not in ("base", *_REFERENCES)}
    facts |= {
        "num_positions": next(iter(found.values())).num_positions,
        "replayed": {kind: asdict(each) for kind, each in found.items()},
        "min_same_share": {kind: _least(kind, config) for kind in files},
    }
    for kind, each in found.items():
        _check_finite(kind, each, config)
    for kind, least in facts["min_same_share"].items():
        each = files[kind]
        if _num_other(each) > _num_allowed(least, each.num_positions):
            raise ArtifactError(
                f"{_called(kind, config)} gives the trained model's best token at {each.same_best_token_share:.1%} of "
                f"{each.num_positions} positions (KL {each.mean_kl:.2g}, perplexity {each.perplexity:.3g}), "
                f"{least:.0%} are asked for (replay.{_bound(kind)})",
                hint="it is not the model that was trained; --redo merge and export"
                if kind in JUDGED
                else "the file is ruined, or the type is too small for this model: --redo export, or a larger type",
            )
    facts["summary"] = _summary(found, files)
    write_atomically(folder / "replay.json", json.dumps(facts, indent=1) + "\n")
    return facts


def _summary(found: Mapping[str, TokenAgreement], files: Mapping[str, TokenAgreement]) -> str:
    same = ", ".join(f"{kind} {each.same_best_token_share:.1%} (KL {each.mean_kl:.2g})" for kind, each in files.items())
    if "base" not in found:
        return f"same best token: {same}"
    before, after = found["base"].perplexity, found["adapter"].perplexity
    return f"held-out perplexity {before:.4g} before training, {after:.4g} after; same best token: {same}"


def _bound(kind: str) -> str:
    """The option that says how far a form may stray."""
    return "min_same_share" if kind in JUDGED else "min_same_share_quantised"


def _least(kind: str, config: Config) -> float:
    least: float = getattr(config.replay, _bound(kind))
    return min(least, Q8_0_SAME_SHARE) if kind == "Q8_0" else least


def _called(kind: str, config: Config) -> str:
    return "the merged folder" if kind == "merged" else f"{config.run.name}-{kind}.gguf"


def _check_finite(kind: str, found: TokenAgreement, config: Config) -> None:
    figures = {"KL": found.mean_kl, "perplexity": found.perplexity}
    lost = [f"{name} {value}" for name, value in figures.items() if not math.isfinite(value)]
    if not lost:
        return
    if kind in _REFERENCES:
        raise ArtifactError(
            f"what was trained gives probabilities that are not finite ({', '.join(lost)})",
            hint="the training diverged, look at train/metrics.jsonl; or predict.dtype=float32",
        )
    raise ArtifactError(
        f"{_called(kind, config)} gives probabilities that are not finite ({', '.join(lost)})",
        hint="its weights are ruined, or overflow in this type; --redo merge and export, or export another type",
    )


def _num_other(each: TokenAgreement) -> int:
    return round((1 - each.same_best_token_share) * each.num_positions)


def _num_allowed(least: float, num_positions: int) -> int:
    # Of few positions one near-tie would be a large share.
    return max(math.floor((1 - least) * num_positions + 1e-9), int(least < 1))


def _rows(config: Config, tokenizer: Any, path: Path) -> list[_Row]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for line in islice(lines, config.replay.num_examples):
            example = Example.model_validate_json(line)
            encoded = chat.encode_example(tokenizer, example.messages, example.completion)
            positions = [at for at, trained in enumerate(encoded.completion_mask) if trained and at]
            positions = positions[: config.replay.max_tokens]
            rows.append(_Row(list(encoded.input_ids[: positions[-1] + 1]), positions))
    if not rows:
        raise ArtifactError(
            f"{path} holds no example to replay", hint="prepare with data.max_eval_samples of at least 1"
        )
    return rows


def _load(config: Config, ref: models.ModelFolder, adapter: Path | None) -> Any:
    model = models.load_model(
        ref,
        dtype=config.predict.dtype,
        quantization="nf4" if adapter is not None and config.merge.into == "quantized_base" else "none",
        trust_remote_code=config.model.trust_remote_code,
    )
    if adapter is not None:
        with quiet_libraries():
            return adapters.load_adapter(model, adapter)
    return model


def _logits(model: Any, rows: Sequence[_Row], what: str) -> list[NDArray[np.float32]]:
    """Logits from which each position's token is predicted, (vocabulary,) each, float32.

    What a row has in common with the one before it, as questions on one page have, is computed once.
    """
    found, read = [], Reader(model)
    for row in track(rows, f"replay of {what}", len(rows)):
        first = row.positions[0]
        logits = read(row.ids, first)
        found += [logits[position - first].float().cpu().numpy() for position in row.positions]
    return found
