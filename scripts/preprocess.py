"""A FinQA JSON file to a Hugging Face dataset folder (`datasets.load_from_disk`), by the older flags.

python scripts/preprocess.py --input_json data/FinQA_train.json --output_dataset data/processed/train
"""

from __future__ import annotations

from pathlib import Path

import click

from fintune.cli.legacy.pasted import PastedCommand
from fintune.cli.main import main

FILE = click.Path(path_type=Path)


@click.command(cls=PastedCommand)
@click.option("--input_json", type=FILE, required=True, help="Official FinQA JSON, a list or lines, plain or .gz.")
@click.option("--output_dataset", type=FILE, required=True, metavar="DIR", help="Folder to write.")
@click.option("--strict", is_flag=True, help="Refuse a file with a record that cannot be used.")
def preprocess(input_json: Path, output_dataset: Path, strict: bool) -> None:
    """Check FinQA records and write them as a dataset; needs no model."""
    from fintune.cli.legacy.preprocess import preprocess as stage
    from fintune.util.text import abridge_remarks

    done = stage(input_json, output_dataset, strict=strict)
    for problem in abridge_remarks(done.problems):
        click.echo(f"fintune: {problem}", err=True)
    left_out = ", ".join(f"{number} {reason}" for reason, number in done.dropped.items())
    click.echo(f"{output_dataset}: {done.num_records} records{left_out and f', left out {left_out}'}")


if __name__ == "__main__":
    main(preprocess, "preprocess.py")
