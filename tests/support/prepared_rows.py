"""Token rows and a prepared folder for the tests of training, merging and predicting."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.records import Example, Message

QUESTIONS = ("net revenue", "total assets", "cash", "interest expense")


def examples(number: int) -> list[Example]:
    """Questions of different length, each with a program."""
    draw = random.Random(3)
    made = []
    for i in range(number):
        years = " ".join(str(draw.randrange(100, 999)) for _ in range(draw.randrange(1, 9)))
        question = f"{draw.choice(QUESTIONS)} was {years} . what is the sum?"
        program = f"add({draw.randrange(100, 999)}, {draw.randrange(100, 999)})"
        made.append(Example(id=f"x{i}", messages=(Message(role="user", content=question),), completion=program))
    return made


def prepared(folder: Path, model: Path, number: int = 12) -> Path:
    """What ``prepare`` would write, as far as the later stages read it."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = models.load_tokenizer(models.fetch(str(model)))
    made = examples(number)
    encoded = [chat.encode_example(tokenizer, each.messages, each.completion) for each in made]
    rows = [
        {"id": each.id, "input_ids": code.input_ids, "completion_mask": code.completion_mask}
        for each, code in zip(made, encoded, strict=True)
    ]
    for split in ("train", "eval"):
        Dataset.from_list(rows).save_to_disk(str(folder / "tokens" / split))
    (folder / "eval.jsonl").write_text("".join(each.model_dump_json() + "\n" for each in made), encoding="utf-8")
    gold = [
        {
            "id": each.id,
            "pre_text": [],
            "post_text": [],
            "table": [["", "2019"], ["cash", "1"]],
            "qa": {"question": "?", "program": each.completion, "exe_ans": 1.0},
        }
        for each in made
    ]
    (folder / "gold.json").write_text(json.dumps(gold), encoding="utf-8")
    return folder
