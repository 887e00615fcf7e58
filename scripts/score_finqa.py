"""Print the official FinQA scores of a file of predictions, with the guide's flags, as `fintune score` does."""

from pathlib import Path

import click

from fintune.cli.legacy.flags import PATH, PastedCommand
from fintune.cli.main import main
from fintune.cli.score import print_score


@click.command(cls=PastedCommand)
@click.option("--pred_json", type=PATH, required=True, help="JSON, JSONL or .gz of {id, predicted} or {id, program}.")
@click.option("--gold_json", type=PATH, required=True, help="Official FinQA JSON, plain or .gz.")
@click.option("--out_csv", type=PATH, help="Write one row per prediction to this file.")
def score_finqa(pred_json: Path, gold_json: Path, out_csv: Path | None) -> None:
    """Print the official FinQA scores of a file of predictions."""
    if out_csv is not None:
        out_csv.parent.mkdir(parents=True, exist_ok=True)
    print_score(pred_json, gold_json, csv=out_csv)


if __name__ == "__main__":
    main(score_finqa, "score_finqa.py")
