"""Damaged inputs of every kind through every verb, and what became of each.

    PYTHONPATH=src:tests python tests/attack/attack.py --num 1500 [--seed 1] [--only export/] [--json result.json]

Valid files are made once. Each attack copies them, damages one file or one value of it, and runs one command in a
process of its own, with limits of time and memory. A command may succeed, or end with status 2 and one line that begins
with ``fintune:``. All else is a finding: a traceback, further lines, words of libraries, a signal, or no end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU_SECONDS, WALL_SECONDS, MEMORY_BYTES = 60, 180, 9 << 30
GOOD = ("accepted", "one line")
_UNCLEAR = re.compile(r"\[Errno|validation error|codec can't|object has no|Traceback|<class '")
_ESCAPES = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")

VALUES: dict[str, Any] = {
    "null": None,
    "text": "x",
    "empty": "",
    "five": 5,
    "negative": -1,
    "zero": 0,
    "huge": 10**30,
    "float": 1e300,
    "half": 0.5,
    "true": True,
    "list": [],
    "list-of-lists": [[1], {"a": None}],
    "dict": {},
    "deep": json.loads("[" * 900 + "]" * 900),
    "escape": "\x1b[2J\u202egnp.exe",
}
"""Values in place of one that belongs into a field."""

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n \n",
    "null": b"null",
    "number": b"5",
    "list": b"[1, null, [], {}]",
    "object": b"{}",
    "deep-list": b"[" * 100_000,
    "deep-object": b'{"a":' * 100_000,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "nan": b'{"a": NaN, "b": 1e999}',
    "binary": bytes(range(256)) * 4,
    "surrogate": b'{"a": "\\ud800"}',
    "bom": b"\xef\xbb\xbf{}",
    "utf16": '{"a": 1}'.encode("utf-16"),
    "long-line": b"x" * 2_000_000,
}
"""Contents in place of a whole file."""


@dataclass(frozen=True)
class Attack:
    """A command and what is done to its files before."""

    name: str
    words: tuple[str, ...]
    damage: Callable[[Path], None]


@dataclass(frozen=True)
class Outcome:
    """What a command left: its verdict, the last line that it printed, and its processor seconds."""

    verdict: str
    line: str
    seconds: float


def make_files(folder: Path) -> None:
    """Make the valid files that are damaged: a model, an adapter, data, pages and predictions."""
    from support.example_run import predictions, records
    from support.synthetic import lora_of
    from support.tiny import make_tiny_model, patch_json

    make_tiny_model(folder / "m")
    patch_json(lora_of(folder / "m", folder / "a") / "adapter_config.json", target_modules=["q_proj"], bias="none")
    items = records(6)
    rows = [item.model_dump(mode="json") for item in items]
    for number, row in enumerate(rows):
        row["id"] = f"C{number}/2010/page_1.pdf-1"
    (folder / "gold.json").write_text(json.dumps(rows))
    answers = [
        {"id": row["id"], "program": answer.program}
        for row, answer in zip(rows, predictions(items, "adapter"), strict=True)
    ]
    (folder / "p.json").write_text(json.dumps(answers))
    turns = [{"role": "user", "content": "What is a bond?"}, {"role": "assistant", "content": "A loan."}]
    chat = [{"messages": [{**turn, "content": f"{turn['content']} {n}"} for turn in turns]} for n in range(20)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    (folder / "d.csv").write_text("question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(20)))
    (folder / "page.html").write_text("<h1>Revenue</h1><table><tr><th>x<th>2018<tr><td>net<td>1,000</table>")
    (folder / "page.md").write_text("# Revenue\n\n| x | 2018 |\n|---|---|\n| net | 1,000 |\n")
    (folder / "page.csv").write_text("x,2018\nnet,1000\n")
    config = {"model": {"name": "m"}, "data": {"source": "chat", "sources": ["d.jsonl"]}, "run": {"dir": "runs"}}
    (folder / "c.yaml").write_text(json.dumps(config))
    finqa = {"model": {"name": "m"}, "data": {"source": "finqa", "train": "gold.json", "eval": "gold.json"}}
    (folder / "q.yaml").write_text(json.dumps({**finqa, "prompt": {"max_length": 2000}}))


COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "export": ("export --model m --out o export.types=[F16]", ("m/*.json", "m/*.jinja", "m/model.safetensors")),
    "export-adapter": ("export --model m --adapter a --out o export.types=[F16]", ("a/*",)),
    "merge": ("merge --model m --adapter a --out o", ("a/*", "m/config.json", "m/tokenizer_config.json")),
    "inspect-chat": ("inspect c.yaml", ("c.yaml", "d.jsonl", "m/*.json", "m/*.jinja")),
    "inspect-csv": ("inspect c.yaml data.sources=d.csv", ("d.csv",)),
    "inspect-finqa": ("inspect q.yaml", ("q.yaml", "gold.json", "m/tokenizer_config.json")),
    "predict": ("predict --model m --data gold.json --out o.json predict.max_new_tokens=2", ("m/*", "gold.json")),
    "predict-adapter": (
        "predict --model m --adapter a --data gold.json --out o.json predict.max_new_tokens=2",
        ("a/*",),
    ),
    "score": ("score --predictions p.json --gold gold.json --json o.json --html o.html", ("p.json", "gold.json")),
    "audit": ("audit gold.json", ("gold.json",)),
    "page-html": ("page page.html", ("page.html",)),
    "page-md": ("page page.md", ("page.md",)),
    "page-csv": ("page page.csv", ("page.csv",)),
    "config": ("config show c.yaml", ("c.yaml",)),
    "plan": ("plan c.yaml --gib 24 adapter.kind=lora", ("m/config.json", "c.yaml")),
}
"""Command of each kind, and the files of it that are damaged."""


def attacks(files: Path) -> Iterator[Attack]:
    """Yield all attacks: each file whole, cut and flipped, and each value of what is JSON."""
    for kind, (command, patterns) in COMMANDS.items():
        words = tuple(command.split())
        yield Attack(f"{kind}/untouched", words, lambda folder: None)
        for path in sorted({path for pattern in patterns for path in files.glob(pattern) if path.is_file()}):
            name = path.relative_to(files).as_posix()
            for how, damage in _damages(path, name):
                yield Attack(f"{kind}/{name}/{how}", words, damage)
    for how, value in VALUES.items():
        for key in (
            "train.learning_rate",
            "data.sources",
            "run.name",
            "adapter.r",
            "prompt.max_length",
            "export.types",
        ):
            text = value if isinstance(value, str) else json.dumps(value)
            yield Attack(f"override/{key}/{how}", ("config", "show", "c.yaml", f"{key}={text}"), lambda folder: None)


def _damages(path: Path, name: str) -> Iterator[tuple[str, Callable[[Path], None]]]:
    content = path.read_bytes()
    for how, new in CONTENTS.items():
        yield how, lambda folder, new=new: _put(folder / name, new)
    yield "folder", lambda folder: ((folder / name).unlink(), (folder / name).mkdir())
    yield "gone", lambda folder: (folder / name).unlink()
    for part in (0.1, 0.5, 0.99):
        yield f"cut-{part}", lambda folder, part=part: _put(folder / name, content[: int(len(content) * part)])
    for seed in range(6):
        yield f"flip-{seed}", lambda folder, seed=seed: _put(folder / name, _flip(content, seed))
    if name.endswith(_WEIGHTS):
        size = int.from_bytes(content[:8], "little")
        header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
        tensors = [key for key in header if key != "__metadata__"][:2]
        for keys, how, new in _changed_values({key: header[key] for key in tensors}, max_depth=2):
            text = json.dumps(_with_value(header, keys, new)).encode()
            whole = len(text).to_bytes(8, "little") + text + rest
            yield f"{'.'.join(map(str, keys))}={how}", lambda folder, whole=whole: _put(folder / name, whole)
        return
    try:
        lines = name.endswith(".jsonl")
        tree = json.loads(content.split(b"\n")[0]) if lines else json.loads(content)
    except ValueError:
        return
    for keys, how, new in _changed_values(tree, max_depth=6 if len(content) < 20_000 else 2):
        text = json.dumps(_with_value(tree, keys, new)).encode()
        whole = text + b"\n" + content.partition(b"\n")[2] if lines else text
        yield f"{'.'.join(map(str, keys))}={how}", lambda folder, whole=whole: _put(folder / name, whole)


def _changed_values(
    tree: Any, max_depth: int, keys: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    # Of a list the first entry only: the others are alike.
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for key, value in list(entries)[:40]:
        for how, new in VALUES.items():
            yield (*keys, key), how, new
        if len(keys) + 1 < max_depth:
            yield from _changed_values(value, max_depth, (*keys, key))


def _with_value(tree: Any, keys: tuple[Any, ...], value: Any) -> Any:
    if not keys:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[keys[0]] = _with_value(copy[keys[0]], keys[1:], value)
    return copy


def _put(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _flip(content: bytes, seed: int) -> bytes:
    rng, flipped = random.Random(seed), bytearray(content)
    for _ in range(5):
        flipped[rng.randrange(min(len(flipped), 4000))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def run(attack: Attack, files: Path) -> Outcome:
    """Run an attack on a copy of the files, in a fork of this process."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name) / "w"
        shutil.copytree(files, folder)
        attack.damage(folder)
        err = Path(name) / "err"
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _become(attack, folder, err)
        deadline, state = time.monotonic() + WALL_SECONDS, 0
        while True:
            ended, state, usage = os.wait4(child, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                _, state, usage = os.wait4(child, 0)
                return Outcome("no end", "", usage.ru_utime)
            time.sleep(0.01)
        return judge(state, err.read_text(encoding="utf-8", errors="replace"), usage.ru_utime + usage.ru_stime)


def _become(attack: Attack, folder: Path, err: Path) -> None:
    """Run the command in this process, which does not return."""
    os.chdir(folder)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(folder.parent / "out", os.O_WRONLY | os.O_CREAT), 1)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.argv = ["fintune", *attack.words]
    status = 1
    try:
        from fintune.cli.main import main

        main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def judge(state: int, err: str, seconds: float) -> Outcome:
    """Judge an exit state and what was printed to standard error."""
    lines = [line for line in err.split("\n") if line.strip()]
    last = lines[-1] if lines else ""
    if os.WIFSIGNALED(state):
        verdict = "no end" if os.WTERMSIG(state) in (signal.SIGXCPU, signal.SIGKILL) else "signal"
    elif "Traceback (most recent call last)" in err:
        verdict = "traceback"
    elif os.WEXITSTATUS(state) == 0:
        verdict = "accepted"
    elif os.WEXITSTATUS(state) != 2 or not last.startswith("fintune:"):
        verdict = "other status"
    elif _ESCAPES.search(err):
        verdict = "escapes"
    elif len(last) > 500:
        verdict = "long"
    elif _UNCLEAR.search(last):
        verdict = "unclear"
    else:
        progress = [line for line in lines[:-1] if not line.startswith(("fintune:", "  ", "runs/"))]
        verdict = "more lines" if progress else "one line"
    return Outcome(verdict, last, seconds)


