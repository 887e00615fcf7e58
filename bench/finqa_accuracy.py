"""Measure the FinQA accuracy of the built-in model: a recipe is a row, and one command reproduces it.

::

    python bench/finqa_accuracy.py --list
    python bench/finqa_accuracy.py full+pages --data finqa --dir runs --out bench/results/finqa_full+pages.json
    python bench/finqa_accuracy.py lora --data finqa --dir tiny --limit 12 train.max_steps=2    # a trial, on a CPU

The data folder holds train.json.gz and dev.json.gz in FinQA's format. Rows with dialogues also need
convfinqa_turns.json.gz, train_pages.json.gz and tatqa_train.json.gz. The program writes the row's records to one FinQA
file and trains on it with configs/finqa.yaml and the row's overrides. It answers the dev questions greedily, without a
grammar, each with its page, and scores them by the official rules.

Nothing of dev is trained on. A record that is added to FinQA's own training rows is left out if its page's id, its
page's text or its table is also in dev, or if its question has the words of a dev question. A row of FinQA's own is
left out if the id or the text of its page is in dev. The result counts what was left out.

Rows of one mixture share what `prepare` wrote. `--prepare-only` writes nothing else, for a machine whose GPU should not
wait. An interrupted command resumes. A row that averages other rows' weights needs those rows' runs in the same folder.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

SEED = 17
"""Seed of the generated pages and the split. A row's own run.seed changes only the order and the adapter."""
COMPANIES = 2000
FULL = (
    "adapter.kind=full",
    "train.learning_rate=2e-4",
    "train.gradient_checkpointing=false",
    "train.num_train_epochs=3",
)
"""Overrides for training all weights; a row's later overrides win."""
LORA = ("train.num_train_epochs=3",)
COMMON = ("predict.models=[adapter]", "predict.batch_size=256", "train.save_steps=100000")
"""Overrides that do not change what is learned. Without them, checkpoints of all weights would slow the training."""

DERIVED = "evidence derived, not annotated"

MIXTURES: dict[str, tuple[str, ...]] = {
    "finqa": ("finqa",),
    "pages": ("finqa", "statements"),
    "dialogues": ("finqa", "statements", "turns", "tatqa"),
    "evidence": ("finqa", "evidence"),
    "evidence+pages": ("finqa", "statements", "evidence"),
}
"""The sources of each mixture. `evidence` cuts every page, also in dev, to what the answer needs."""

ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lora": ("finqa", ()),
    "lora+pages": ("pages", LORA),
    "lora+pages, seed 18": ("pages", (*LORA, "run.seed=18")),
    "full+pages": ("pages", FULL),
    "full+pages, seed 18": ("pages", (*FULL, "run.seed=18")),
    "lora+pages+dialogues": ("dialogues", LORA),
    "full+pages+dialogues": ("dialogues", FULL),
    "lora, evidence": ("evidence", ("train.per_device_train_batch_size=16",)),
    "full+pages, evidence": ("evidence+pages", (*FULL, "train.per_device_train_batch_size=16")),
}
"""Name -> (mixture, overrides of configs/finqa.yaml).

A cut page usually has one question. A step of 16 cut pages then has about as many questions as one of 8 whole pages.
"""

MEANS: dict[str, tuple[str, ...]] = {
    "full+pages, mean of 2": ("full+pages", "full+pages, seed 18"),
    "full, mean of 3": ("full+pages", "full+pages, seed 18", "full+pages+dialogues"),
}
"""Rows whose weights are the mean of other rows' weights (arXiv 2203.05482); nothing is trained."""
ASKED: dict[str, tuple[str, str]] = {"full+pages, asked with evidence": ("full+pages", "evidence")}
"""Rows that ask another row's model the dev questions of another mixture; nothing is trained."""


