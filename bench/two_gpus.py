"""Several GPUs against one: the same losses, and how many tokens a second.

::

    python bench/two_gpus.py --model 3b --gpus 2 --out bench/results/two_gpus_h100.json
    python bench/two_gpus.py --model tiny --gpus 2          # a trial on a CPU

A model of true shape with random weights trains on the same rows through ``fintune train``'s stage: on one GPU with
whole copies on each of them, and with the frozen weights divided (FSDP2), each time as many examples a step. Every
variant is a process of its own. The first steps warm up; tokens a second are those of all others. "Two machines" are
two agents on this one, a GPU each: the second is started with the line that the first prints.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from support.paths import ROOT

sys.path.insert(0, str(Path(__file__).resolve().parent))

from shapes import SIZES
from train_speed import _configuration, _tokenizer_folder

WARM_UP = 4
WAYS = (
    {"name": "one GPU", "gpus": 1},
    {"name": "whole copies", "sharding": "none"},
    {"name": "divided", "sharding": "full"},
    {"name": "two machines", "gpus": 1, "machines": 2, "sharding": "none"},
    {"name": "two machines, divided", "gpus": 1, "machines": 2, "sharding": "full"},
    {"name": "DoRA, one GPU", "gpus": 1, "kind": "dora"},
    {"name": "DoRA, whole copies", "sharding": "none", "kind": "dora"},
    {"name": "DoRA, divided", "sharding": "full", "kind": "dora"},
    {"name": "QLoRA, one GPU", "gpus": 1, "quantization": "nf4"},
    {"name": "QLoRA, whole copies", "sharding": "none", "quantization": "nf4"},
)


def _make_model(name: str, folder: Path) -> None:
    """A model folder with random weights; float32 for the tiny one, as its folder would be."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    dtype = torch.float32 if name == "tiny" else torch.bfloat16
    # Made where random numbers are quick, and gone from there before the training begins.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(_configuration(name), dtype=dtype)
    model.cpu().save_pretrained(folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(name))
    tokenizer.chat_template = "{{ messages[0]['content'] }}</s>"
    tokenizer.save_pretrained(folder)


def _make_rows(vocabulary: int, number: int, length: int, folder: Path) -> None:
    import random

    from datasets import Dataset

    draw = random.Random(0)  # noqa: S311 - token ids, no secret
    rows = []
    for at in range(number):
        size = max(8, round(draw.gauss(length * 0.9, length * 0.13)))
        ids = [draw.randrange(4, vocabulary) for _ in range(size)]
        rows.append({"id": f"r{at}", "input_ids": ids, "completion_mask": [0] * 4 + [1] * (size - 4)})
    for split in ("train", "eval"):
        kept = rows if split == "train" else rows[:16]
        Dataset.from_list(kept).save_to_disk(str(folder / "tokens" / split))


