"""``fintune replay``: the same positions through base + adapter, the merged folder and each GGUF file, side by side."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune import chat, models
from fintune.artifact import Facts
from fintune.errors import ArtifactError
from fintune.gguf.replay import Agreement, GgufReplay, compare, from_logits
from fintune.options import Config
from fintune.progress import say, track
from fintune.records import Example
from fintune.tuning import full
from fintune.tuning.quiet import quiet_libraries

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NUM_GOLDEN = 16
"""Held-out examples that are replayed, at every token of their completions."""

MIN_SAME_SHARE: Mapping[str, float] = {"merged": 0.98, "F32": 0.98, "F16": 0.98}
"""Share of positions whose likeliest token must be that of base + adapter; quantised files are told, not judged."""


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
        By kind: mean KL divergence from base + adapter in float32 (nats), share of positions with the same likeliest
        token, perplexity of the completions.

    Raises:
        ArtifactError: A form that should be the same model and is not, or no file to replay.
        ModelError: A model or file that cannot be loaded.
        ResourceError: xllamacpp is not installed.
    """
    ref = models.fetch(models.resolve(config.model.name, revision=config.model.revision))
    trust = config.model.trust_remote_code
    tokenizer = models.load_tokenizer(ref, trust_remote_code=trust)
    rows = _rows(tokenizer, inputs["prepare"] / "eval.jsonl")
    whole = full.result(inputs["train"])
    trained = ref if whole is None else models.resolve(str(whole))
    adapter = inputs["train"] / "adapter" if whole is None else None
    references = _logits(trained, adapter, rows, "trained", trust)
    targets = [row.ids[position] for row in rows for position in row.positions]

    def own(logits: Sequence[NDArray[np.float32]]) -> Agreement:
        return compare(references, [from_logits(each, target) for each, target in zip(logits, targets, strict=True)])

    found = {"adapter" if whole is None else "trained": own(references)}
    if "merge" in inputs:
        found["merged"] = own(_logits(models.resolve(str(inputs["merge"])), None, rows, "merged", trust))
    threads = config.export.threads or os.cpu_count() or 1
    for kind in config.export.types:
        path = inputs["export"] / f"{config.run.name}-{kind}.gguf"
        with GgufReplay(path, context_tokens=max(len(row.ids) for row in rows), threads=threads) as file:
            answers = [
                each
                for row in track(rows, f"replay of {kind}", len(rows))
                for each in file.distributions(row.ids, row.positions)
            ]
        found[kind] = compare(references, answers)
    return _judged(found, folder)


def _judged(found: Mapping[str, Agreement], folder: Path) -> Facts:
    for kind, each in found.items():
        say(
            f"{kind}: KL {each.mean_kl:.2g}, same best token {each.same_best_token_share:.1%}, "
            f"perplexity {each.perplexity:.4g}"
        )
    facts: Facts = {
        "num_positions": next(iter(found.values())).num_positions,
        "replayed": {kind: asdict(each) for kind, each in found.items()},
        "min_same_share": {kind: least for kind, least in MIN_SAME_SHARE.items() if kind in found},
    }
    for kind, least in MIN_SAME_SHARE.items():
        share = found[kind].same_best_token_share if kind in found else 1.0
        if share < least:
            raise ArtifactError(
                f"{kind} gives the trained model's best token at {share:.1%} of {facts['num_positions']} positions, "
                f"at least {least:.0%} are asked for",
                hint="it is not the model that was trained; --redo merge and export",
            )
    files = {kind: each for kind, each in found.items() if kind not in ("adapter", "trained")}
    facts["summary"] = ", ".join(
        f"{kind} {each.same_best_token_share:.1%} KL {each.mean_kl:.2g}" for kind, each in files.items()
    )
    (folder / "replay.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _rows(tokenizer: Any, path: Path) -> list[_Row]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(NUM_GOLDEN), strict=False):
            example = Example.model_validate_json(line)
            encoded = chat.encode_example(tokenizer, example.messages, example.completion)
            positions = [at for at, trained in enumerate(encoded.completion_mask) if trained and at]
            rows.append(_Row(list(encoded.input_ids), positions))
    if not any(row.positions for row in rows):
        raise ArtifactError(f"{path} holds no example to replay", hint="prepare with data.max_eval of at least 1")
    return rows


def _logits(
    ref: models.ModelRef, adapter: Path | None, rows: Sequence[_Row], what: str, trust: bool
) -> list[NDArray[np.float32]]:
    """Logits from which each position's token is predicted, (vocabulary,) each, float32."""
    import torch

    model: Any = models.load_model(ref, dtype="float32", device="cpu", trust_remote_code=trust)
    if adapter is not None:
        with quiet_libraries():
            model = models.load_adapter(model, adapter)
    found = []
    with torch.inference_mode():
        for row in track(rows, f"replay of {what}", len(rows)):
            before = torch.tensor(row.positions) - 1
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, before]
            found += [each.numpy() for each in logits.float()]
    del model
    gc.collect()
    return found