def main() -> None:
    """Measure one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", help="name of a row")
    parser.add_argument("--list", action="store_true", help="print the rows and exit")
    parser.add_argument("--data", type=Path, help="folder of the FinQA files")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--limit", type=int, help="records of each source, for a trial")
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args()
    if args.list:
        for name, (mixture, overrides) in ROWS.items():
            print(f"{name:35} {mixture:15} {' '.join(overrides)}")
        for name, members in MEANS.items():
            print(f"{name:35} mean of: {'; '.join(members)}")
        for name, (row, mixture) in ASKED.items():
            print(f"{name:35} model of: {row}; dev of: {mixture}")
        return
    if args.row not in ROWS | MEANS | ASKED:
        parser.error(f"{args.row!r} is no row: see --list")
    if args.data is None:
        parser.error("--data is missing")
    args.data, args.dir = args.data.resolve(), args.dir.resolve()
    measure = _mean if args.row in MEANS else _asked if args.row in ASKED else _trained
    result = measure(args)
    text = json.dumps(result, indent=1) + "\n"
    if args.out is not None and not args.prepare_only:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    print(text, end="")


def _trained(args: argparse.Namespace) -> dict[str, Any]:
    """Prepare, train, predict and score a row."""
    mixture, overrides = ROWS[args.row]
    mixed = _prepared(args, mixture)
    if args.prepare_only:
        return mixed
    run = args.dir / _folder(args.row)
    if not (run / "prepare").is_dir():
        beside = run / ".prepare"
        shutil.rmtree(beside, ignore_errors=True)
        # Hard links suffice: nothing changes what prepare wrote.
        shutil.copytree(args.dir / f"prepare-{mixture}" / "prepare", beside, copy_function=os.link)
        beside.replace(run / "prepare")
    words = [*COMMON, *overrides, *args.overrides]
    stages = [word for stage in ("train", "predict/adapter") for word in ("--only", stage)]
    _fintune("run", "configs/finqa.yaml", *_data_overrides(args, mixture), f"run.name={run.name}", *words, *stages)
    train = json.loads((run / "train" / "manifest.json").read_text(encoding="utf-8"))
    facts = train["facts"]
    return {
        **_head(args),
        "recipe": {"config": "configs/finqa.yaml", "mixture": mixture, "overrides": words},
        "data": mixed,
        "trained_parameters": facts["num_trainable"],
        "steps": facts["num_steps"],
        "train_tokens": facts["num_tokens"],
        "train_minutes": round(facts["train_seconds"] / 60, 2),
        "tokens_per_second": facts["tokens_per_second"],
        "peak_gib": facts.get("peak_gib"),
        "loss_first": round(facts["mean_first_loss"], 4),
        "loss_last": round(facts["mean_last_loss"], 4),
        **_predicted(run / "predict" / "adapter" / "predictions.jsonl", args),
        "machine": train["machine"],
        "versions": train["versions"],
        "commit": train["commit"],
    }


def _mean(args: argparse.Namespace) -> dict[str, Any]:
    """Predict and score with the mean of other rows' weights."""
    from safetensors.torch import load_file, save_file

    members = MEANS[args.row]
    folders = [args.dir / _folder(name) / "train" / "model" for name in members]
    run = args.dir / _folder(args.row)
    model = run / "model"
    if not model.is_dir():
        beside = run / ".model"
        shutil.copytree(folders[0], beside, dirs_exist_ok=True)
        for path in sorted(beside.glob("*.safetensors")):
            parts = [load_file(folder / path.name) for folder in folders]
            mean = {name: sum(part[name].double() for part in parts) / len(parts) for name in parts[0]}
            weights = {name: weight.to(parts[0][name].dtype) for name, weight in mean.items()}
            save_file(weights, path, metadata={"format": "pt"})
        beside.replace(model)
    return _answered(args, {"mean_of": members}, model, args.data / "dev.json.gz")


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """Ask another row's model."""
    row, mixture = ASKED[args.row]
    questions = _mixed(args, mixture) / "dev.json"
    recipe = {"model_of": row, "dev_of": mixture}
    return _answered(args, recipe, args.dir / _folder(row) / "train" / "model", questions)


def _answered(args: argparse.Namespace, recipe: dict[str, Any], model: Path, questions: Path) -> dict[str, Any]:
    """Predict and score with a folder of weights."""
    from fintune.util.system import checkout_commit, installed_versions, machine_facts

    run = args.dir / _folder(args.row)
    run.mkdir(exist_ok=True)
    predictions = run / "predictions.json"
    options = [
        word for word in (*COMMON, *args.overrides) if word.startswith(("predict.batch", "data.max_eval_samples"))
    ]
    if not predictions.is_file():
        _fintune("predict", "configs/finqa.yaml", "--model", model, "--data", questions, "--out", predictions, *options)
    return {
        **_head(args),
        "recipe": recipe,
        **_predicted(predictions, args),
        "machine": machine_facts(),
        "versions": installed_versions(),
        "commit": checkout_commit(),
    }


