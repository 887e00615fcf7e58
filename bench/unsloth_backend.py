"""This package's training beside Unsloth's (``train.backend``): same data, losses, speed and memory, on one CUDA GPU.

::

    python bench/unsloth_backend.py --model MODEL --unsloth-python ENV/bin/python --out bench/results/unsloth.json
    python bench/unsloth_backend.py --model builtin:smollm2-135m --runs own --steps 2    # a trial, on a CPU

Four trainings in turn: by this package, by it with another seed (how far chance alone moves the losses), by Unsloth on
the first seed, as it comes and without recomputed layers. All see the same generated pages, with the masks of
``prepare``, in the order of their seed; the weights of a fresh adapter differ between the two backends. The speed is of
the steps behind the fifth.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARM_UP = 5
LAST = 20
RUNS = {
    "own": ("train.backend=builtin", "run.seed=17"),
    "own, other seed": ("train.backend=builtin", "run.seed=18"),
    "unsloth": ("train.backend=unsloth", "run.seed=17"),
    "unsloth, no checkpointing": ("train.backend=unsloth", "run.seed=17", "train.gradient_checkpointing=false"),
}


def main() -> None:
    """Train by each backend and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub id or builtin:smollm2-135m")
    parser.add_argument("--runs", default=";".join(RUNS), help="some of them, with ; between")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--unsloth-python", type=Path, help="python of an environment with Unsloth")
    parser.add_argument("--folder", type=Path, help="for the runs; a temporary one where empty")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    chosen = [name.strip() for name in options.runs.split(";")]
    for name in chosen:
        if name not in RUNS:
            parser.error(f"--runs: {name!r} is none of {', '.join(RUNS)}")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fintune-backends-"))
    data = _data(folder, num_train=options.steps * options.batch)
    results = {}
    for name in chosen:
        results[name] = _run(name, data, folder, options)
        print(f"{name}: {json.dumps({k: v for k, v in results[name].items() if k != 'losses'})}", flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(_report(results, options), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(_compared(results), indent=1))


def _data(folder: Path, *, num_train: int) -> list[str]:
    from fintune.data.synthetic import generate

    overrides = ["data.source=finqa"]
    folder.mkdir(parents=True, exist_ok=True)
    made = generate(num_train // 4 + 9, pages_per_company=2, questions_per_page=2, seed=0, size="full")
    records = [record.model_dump(mode="json") for record in made]
    for name, part in (("eval", records[:32]), ("train", records[36 : 36 + num_train])):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(part), encoding="utf-8")
        overrides.append(f"data.{name}={path}")
    return overrides


def _run(name: str, data: list[str], folder: Path, options: argparse.Namespace) -> dict:
    from fintune.config.load import load
    from fintune.pipeline.runner import Pipeline
    from fintune.pipeline.step import Selection
    from fintune.pipeline.steps import build_steps
    from fintune.training import metrics

    overrides = [
        *data,
        *RUNS[name],
        f"run.dir={folder}",
        f"run.name={name.replace(', ', '-').replace(' ', '-')}",
        f"model.name={options.model}",
        f"model.quantization={'nf4' if options.four_bit else 'none'}",
        "prompt.max_length=2048",
        "train.learning_rate=2e-4",
        f"train.per_device_train_batch_size={options.batch}",
        f"train.max_steps={options.steps}",
        f"train.eval_steps={options.steps}",
    ]
    if name.startswith("unsloth") and options.unsloth_python is not None:
        overrides.append(f"train.backend_python={options.unsloth_python}")
    config = load(None, overrides).config
    pipeline = Pipeline(config, build_steps(config), Selection(only=("prepare", "train")))
    list(pipeline.run())
    manifest = pipeline.manifest("train")
    assert manifest is not None, "train is done"
    lines = metrics.read(config.folder / "train" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    begin = steps[min(WARM_UP, len(steps) - 1) - 1] if len(steps) > 1 else {"tokens": 0, "seconds": 0.0}
    facts = manifest.facts
    return {
        "tokens_per_second": round(
            (steps[-1]["tokens"] - begin["tokens"]) / (steps[-1]["seconds"] - begin["seconds"]), 1
        ),
        "last_losses_mean": round(statistics.mean(line["loss"] for line in steps[-LAST:]), 4),
        "eval_loss": next((round(line["eval_loss"], 4) for line in reversed(lines) if "eval_loss" in line), None),
        "peak_gib": facts.get("peak_gib", facts.get("unsloth", {}).get("peak_gib")),
        "versions": facts.get("unsloth", {}).get("versions", manifest.versions),
        "seconds": manifest.seconds,
        "losses": [round(line["loss"], 4) for line in steps],
    }


def _compared(results: dict[str, dict]) -> dict:
    """How far Unsloth's losses lie from ours, beside how far those of another seed do."""
    if "own" not in results:
        return {}
    own, found = results["own"], {}
    for name, other in results.items():
        if name != "own":
            found[name] = {
                "eval_loss_difference": round(other["eval_loss"] - own["eval_loss"], 4),
                "last_losses_difference": round(other["last_losses_mean"] - own["last_losses_mean"], 4),
                "tokens_per_second_of_own": round(other["tokens_per_second"] / own["tokens_per_second"], 3),
            }
            if name.startswith("unsloth"):  # the same examples in the same order
                gaps = [abs(a - b) for a, b in zip(own["losses"], other["losses"], strict=True)]
                found[name] |= {"step_gap_mean": round(statistics.mean(gaps), 4), "step_gap_max": round(max(gaps), 4)}
    return found


def _report(results: dict[str, dict], options: argparse.Namespace) -> dict:
    import torch

    from fintune.util.system import installed_versions

    here = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": " ".join(sys.argv),
        "machine": here,
        "commit": commit,
        "versions": installed_versions(),
        "steps": options.steps,
        "batch": options.batch,
        "compared": _compared(results),
        "results": results,
    }


if __name__ == "__main__":
    main()
