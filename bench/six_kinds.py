"""Accuracy of each kind of model of one recipe: base, LoRA, DoRA, 4 bits, merged, GGUF; the same questions for all.

    python bench/six_kinds.py --finqa ../shared/finqa --dir runs --out bench/results/six_kinds.json [KEY=VALUE]...

Two runs of configs/finqa.yaml with the built-in model, `lora` and `dora`, differ in adapter.kind alone; `fintune score`
then gives one table. Base and LoRA are asked twice, free and kept to programs of the page (predict.constrain), each in
columns of its own, with the answers that the constraint gains and loses. A run goes on where it was interrupted, and so
does this program. Few steps on few conversations: it shows that every kind predicts and what each costs in accuracy
beside the others, and is no claim about FinQA.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.paths import ROOT

OPTIONS = (
    "data.max_train_samples=300",
    "data.max_eval_samples=100",
    "prompt.max_length=768",
    "adapter.r=16",
    "adapter.lora_alpha=32",
    "train.num_train_epochs=1",
    "train.max_steps=100",
    "train.per_device_train_batch_size=1",
    "train.adam_beta2=0.99",
    "train.warmup_ratio=0.05",
    "train.save_steps=25",
    "predict.max_new_tokens=64",
    "predict.dtype=bfloat16",
)
KINDS = {
    "base": ("lora", "base"),
    "LoRA": ("lora", "adapter"),
    "LoRA, 4 bits": ("lora", "adapter_4bit"),
    "DoRA": ("dora", "adapter"),
    "merged": ("lora", "merged"),
    "GGUF F16": ("lora", "F16"),
    "GGUF Q4_K_M": ("lora", "Q4_K_M"),
}
"""Name in the table, and the run and the step's kind that it is from."""
CONSTRAINED = {f"{kind}+page": (run, f"{step}+page") for kind, (run, step) in KINDS.items() if kind in ("base", "LoRA")}
"""The same of the kinds that are also asked for programs of the page alone."""
STAGES = {"lora": ("prepare", "train", "merge", "export"), "dora": ("prepare", "train")}


def main() -> None:
    """Run what is missing, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finqa", type=path, required=True, help="folder of train.json.gz and dev.json.gz")
    parser.add_argument("--dir", type=path, default=path("runs"), help="folder of the two runs")
    parser.add_argument("--out", type=path, required=True, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    options = [*OPTIONS, *given.overrides]
    for name in STAGES:
        fintune(*words(name, options), f"data.train={given.finqa / 'train.json.gz'}", *places(given))
    measured = KINDS | CONSTRAINED
    names = [
        f"{kind if kind in CONSTRAINED else f'{kind}+none'}={given.dir / run / 'predict' / step / 'predictions.jsonl'}"
        for kind, (run, step) in measured.items()
    ]
    gold = given.dir / "lora" / "prepare" / "gold.json"
    table = fintune("score", *(word for name in names for word in ("--predictions", name)), "--gold", str(gold))
    print(table, end="")
    result = {
        "what": __doc__.splitlines()[0],
        "commands": [shlex.join(["fintune", *words(name, options)]) for name in STAGES],
        "kinds": {kind: figures(given.dir / run, step) for kind, (run, step) in measured.items()},
        "constraint": {
            kind: difference(*(given.dir / run / "score" / each / "score.csv" for each in (step, f"{step}+page")))
            for kind, (run, step) in KINDS.items()
            if f"{kind}+page" in CONSTRAINED
        },
        **surroundings(),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def path(text: str) -> Path:
    """A path that means the same from the repository's root."""
    return Path(text).resolve()


def words(name: str, options: list[str]) -> list[str]:
    """What one run is asked, but for where files lie."""
    steps = [step for run, step in (*KINDS.values(), *CONSTRAINED.values()) if run == name]
    stages = [*STAGES[name], *(f"{verb}/{step}" for step in steps for verb in ("predict", "score"))]
    only = [word for stage in stages for word in ("--only", stage)]
    kinds = [step for step in steps if "+" not in step]
    asked = [f"predict.models=[{', '.join(kinds)}]"]
    if kinds != steps:
        asked.append("predict.constrain=[none, page]")
    return ["run", "configs/finqa.yaml", f"run.name={name}", f"adapter.kind={name}", *asked, *options, *only]


def places(given: argparse.Namespace) -> list[str]:
    """Where files lie."""
    return [f"data.eval={given.finqa / 'dev.json.gz'}", f"run.dir={given.dir}"]


def fintune(*arguments: str) -> str:
    """Run a command; its table, with progress and remarks left to standard error."""
    command = [sys.executable, "-m", "fintune.cli.main", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout


def figures(run: Path, step: str) -> dict[str, Any]:
    """Official figures and what predicting took."""
    score = json.loads((run / "score" / step / "score.json").read_text(encoding="utf-8"))
    facts = json.loads((run / "predict" / step / "manifest.json").read_text(encoding="utf-8"))["facts"]
    scored = (
        "num_predictions",
        "execution_accuracy",
        "execution_accuracy_interval",
        "program_accuracy",
        "invalid_rate",
    )
    made = ("num_tokens", "num_unparsable", "length_share", "predict_seconds")
    return {name: score[name] for name in scored} | {name: facts[name] for name in made}


def difference(free: Path, constrained: Path) -> dict[str, Any]:
    """What the constraint changes in execution accuracy, on the same questions."""
    from fintune.evaluation.scoring import read_verdicts
    from fintune.evaluation.statistics import compare_paired

    sides = ({id_: each.exe_correct for id_, each in read_verdicts(path).items()} for path in (free, constrained))
    found = compare_paired(*sides)
    return {
        "num_common": found.num_common,
        "num_gained": found.num_gained,
        "num_lost": found.num_lost,
        "difference": found.difference,
        "interval": found.interval,
    }


def surroundings() -> dict[str, Any]:
    """What the figures hold for."""
    from fintune.util.system import checkout_commit, installed_versions, machine_facts

    return {"machine": machine_facts(), "versions": installed_versions(), "commit": checkout_commit()}


if __name__ == "__main__":
    main()