def _head(args: argparse.Namespace) -> dict[str, Any]:
    limit = [] if args.limit is None else ["--limit", str(args.limit)]
    words = ["python", "bench/finqa_accuracy.py", args.row, "--data", "DATA", *limit, *args.overrides]
    return {"what": __doc__.splitlines()[0], "row": args.row, "command": shlex.join(words)}


def _predicted(predictions: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the official verdicts, against the unchanged dev file."""
    from fintune.evaluation.scoring import score_predictions

    done = score_predictions(predictions, args.data / "dev.json.gz").score
    return {
        "dev": {
            "n": done.num_predictions,
            "execution_accuracy": done.execution_accuracy,
            "execution_accuracy_interval": done.execution_accuracy_interval,
            "program_accuracy": done.program_accuracy,
            "program_accuracy_interval": done.program_accuracy_interval,
            "invalid_rate": done.invalid_rate,
        }
    }


def _prepared(args: argparse.Namespace, mixture: str) -> dict[str, Any]:
    """Write the mixture's files and prepare them, unless that is done. Return the counts."""
    from filelock import FileLock

    folder = _mixed(args, mixture)
    with FileLock(folder / "prepare.lock"):
        words = [word for word in args.overrides if word.startswith(("data.", "prompt."))]
        name = f"run.name=prepare-{mixture}"
        _fintune("run", "configs/finqa.yaml", *_data_overrides(args, mixture), name, *words, "--only", "prepare")
    manifest = json.loads((args.dir / f"prepare-{mixture}" / "prepare" / "manifest.json").read_text(encoding="utf-8"))
    facts = manifest["facts"]
    figures = ("num_train", "num_dropped", "num_cut", "num_train_rows", "num_train_tokens", "num_eval")
    mixed = json.loads((folder / "mixed.json").read_text(encoding="utf-8"))
    return mixed | {"prepared": {name: facts[name] for name in figures} | {"seconds": manifest["seconds"]}}


def _mixed(args: argparse.Namespace, mixture: str) -> Path:
    """Return the folder of a mixture's files; write them unless that is done."""
    from filelock import FileLock

    folder = args.dir / "mixtures" / mixture
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "mix.lock"):
        if not (folder / "mixed.json").is_file():
            _mix(args, MIXTURES[mixture], folder)
    return folder


def _data_overrides(args: argparse.Namespace, mixture: str) -> list[str]:
    folder = args.dir / "mixtures" / mixture
    return [f"data.train={folder / 'train.json'}", f"data.eval={folder / 'dev.json'}", f"run.dir={args.dir}"]


def _folder(row: str) -> str:
    return row.replace(", ", "-").replace(" ", "-")


