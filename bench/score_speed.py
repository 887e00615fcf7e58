"""How long scoring takes: fintune against FinQA's official way, on one machine in one run.

    python bench/score_speed.py --finqa ../shared/finqa --out bench/results/score_speed.json [--script evaluate.py]

The official way is `bench/official_way.py`, written for this repository. With ``--script`` the functions of FinQA's own
script (github.com/czyssrs/FinQA, code/evaluate/evaluate.py), which is not part of it, are timed and compared as well.

Two sets of predictions on FinQA's 883 dev questions: every gold program as its own prediction, and the programs that
real models wrote (the rows of `evaluator_vectors_dev.jsonl.gz` of kind "model output"). Both ways start from records
and tokens in memory, each in a process of its own with nothing remembered, so that fintune's caches are cold; loading
sympy is inside the measured time of both where they load it. fintune also makes its other views, breakdowns and reasons
in that time. The verdicts of the two ways are compared, and the run fails where they differ. Processor seconds are
beside the wall time, since they hold on a busy machine, too; both ways use one core.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETS = {"gold as predictions": "gold", "model output": "model output"}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finqa", type=Path, required=True, help="folder of dev.json.gz and the evaluator vectors")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=5, help="runs of fintune, of which the median counts")
    parser.add_argument("--script", type=Path, help="FinQA's own evaluate.py, to be timed as well")
    parser.add_argument("--one", nargs=2, metavar=("SET", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        json.dump(measure(given.finqa, *given.one, given.script), sys.stdout)
        return
    result = compare(given.finqa, given.repeats, given.script)
    text = json.dumps(result, indent=2) + "\n"
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text, encoding="utf-8")
    print(text, end="")


def compare(finqa: Path, repeats: int, script: Path | None) -> dict[str, Any]:
    """All ways on both sets; the official ones run once, between the runs of fintune."""
    from importlib.metadata import version

    from fintune.util.system import checkout_commit, machine_facts

    load_before = os.getloadavg()[0]
    sets = {}
    for name in SETS:
        half = (repeats + 1) // 2
        ours = [child(finqa, name, "fintune") for _ in range(half)]
        official = child(finqa, name, "official")
        own = child(finqa, name, "script", script) if script else None
        ours += [child(finqa, name, "fintune") for _ in range(repeats - half)]
        if any(one["verdicts"] != official["verdicts"] for one in [*ours, *([own] if own else [])]):
            raise SystemExit(f"{name}: the verdicts of the two ways differ")
        seconds = sorted(one["seconds"] for one in ours)
        median, processor = middle(seconds), middle([one["processor_seconds"] for one in ours])
        sets[name] = {
            "num_predictions": len(official["verdicts"]),
            "num_execution_correct": sum(exe for exe, _, _ in official["verdicts"]),
            "num_program_correct": sum(program for _, program, _ in official["verdicts"]),
            "official_seconds": round(official["seconds"], 3),
            "official_processor_seconds": round(official["processor_seconds"], 3),
            "fintune_seconds": [round(one, 4) for one in seconds],
            "fintune_median_seconds": round(median, 4),
            "fintune_median_processor_seconds": round(processor, 4),
            "ratio": round(official["seconds"] / median, 1),
            "processor_ratio": round(official["processor_seconds"] / processor, 1),
            "verdicts_agree": True,
        }
        if own:
            sets[name] |= {
                "script_seconds": round(own["seconds"], 3),
                "script_processor_seconds": round(own["processor_seconds"], 3),
                "script_ratio": round(own["seconds"] / median, 1),
                "script_processor_ratio": round(own["processor_seconds"] / processor, 1),
            }
    return {
        "what": "scoring time of the official way (bench/official_way.py) over that of fintune, cold caches",
        "sets": sets,
        "load_average_before": round(load_before, 2),
        "machine": machine_facts(),
        "python": sys.version.split()[0],
        "sympy": version("sympy"),
        "commit": checkout_commit(),
    }


def middle(values: list[float]) -> float:
    """The median of an odd number of values."""
    return sorted(values)[len(values) // 2]


def child(finqa: Path, name: str, way: str, script: Path | None = None) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--finqa", str(finqa), "--one", name, way]
    command += ["--script", str(script)] if script else []
    done: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return done


def measure(finqa: Path, name: str, way: str, script: Path | None = None) -> dict[str, Any]:
    """Wall and processor seconds, and of each prediction: execution correct, program correct, invalid."""
    from fintune.records import FinQARecord

    with gzip.open(finqa / "dev.json.gz", "rt", encoding="utf-8") as file:
        records = [FinQARecord.model_validate(row) for row in json.load(file)]
    with gzip.open(finqa / "evaluator_vectors_dev.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row for line in file if (row := json.loads(line))["kind"] == SETS[name]]
    predictions = [(row["id"], row["tokens"]) for row in rows]
    if way == "fintune":
        from fintune.evaluation.metrics import compute_scores

        start, started = time.perf_counter(), time.process_time()
        verdicts = compute_scores(records, predictions)[1]
        seconds, processor = time.perf_counter() - start, time.process_time() - started
        judged = [(one.exe_correct, one.program_correct, one.invalid) for one in verdicts]
    else:
        by_id = {record.id: record for record in records}
        start, started = time.perf_counter(), time.process_time()
        tokenize, execute, equal = functions(script)
        judged = []
        for record_id, tokens in predictions:
            record = by_id[record_id]
            gold = tokenize(record.qa.program)
            # The script prints what it refuses.
            with contextlib.redirect_stdout(io.StringIO()):
                invalid, result = execute(tokens, record.table)
                correct = invalid == 0 and result == record.qa.exe_ans
                judged.append((correct, equal(gold, tokens), bool(invalid)))
        seconds, processor = time.perf_counter() - start, time.process_time() - started
    return {"seconds": seconds, "processor_seconds": processor, "verdicts": judged}


def functions(script: Path | None) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """How the official way, or a script, cuts a text, executes tokens and compares two programs."""
    if script is None:
        import official_way
        from fintune.finqa.program import tokenize

        return tokenize, official_way.execute, official_way.equal
    spec = importlib.util.spec_from_file_location("evaluate", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.program_tokenization, module.eval_program, module.equal_program


if __name__ == "__main__":
    main()