def prepare_process() -> None:
    """Import what the commands need, so that a fork starts at once."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fintune.cli.stages  # noqa: F401

    torch.set_num_threads(1)


def main() -> None:
    """Run a sample of the attacks, and print a table and every finding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=1500, help="number of attacks, drawn evenly from all commands")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="part of the names of the attacks to run")
    parser.add_argument("--json", type=Path, help="file for all outcomes")
    given = parser.parse_args()
    prepare_process()
    with tempfile.TemporaryDirectory() as name:
        files = Path(name) / "files"
        files.mkdir()
        make_files(files)
        chosen = [attack for attack in attacks(files) if given.only in attack.name]
        print(f"{len(chosen)} attacks, {min(given.num, len(chosen))} of them run")
        table, outcomes = Counter[tuple[str, str]](), []
        for attack in sample(chosen, given.num, given.seed):
            outcome = run(attack, files)
            table[attack.name.partition("/")[0], outcome.verdict] += 1
            outcomes.append({"name": attack.name, **vars(outcome)})
            if outcome.verdict not in GOOD:
                print(f"{outcome.verdict:12} {attack.name}  {outcome.line[:200]}", flush=True)
    verdicts = sorted({verdict for _, verdict in table}, key=lambda verdict: (verdict not in GOOD, verdict))
    print(f"\n{'command':16}" + "".join(f"{verdict:>14}" for verdict in verdicts))
    for kind in dict.fromkeys(kind for kind, _ in table):
        print(f"{kind:16}" + "".join(f"{table[kind, verdict]:14}" for verdict in verdicts))
    if given.json:
        given.json.write_text(json.dumps(outcomes, indent=1))


def sample(chosen: list[Attack], number: int, seed: int) -> list[Attack]:
    """Draw attacks, as many of each command as possible."""
    rng, kinds = random.Random(seed), {}
    for attack in chosen:
        kinds.setdefault(attack.name.partition("/")[0], []).append(attack)
    for group in kinds.values():
        rng.shuffle(group)
    drawn = []
    while len(drawn) < number and any(kinds.values()):
        drawn += [group.pop() for group in kinds.values() if group]
    return drawn[:number]


if __name__ == "__main__":
    main()
