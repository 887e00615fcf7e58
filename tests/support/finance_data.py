"""Generated files of the shapes that the finance data has, at their real column names."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

INVESTOPEDIA = "FinLang/investopedia-instruction-tuning-dataset"
CARD = b"---\nlicense: cc-by-nc-4.0\n---\n# Investopedia\n"


def write_datasets(folder: Path, num_rows: int = 8) -> Path:
    """Trader SFT, Trader DPO, and what they are found converted to: ShareGPT and Alpaca; one row is broken."""
    folder.mkdir(parents=True, exist_ok=True)
    sft = [
        {
            "messages": [
                {"role": "system", "content": "You are a careful trader."},
                {"role": "user", "content": f"What is the risk of position {n}?"},
                {"role": "assistant", "content": f"At most {n} % of the book, with a stop."},
            ]
        }
        for n in range(num_rows)
    ]
    sft.append({"messages": [{"role": "usr", "content": "a role that is none"}]})
    dpo = [
        {"prompt": f"How large is trade {n}?", "chosen": f"Risk {n + 1} bp of the book.", "rejected": "All in!"}
        for n in range(num_rows)
    ]
    sharegpt = [
        {"conversations": [{"from": "human", "value": f"Roll {n}?"}, {"from": "gpt", "value": f"In month {n}."}]}
        for n in range(num_rows)
    ]
    alpaca = [
        {"instruction": f"Name the duration of bond {n}.", "input": "", "output": f"{n} years."}
        for n in range(num_rows)
    ]
    for name, rows in (("trader_sft_data", sft), ("trader_dpo_data", dpo)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "converted.json").write_text(json.dumps([*sharegpt, *alpaca]), encoding="utf-8")
    return folder


def investopedia(num_rows: int = 300) -> bytes:
    """The hub's CSV; every tenth row has no context."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["Topic", "Title", "Context", "Question", "Answer"])
    for n in range(num_rows):
        context = f"Term {n} belongs to bonds,\nsays page {n}." if n % 10 else ""
        rows.writerow(["Bonds", f"Term {n}", context, f"What does term {n} mean?", f"It is meaning {n}."])
    return text.getvalue().encode()