def _worker(order: dict) -> None:
    from fintune.config import Config
    from fintune.errors import FintuneError
    from fintune.pipeline.stages.train import check_training, train

    config = Config.model_validate(order["config"])
    try:
        check_training(config)
        facts = train(config, {"prepare": Path(order["prepare"])}, Path(order["folder"]))
    except FintuneError as error:
        print("RESULT " + json.dumps({"ok": False, "error": str(error)}), flush=True)
        return
    lines = [json.loads(line) for line in (Path(order["folder"]) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    timed_steps = steps[WARM_UP - 1 :]
    timed = steps[-1]["seconds"] - steps[WARM_UP - 1]["seconds"]
    tokens = steps[-1]["tokens"] - steps[WARM_UP - 1]["tokens"]
    found = {
        "ok": True,
        "losses": [line["loss"] for line in steps],
        "grad_norms": [line["grad_norm"] for line in steps],
        "eval_losses": [line["eval_loss"] for line in lines if "eval_loss" in line],
        "tokens_per_second": round(tokens / max(timed, 1e-9), 1),
        "step_seconds_median": round(
            statistics.median(b["seconds"] - a["seconds"] for a, b in pairwise(timed_steps)), 4
        ),
        "peak_gib": facts.get("peak_gib"),
    }
    print("RESULT " + json.dumps(found), flush=True)


def _run(way: dict, options: argparse.Namespace, place: Path) -> dict:
    gpus, machines = way.get("gpus", options.gpus), way.get("machines", 1)
    folder = place / way["name"].replace(" ", "-").replace(",", "")
    folder.mkdir()
    batch = options.batch * options.gpus // (gpus * machines)
    train = {
        "per_device_train_batch_size": batch,
        "gpus": gpus,
        "machines": machines,
        "sharding": way.get("sharding", "auto"),
    }
    train |= {"max_steps": options.steps, "save_steps": 10**6, "eval_steps": options.steps, "learning_rate": 1e-4}
    if options.model == "tiny":
        train |= {"dtype": "float32", "threads": 1}
    order = {
        "config": {
            "model": {"name": str(place / "model"), "quantization": way.get("quantization", "none")},
            "adapter": {"kind": way.get("kind", "lora"), "r": 16},
            "train": train,
        },
        "prepare": str(place / "prepare"),
        "folder": str(folder),
    }
    began = time.monotonic()
    source = str(ROOT / "src")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(order)]
    log = place / f"{folder.name}.log"
    with log.open("w") as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=env) as process:
        other = _second_machine(process, log, env) if machines > 1 else None
        told, _ = process.communicate()
        if other is not None:
            other.kill()
            other.wait()
    lines = [line for line in told.decode().splitlines() if line.startswith("RESULT ")]
    found = json.loads(lines[-1][7:]) if lines else {"ok": False, "error": log.read_text()[-1500:]}
    seconds = round(time.monotonic() - began, 1)
    return {"variant": way["name"], "gpus": gpus * machines, "seconds": seconds, **found}


def _second_machine(first: subprocess.Popen, log: Path, env: dict[str, str]) -> subprocess.Popen | None:
    """Another agent, started as a user would, with the line that the first one printed."""
    sign = " other machines: torchrun "
    while first.poll() is None:
        line = next((line for line in log.read_text().splitlines() if sign in line), "")
        if line:
            words = shlex.split(line.partition(sign)[2])
            hidden = {**env, "CUDA_VISIBLE_DEVICES": "1"}
            with log.with_suffix(".second").open("w") as out:
                command = [sys.executable, "-m", "torch.distributed.run", *words]
                return subprocess.Popen(command, stdout=out, stderr=out, env=hidden)
        time.sleep(0.2)
    return None


def _compare(results: list[dict]) -> None:
    """Beside each variant its largest relative difference to the one on one GPU before it, and its gain."""
    base: dict = {}
    for result in results:
        if not result["ok"]:
            continue
        if result["gpus"] == 1:
            base = result
            continue
        if base:
            pairs = zip(result["losses"], base["losses"], strict=True)
            result["largest_loss_difference"] = max(abs(a - b) / b for a, b in pairs)
            result["times_one_gpu"] = round(result["tokens_per_second"] / base["tokens_per_second"], 2)


def main() -> None:
    """Run all variants, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="3b")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="examples a pass and GPU")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--only", default="", help="numbers of variants, with commas; all where empty")
    parser.add_argument("--out", type=Path, help="JSON file for the results; kept up to date after every variant")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _worker(json.loads(options.worker))
        return
    import torch

    chosen = [WAYS[int(number)] for number in options.only.split(",")] if options.only else list(WAYS)
    machine = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor()
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        _make_model(options.model, place / "model")
        number = options.batch * options.gpus * options.steps
        _make_rows(SIZES[options.model]["vocab_size"], number, options.length, place / "prepare")
        for way in chosen:
            results.append(_run(way, options, place))
            _compare(results)
            told = {key: value for key, value in results[-1].items() if key not in ("losses", "grad_norms")}
            print(json.dumps(told), flush=True)
            if options.out:
                report = {"machine": machine, "torch": torch.__version__, "model": options.model, "results": results}
                options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
