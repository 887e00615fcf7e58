"""What a grammar and several candidates do to accuracy and time, on the models of one finished run.

    python bench/decoding.py --run runs/demo --num 20 --threads 1 --out bench/results/decoding.json

Each way of decoding answers the same first evaluation questions of the run, with the merged folder (transformers), the
Q4_K_M file (llama.cpp) and the untrained base model. Processor seconds of the whole process stand beside the wall time,
since they suffer less from a busy machine (of one thread: several wait for each other); a way's time is compared with
that of free greedy decoding with the same model. All ways are measured in turn, --rounds times and every other time in
the opposite order, each with an engine of its own; the smallest time counts, and for the ratio the median of those of
the rounds. What --out holds of other models stays, so that they can be measured one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

FREE = "greedy, free"
WAYS: dict[str, dict[str, Any]] = {
    FREE: {},
    "greedy, general grammar": {"constrain": "general"},
    "greedy, the page's grammar": {"constrain": "page"},
    "execution-guided, 4, the page's grammar": {
        "strategy": "execution_guided",
        "num_candidates": 4,
        "constrain": "page",
    },
    "vote of 5, the page's grammar": {"strategy": "vote", "num_candidates": 5, "constrain": "page"},
}
MODELS = ("merged", "Q4_K_M", "base")
SEVERAL = "merged"
"""The model with which ways of several candidates are measured; they take long."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--num", type=int, default=20, help="evaluation questions")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3, help="times that every way is measured")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of transformers; cuda in bfloat16")
    parser.add_argument("--batch-size", type=int, default=16, help="of transformers")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    old = json.loads(given.out.read_text(encoding="utf-8")) if given.out and given.out.exists() else {}
    if old and old["num_questions"] != given.num:
        raise SystemExit(f"{given.out} holds figures of {old['num_questions']} questions; remove it, or ask as many")
    models = {kind: model(given, kind) for kind in given.models}
    result = {
        "what": "accuracy and time by way of decoding, the same questions for all",
        "num_questions": given.num,
        "models": old.get("models", {}) | models,
        **surroundings(),
    }
    text = json.dumps(result, indent=2) + "\n"
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    print(text, end="")


def model(given: argparse.Namespace, kind: str) -> dict[str, Any]:
    """All ways with one model."""
    measure(given, kind, FREE, num=2)  # loads libraries and files
    names = [FREE, *(w for w in given.ways if w != FREE and (kind == SEVERAL or "num_candidates" not in WAYS[w]))]
    rounds = []
    for number in range(given.rounds):
        order = reversed(names) if number % 2 else names
        rounds.append({name: measure(given, kind, name, num=given.num) for name in order})
        print(kind, {name: way["processor_seconds"] for name, way in rounds[-1].items()}, file=sys.stderr)
    found = {name: dict(rounds[0][name]) for name in names}
    for name, way in found.items():
        for unit in ("seconds", "processor_seconds"):
            ratios = [each[name][unit] / each[FREE][unit] for each in rounds]
            way[unit] = min(each[name][unit] for each in rounds)
            way[f"{unit}_ratio"] = round(statistics.median(ratios), 3)
            way[f"{unit}_ratio_of_rounds"] = [round(each, 3) for each in ratios]
    where = {} if given.device == "cpu" or kind == "Q4_K_M" else {"device": given.device}
    return found | where | {"threads": given.threads}


def measure(given: argparse.Namespace, kind: str, name: str, *, num: int) -> dict[str, Any]:
    """One way with one model."""
    from fintune.config import PredictOptions
    from fintune.evaluation.metrics import compute_scores
    from fintune.finqa.parse import ParseError, parse
    from fintune.finqa.program import tokenize
    from fintune.inference.decoding_strategies import choose_prediction, decoding_from_options, make_grammars
    from fintune.inference.protocol import sorted_by_prompt
    from fintune.models import chat_template as chat
    from fintune.records import Example, FinQARecord

    run = given.run
    lines = (run / "prepare/eval.jsonl").read_text(encoding="utf-8").splitlines()[:num]
    examples = [Example.model_validate_json(line) for line in lines]
    gold = {row["id"]: row for row in json.loads((run / "prepare/gold.json").read_text(encoding="utf-8"))}
    records = [FinQARecord.model_validate(gold[each.id]) for each in examples]
    options = PredictOptions(max_new_tokens=64, **WAYS[name])
    engine, tokenizer = opened(given, kind)
    prompts = [chat.render(tokenizer, each.messages) for each in examples]
    start, started = time.perf_counter(), time.process_time()
    allowed = make_grammars(options, records)
    completions = sorted_by_prompt(engine.generate(prompts, decoding_from_options(options, allowed)))
    seconds, processor = time.perf_counter() - start, time.process_time() - started
    engine.close()
    k = options.num_candidates
    predictions = [
        choose_prediction(
            record.id, completions[n * k : n * k + k], options, record.table, allowed[n] if allowed else None
        )
        for n, record in enumerate(records)
    ]
    unparsable = 0
    for each in predictions:
        try:
            parse(each.program)
        except ParseError:
            unparsable += 1
    verdicts = compute_scores(records, [(each.id, tokenize(each.program)) for each in predictions])[1]
    ranked = sorted(zip(predictions, verdicts, strict=True), key=lambda pair: -(pair[0].confidence or 0))
    half = [verdict.exe_correct for _, verdict in ranked[: num // 2]]
    return {
        "execution_accuracy": round(sum(each.exe_correct for each in verdicts) / num, 4),
        "execution_accuracy_of_the_more_confident_half": round(sum(half) / len(half), 4),
        "num_invalid": sum(each.invalid for each in verdicts),
        "num_unparsable": unparsable,
        "num_cut_off": sum(each.finish_reason == "length" for each in completions),
        "num_tokens": sum(len(each.token_ids) for each in completions),
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
    }


def opened(given: argparse.Namespace, kind: str) -> tuple[Any, Any]:
    """The engine of one kind of model, and the tokenizer."""
    import torch

    from fintune.inference.llama_cpp import LlamaCppEngine
    from fintune.inference.transformers_engine import TransformersEngine
    from fintune.models import load as models

    run, threads = given.run, given.threads
    torch.set_num_threads(threads)
    ref = models.fetch("builtin:smollm2-135m" if kind == "base" else str(run / "merge"))
    tokenizer = models.load_tokenizer(ref)
    if kind == "Q4_K_M":
        file = next((run / "export").glob("*-Q4_K_M.gguf"))
        return LlamaCppEngine(file, context_tokens=2048 + 64, threads=threads), tokenizer
    dtype = "float32" if given.device == "cpu" else "bfloat16"
    model = models.load_model(ref, dtype=dtype, device=given.device).eval()
    return TransformersEngine(model, tokenizer, given.batch_size), tokenizer


def surroundings() -> dict[str, Any]:
    """What the figures hold for."""
    from importlib.metadata import version
    from importlib.util import find_spec

    from fintune.util.system import checkout_commit, machine_facts

    return {
        "machine": machine_facts(),
        "python": sys.version.split()[0],
        "versions": {
            name: version(name) for name in ("torch", "transformers", "llguidance", "xllamacpp") if find_spec(name)
        },
        "commit": checkout_commit(),
    }


if __name__ == "__main__":
    main()