def _fintune(*words: object) -> None:
    """Run a command of the package. All of its output goes to standard error."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "fintune.cli.main", *map(str, words)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr)


def _mix(args: argparse.Namespace, sources: Sequence[str], folder: Path) -> None:
    """Write train.json, dev.json and, last, mixed.json with the rows by source and the reasons of what was left out."""
    dev = _read(args.data / "dev.json.gz")[: args.limit]
    known = _Known(_read(args.data / "dev.json.gz"))
    finqa = _read(args.data / "train.json.gz")
    out: Counter[str] = Counter()
    alike: Counter[str] = Counter()
    rows: dict[str, int] = {}
    train: list[dict[str, Any]] = []
    for source in sources:
        if source == "evidence":
            continue
        records = {"finqa": iter(finqa), "statements": _statements(), "tatqa": _tatqa(args.data)}.get(source)
        kept = []
        for record in _turns(args.data, finqa, out) if records is None else records:
            reason = known.shared_part(record)
            if reason is None or (source == "finqa" and reason in ("table", "question")):
                alike[f"finqa: {reason} as in dev"] += reason is not None
                kept.append(record)
            else:
                out[f"{source}: {reason} as in dev"] += 1
            if len(kept) == args.limit:
                break
        rows[source] = len(kept)
        train += kept
    if "evidence" in sources:
        train = [cut for record in train if (cut := _evidence(record, out, "train")) is not None]
        dev = [_evidence(record, out, "dev") or record for record in dev]
    for name, records in (("train", train), ("dev", dev)):
        (folder / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    derived = {name: out.pop(name) for name in list(out) if name.endswith(DERIVED)}
    counts = {"rows": rows, "num_rows": len(train), "left_out": dict(out), "kept": dict(+alike) | derived}
    (folder / "mixed.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


def _read(path: Path) -> Any:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


class _Known:
    """The pages and questions of dev, to find records that share any of them."""

    def __init__(self, dev: Sequence[dict[str, Any]]) -> None:
        self._sets: dict[str, set[object]] = {}
        for record in dev:
            for name, value in self._parts(record):
                self._sets.setdefault(name, set()).add(value)

    def shared_part(self, record: dict[str, Any]) -> str | None:
        """Return the first part that dev has, too: page id, page text, table or question."""
        return next((name for name, value in self._parts(record) if value and value in self._sets[name]), None)

    @staticmethod
    def _parts(record: dict[str, Any]) -> Iterator[tuple[str, object]]:
        from fintune.evaluation.audit import question_words
        from fintune.finqa.page import group_of

        yield "page id", group_of(record["id"], "page")
        yield "page text", question_words(" ".join((*record["pre_text"], *record["post_text"])))
        yield "table", question_words(" ".join(cell for row in record["table"] for cell in row))
        yield "question", question_words(record["qa"]["question"])


def _statements() -> Iterator[dict[str, Any]]:
    """Yield four questions about one generated page of each company."""
    from fintune.data.synthetic import generate

    for record in generate(COMPANIES, pages_per_company=1, questions_per_page=4, seed=SEED, size="full"):
        yield record.model_dump(mode="json")


def _tatqa(folder: Path) -> Iterator[dict[str, Any]]:
    yield from _read(folder / "tatqa_train.json.gz")


def _turns(folder: Path, finqa: Sequence[dict[str, Any]], out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the turns of ConvFinQA's dialogues as FinQA records; the dialogue comes before the question.

    A turn is left out if its page is unknown, if its program is only a number (the program language has no such
    program), or if another turn or one of FinQA's own rows asks the same about the same page.
    """
    from fintune.evaluation.audit import question_words
    from fintune.finqa.page import group_of
    from fintune.finqa.parse import ParseError, parse

    pages = _read(folder / "train_pages.json.gz")
    asked_before = {(group_of(row["id"], "page"), question_words(row["qa"]["question"])) for row in finqa}
    for number, turn in enumerate(_read(folder / "convfinqa_turns.json.gz")):
        if turn["page"] not in pages:
            out["turns: page not known"] += 1
            continue
        try:
            parse(turn["program"])
        except ParseError:
            out["turns: program is a number alone"] += 1
            continue
        question = " ".join((*turn["dialogue"], turn["question"]))
        key = (turn["page"], question_words(question))
        if key in asked_before:
            out["turns: asked already"] += 1
            continue
        asked_before.add(key)
        asked = {"question": question, "program": turn["program"], "exe_ans": turn["exe_ans"]}
        page = {name: pages[turn["page"]][name] for name in ("pre_text", "post_text", "table")}
        yield {"id": f"{turn['page']}-T{number}", **page, "qa": asked}


def _evidence(raw: dict[str, Any], out: Counter[str], split: str) -> dict[str, Any] | None:
    """Cut a record's page to its evidence: `gold_inds`, else what the program's operands come from.

    The table's header stays if any row does. Return None without evidence, or if the gold program gives another result
    on the cut page.
    """
    from fintune.finqa.evidence import derive
    from fintune.finqa.execute import execute
    from fintune.finqa.program import tokenize

    before, after, table, qa = raw["pre_text"], raw["post_text"], raw["table"], raw["qa"]
    tokens = tokenize(qa["program"])
    keys = qa.get("gold_inds")
    if not keys:
        keys = derive(tokens, table, [*before, *after], qa["question"]).units
        out[f"{split}: {DERIVED}"] += 1
    rows = [row for k, row in enumerate(table) if k and f"table_{k}" in keys]
    cut = {
        **raw,
        "pre_text": [text for k, text in enumerate(before) if f"text_{k}" in keys],
        "post_text": [text for k, text in enumerate(after, len(before)) if f"text_{k}" in keys],
        "table": [table[0], *rows] if rows or "table_0" in keys else [],
        "qa": {**qa, "gold_inds": None},
    }
    whole, part = execute(tokens, table), execute(tokens, cut["table"])
    if not keys or (whole.invalid, whole.result) != (part.invalid, part.result):
        out[f"{split}: no evidence, {'left out' if split == 'train' else 'whole page'}"] += 1
        return None
    return cut


if __name__ == "__main__":
    main()
