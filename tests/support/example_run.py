"""A run folder as the stages write it, made of generated records and predictions, for the tests of the page."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

from fintune.config import Config
from fintune.data.report import Evidence, PrepareReport, SplitReport, summarize_lengths
from fintune.evaluation.metrics import compute_scores
from fintune.evaluation.scoring import ScoreResult
from fintune.finqa.distribution import FINQA_TEST
from fintune.finqa.program import tokenize
from fintune.manifest import Key, Manifest
from fintune.records import FinQARecord, Prediction

KINDS = ("base", "adapter", "merged", "F16", "Q4_K_M")
RIGHT = {"base": 0.01, "adapter": 0.62, "merged": 0.62, "F16": 0.62, "Q4_K_M": 0.58}
NASTY = "</script><img src=x onerror=alert(1)><!-- & \u2028"


def records(number: int = 12) -> list[FinQARecord]:
    """Small pages, one of them without gold_inds."""
    made = []
    for k in range(number):
        old, new = 100 + 7 * k, 130 + 11 * k
        made.append(
            FinQARecord.model_validate(
                {
                    "id": f"ACME{k}/2010/page_1.pdf-1",
                    "pre_text": [f"acme {k} makes anvils .", "."],
                    "post_text": [f"dividends were $ {k + 3} million ."],
                    "table": [
                        ["in millions", "2010", "2009"],
                        ["revenue", f"$ {new}", f"{old}"],
                        ["costs", "-32 ( 32 )", "1"],
                    ],
                    "qa": {
                        "question": f"what was the growth of revenue in case {k}?",
                        "program": f"subtract({new}, {old}), divide(#0, {old})",
                        "exe_ans": round((new - old) / old, 5),
                        "gold_inds": None if k == 1 else {"table_1": "revenue ..."},
                        "answer": "12 %",
                    },
                }
            )
        )
    return made


def predictions(items: Sequence[FinQARecord], kind: str, seed: int = 3) -> list[Prediction]:
    """What a model of that kind could have said: the copies differ from the adapter at near-ties, Q4_K_M more often."""
    made = []
    for item in items:
        shared, own = random.Random(f"{seed}{item.id}"), random.Random(f"{seed}{item.id}{kind}")
        program = item.qa.program
        draw = shared.random()
        tie = draw > 0.98
        if kind == "base":
            text = "The answer is 12 %. " + NASTY if own.random() < 0.5 else "add(1, 2)"
            program = text
        elif draw > RIGHT["adapter"] or (kind == "Q4_K_M" and own.random() < 0.1):
            fate = shared.random()
            if fate < 0.6:
                program = (
                    program.replace("subtract", "add", 1) if "subtract" in program else f"{program}, add(#0, const_1)"
                )
            elif fate < 0.8:
                program = program.replace("(", "( ", 1).replace("1", "x", 1)
            else:
                program = f"{program}, multiply(#0, const_100)"
            if tie and kind in {"merged", "F16"}:
                program = program.replace("add", "subtract", 1)
        pieces = [*program.replace("(", "( ").split(" "), "<end>"]
        ids = tuple(5 + int(hashlib.sha256(piece.encode()).hexdigest()[:3], 16) for piece in pieces)
        made.append(
            Prediction(
                id=item.id,
                text=program,
                program=program,
                finish_reason="length" if kind == "base" and own.random() < 0.3 else "stop",
                seconds=0.31,
                num_prompt_tokens=900,
                token_ids=ids,
                margins=tuple(0.03 if tie else round(2 + 3 * own.random(), 4) for _ in ids),
            )
        )
    return made


def write_run(
    folder: Path, config: Config, items: Sequence[FinQARecord], kinds: Sequence[str] = KINDS
) -> dict[str, Path]:
    """Write all stages; gives the folders by step name."""
    inputs: dict[str, Path] = {}

    def stage(step: str) -> Path:
        inputs[step] = folder / step
        inputs[step].mkdir(parents=True)
        return inputs[step]

    prepare = stage("prepare")
    (prepare / "gold.json").write_text(json.dumps([item.model_dump(mode="json") for item in items]))
    (prepare / "eval.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": item.id,
                    "messages": [{"role": "user", "content": "?"}],
                    "completion": item.qa.program,
                    "num_cut": k % 3,
                }
            )
            + "\n"
            for k, item in enumerate(items)
        )
    )
    (prepare / "report.json").write_text(prepare_report().model_dump_json())
    train = stage("train")
    (train / "adapter").mkdir()
    (train / "adapter" / "adapter_model.safetensors").write_bytes(bytes(19_500))
    (train / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    merge, export = stage("merge"), stage("export")
    (merge / "model.safetensors").write_bytes(bytes(269_000))
    (merge / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {f"\u0120t{i}": i for i in range(5, 4200)}}}))
    for name, size in (("F16", 270_000), ("Q4_K_M", 105_000)):
        (export / f"demo-{name}.gguf").write_bytes(bytes(size))
    for kind in kinds:
        made = predictions(items, kind)
        (stage(f"predict/{kind}") / "predictions.jsonl").write_text(
            "".join(prediction.model_dump_json() + "\n" for prediction in made)
        )
        write_score(stage(f"score/{kind}"), items, made)
    for step, path in inputs.items():
        (path / "manifest.json").write_text(manifest(step).model_dump_json())
    return inputs


def write_score(folder: Path, items: Sequence[FinQARecord], made: Sequence[Prediction]) -> None:
    """score.json and score.csv."""
    figures, verdicts = compute_scores(items, [(each.id, tokenize(each.program)) for each in made])
    result = ScoreResult(figures, verdicts)
    (folder / "score.json").write_text(result.to_json())
    (folder / "score.csv").write_text(result.to_csv())


def metrics(steps: int = 120) -> list[dict[str, float]]:
    """Lines of metrics.jsonl with a falling loss and two evaluations."""
    noise = random.Random(1)
    lines: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        loss = 2.6 * math.exp(-step / 18) + 0.12 + 0.08 * noise.random()
        rate = 2e-4 * 0.5 * (1 + math.cos(math.pi * step / steps))
        lines.append(
            {
                "step": step,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": 1.0,
                "tokens": 9100 * step,
                "seconds": 4.1 * step,
            }
        )
        if step % 30 == 0:
            lines.append({"step": step, "eval_loss": loss * 1.1 + 0.03})
    return lines


def manifest(step: str) -> Manifest:
    """A manifest with round figures."""
    key = Key(step=step, options={}, sources={}, inputs={})
    return Manifest(
        key=key,
        fingerprint=key.fingerprint,
        outputs={},
        facts={},
        versions={"python": "3.12.1", "torch": "2.13.0", "transformers": "5.23.0"},
        commit="7530404abcde+",
        machine={"system": "Linux x86_64", "processor": "Test CPU", "cores": "2", "memory_gib": "8"},
        seed=17,
        finished="2026-01-02T03:04:05+00:00",
        seconds=61.5,
        peak_memory_bytes=1_830_000_000,
    )


def split_report(number: int) -> SplitReport:
    """A split of so many examples, two of them dropped."""
    return SplitReport(
        num_read=number + 2,
        num_sampled=number + 2,
        num_examples=number,
        dropped={"program does not run": 2},
        problems=("train.json, row 3, id X: <b>program</b> does not run",),
        num_cut_examples=number // 4,
        num_cut_units=number,
        num_units=31 * number,
        prompt_tokens=summarize_lengths([700 + 13 * (k * k % 101) for k in range(number)]),
        completion_tokens=summarize_lengths([18 + k % 23 for k in range(number)]),
        num_rows=number,
        num_row_tokens=730 * number,
        evidence=Evidence(num_examples=number, num_complete=number - 1, num_units=2 * number, num_kept=2 * number - 1),
        steps={"1": 0.5, "2": 0.4, "3": 0.08, "4+": 0.02},
        operations={"divide": 0.5, "subtract": 0.3, "add": 0.15, "table_average": 0.05},
    )


def prepare_report() -> PrepareReport:
    """What prepare reports."""
    return PrepareReport(
        template_hash="ab" * 32,
        max_length=2048,
        num_shared_pages=0,
        train=split_report(800),
        eval=split_report(160),
        finqa_test_steps=dict(FINQA_TEST.steps),
        finqa_test_operations=dict(FINQA_TEST.operations),
        options={},
    )
