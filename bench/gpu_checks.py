"""Every way of training and evaluating, once each on this machine's GPU (or CPU): one line a way.

::

    python bench/gpu_checks.py [--out bench/results/gpu_checks.json] [--only WORD]

A tiny random model trains for some steps through the stage of ``fintune train``. Of each way is checked that it ends,
that its losses are finite, and that they are those of the way it must equal: fused layers against transformers' own,
recomputed against kept, resumed against uninterrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path

from support.paths import ROOT

sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "src")]

METHODS = {
    "lora": ("lora", "none"),
    "qlora": ("lora", "nf4"),
    "dora": ("dora", "none"),
    "qdora": ("dora", "nf4"),
}
EVALUATIONS = {"eval_steps": 2, "eval_new_tokens": 8}


def _ways() -> list[dict]:
    """Name, options, and the way whose losses it must have, within a share."""
    made = []
    for name, (kind, quantization) in METHODS.items():
        adapter, model = {"kind": kind}, {"quantization": quantization}
        for precision, near in (("float32", 2e-3), ("bfloat16", 2e-2)):
            common = {"adapter": adapter, "model": model}
            own = f"{name} {precision}"
            made.append({"name": own, **common, "train": {"dtype": precision, "fused_layers": "never"}})
            fused = {"dtype": precision, "fused_layers": "always"}
            made.append({"name": f"{own} fused", **common, "train": fused, "like": own, "near": near})
        made.append(
            {
                "name": f"{name} fused, recomputed",
                **common,
                "train": {**fused, "gradient_checkpointing": True},
                "like": f"{name} bfloat16 fused",
                "near": 1e-3,
            }
        )
        made.append(
            {
                "name": f"{name} fused, accumulated",
                **common,
                "train": {**fused, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
                "like": f"{name} bfloat16 fused",
                "near": 2e-2,
            }
        )
        dropped = {**common, "adapter": {**adapter, "lora_dropout": 0.1}}
        made.append({"name": f"{name} fused, dropout", **dropped, "train": fused})
        for keep in ("best_loss", "best_accuracy"):
            train = {**fused, **EVALUATIONS, "select_checkpoint": keep, "early_stopping_patience": 9}
            made.append({"name": f"{name} fused, keeps {keep}", **common, "train": train})
    for keep in ("last", "best_loss", "best_accuracy"):
        train = {"dtype": "bfloat16", **EVALUATIONS, "select_checkpoint": keep}
        made.append({"name": f"full, keeps {keep}", "adapter": {"kind": "full"}, "train": train})
    for init, quantization in (("pissa", "none"), ("loftq", "nf4")):
        made.append(
            {
                "name": f"lora from {init}",
                "adapter": {"init_lora_weights": init},
                "model": {"quantization": quantization},
                "train": {},
            }
        )
    return made


def _run(way: dict, place: Path) -> dict:
    from fintune.config import Config
    from fintune.pipeline.stages.train import check_training, train

    folder = place / way["name"].replace(" ", "-").replace(",", "")
    folder.mkdir()
    common = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.0,
    }
    config = Config.model_validate(
        {
            "model": {"name": str(place / "model"), **way.get("model", {})},
            "adapter": {"r": 8, **way["adapter"]},
            "train": {**common, **way["train"]},
        }
    )
    check_training(config)
    facts = train(config, {"prepare": place / "prepare"}, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "eval_losses": [line["eval_loss"] for line in lines if "eval_loss" in line],
        "eval_accuracies": [line["eval_accuracy"] for line in lines if "eval_accuracy" in line],
        "peak_gib": facts.get("peak_gib"),
        "predicted_peak_gib": facts.get("predicted_peak_gib"),
    }


def _verdict(way: dict, found: dict, earlier: dict[str, dict]) -> str:
    """What is wrong; empty where nothing is."""
    numbers = found["losses"] + found["eval_losses"]
    if len(found["losses"]) != 6 or not all(map(math.isfinite, numbers)):
        return f"losses {numbers}"
    other = earlier.get(way.get("like", ""))
    if other is None:
        return ""
    away = max(abs(a - b) / abs(b) for a, b in zip(found["losses"], other["losses"], strict=True))
    found["away"] = round(away, 7)
    return "" if away <= way["near"] else f"{away:.2%} away from {way['like']}"


def main() -> None:
    """Run all ways; the exit status is the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="ways whose name holds this")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    import torch

    from fintune.util.console import console
    from support.prepared_rows import prepared
    from support.tiny import make_tiny_model

    console.quiet = True
    earlier: dict[str, dict] = {}
    results = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        # Wide enough for whole blocks of 4-bit factors, and for heads that every attention kernel takes.
        make_tiny_model(place / "model", hidden_size=256, num_layers=3)
        prepared(place / "prepare", place / "model")
        for way in (way for way in _ways() if options.only in way["name"]):
            began = time.monotonic()
            try:
                found = _run(way, place)
                wrong = _verdict(way, found, earlier)
                earlier[way["name"]] = found
            except Exception as error:
                found, wrong = {"trace": traceback.format_exc()[-1500:]}, f"{type(error).__name__}: {str(error)[:200]}"
            seconds = time.monotonic() - began
            print(f"{'FAILED' if wrong else 'ok':7}{way['name']:34}{seconds:6.1f} s  {wrong}", flush=True)
            results.append({"way": way["name"], "ok": not wrong, "wrong": wrong, "seconds": round(seconds, 1), **found})
    machine = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor()
    if options.out:
        report = {"machine": machine, "torch": torch.__version__, "results": results}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = sum(not result["ok"] for result in results)
    print(f"{len(results) - failed} of {len(results)} on {machine}")
    sys.exit(min(failed, 100))


if __name__ == "__main__":
    main()
