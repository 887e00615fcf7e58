"""Score FinQA predictions by the older flags; `fintune score` does the same and more.

python scripts/score_finqa.py --pred_json predictions.json --gold_json test.json --out_csv metrics.csv
"""

from __future__ import annotations

from pathlib import Path

import click

from fintune.cli.legacy.pasted import PastedCommand
from fintune.cli.main import main
from fintune.cli.score import print_score

FILE = click.Path(path_type=Path)


@click.command(cls=PastedCommand)
@click.option("--pred_json", type=FILE, required=True, help="JSON, JSONL or .gz of {id, predicted} or {id, program}.")
@click.option("--gold_json", type=FILE, required=True, help="Official FinQA JSON, plain or .gz.")
@click.option("--out_csv", type=FILE, help="Write one row a prediction here.")
def score_finqa(pred_json: Path, gold_json: Path, out_csv: Path | None) -> None:
    """Official FinQA verdicts of predictions; needs no torch."""
    if out_csv is not None:
        out_csv.parent.mkdir(parents=True, exist_ok=True)
    print_score(pred_json, gold_json, csv=out_csv)


if __name__ == "__main__":
    main(score_finqa, "score_finqa.py")
