"""How fast `fintune prepare` is: records a second, in one process and in several, with the same files from each.

    python bench/prepare_speed.py --out bench/results/prepare_speed_cpu.json [--records 34457] [--processes 0 2]

The records are generated pages in FinQA's form (`builtin:statements`, full size, four questions a page), written to a
JSON file before the clock starts. The stage is timed as a run calls it: it loads the tokenizer, reads both files,
tokenizes at 2,048 tokens with `data.group_questions: 4`, and writes the folder. Every measurement is a process of its
own. Processor seconds, worker processes included, are next to the wall time because they hold on a busy machine too.
The files of the folders are compared, and the program fails if they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

EVAL_RECORDS = 200
PAGES, QUESTIONS = 20, 4
"""Pages of a company, and questions of a page."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=34_457, help="training records; a short run takes 2000")
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 2], help="values of data.num_proc")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each, of which the fastest counts")
    parser.add_argument("--model", default="builtin:smollm2-135m", help="model whose tokenizer is used")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "PROCESSES"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        json.dump(measure(Path(given.one[0]), int(given.one[1]), given.model), sys.stdout)
        return
    text = json.dumps(compare(given.records, given.processes, given.repeats, given.model), indent=2) + "\n"
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text, encoding="utf-8")
    print(text, end="")


def compare(num_records: int, processes: list[int], repeats: int, model: str) -> dict[str, Any]:
    """Generate the records, and prepare them with each number of processes."""
    from importlib.metadata import version

    from fintune.util.system import checkout_commit, machine_facts

    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate_files(folder, num_records)
        found = {number: [child(folder, number, model) for _ in range(repeats)] for number in processes}
    runs = {str(number): min(several, key=lambda run: run["seconds"]) for number, several in found.items()}
    if len({run["sha256"] for several in found.values() for run in several}) > 1:
        raise SystemExit("the prepared folders differ")
    for run in runs.values():
        run["records_per_second"] = round((num_records + EVAL_RECORDS) / run["seconds"], 1)
        run["records_per_processor_second"] = round((num_records + EVAL_RECORDS) / run["processor_seconds"], 1)
    return {
        "what": "fintune prepare on generated records in FinQA's form, four questions a page, by data.num_proc",
        "num_records": num_records + EVAL_RECORDS,
        "runs": runs,
        "same_files": True,
        "model": model,
        "load_average_before": round(load_before, 2),
        "machine": machine_facts(),
        "python": sys.version.split()[0],
        "tokenizers": version("tokenizers"),
        "transformers": version("transformers"),
        "commit": checkout_commit(),
    }


def generate_files(folder: Path, num_records: int) -> None:
    """Write train.json and eval.json, with the pages of different companies."""
    from fintune.data.synthetic import generate

    num_companies = -(-(num_records + EVAL_RECORDS) // (PAGES * QUESTIONS)) + 1
    records = generate(num_companies, pages_per_company=PAGES, questions_per_page=QUESTIONS, seed=0, size="full")
    for name, number in (("eval", EVAL_RECORDS), ("train", num_records)):
        rows = [record.model_dump(mode="json") for record in islice(records, number)]
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")


def child(folder: Path, processes: int, model: str) -> dict[str, Any]:
    """Measure once, in a process of its own."""
    command = [sys.executable, __file__, "--model", model, "--one", str(folder), str(processes)]
    done: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return done


def measure(folder: Path, processes: int, model: str) -> dict[str, Any]:
    """Wall and processor seconds of the stage, peak memory, and a hash of the examples and tokens that it wrote."""
    from fintune.config.load import load
    from fintune.pipeline.stages.prepare import prepare
    from fintune.util.memory import peak_memory_bytes

    files = [f"data.{name}={folder / f'{name}.json'}" for name in ("train", "eval")]
    options = ["data.source=finqa", *files, "data.group_questions=4", f"data.num_proc={processes}"]
    config = load(None, [*options, f"model.name={model}", "prompt.max_length=2048"]).config
    with tempfile.TemporaryDirectory() as name:
        start, before = time.perf_counter(), processor_seconds()
        facts = prepare(config, {}, Path(name))
        seconds, used = time.perf_counter() - start, processor_seconds() - before
        digest = hashlib.sha256()
        for path in sorted(path for path in Path(name).rglob("*") if path.is_file()):
            digest.update(path.relative_to(name).as_posix().encode() + path.read_bytes())
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(used, 2),
        "peak_memory_gib": round(peak_memory_bytes() / 2**30, 2),
        "num_rows": facts["num_train_rows"],
        "num_tokens": facts["num_train_tokens"],
        "sha256": digest.hexdigest(),
    }


def processor_seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


if __name__ == "__main__":
    main()
