"""Write a FinQA file as a Hugging Face dataset folder, with the guide's flags; see docs/guide_finqa.md."""

from pathlib import Path

import click

from fintune.cli.common import echo
from fintune.cli.legacy.finqa_data import preprocess as write_dataset
from fintune.cli.legacy.flags import PATH, PastedCommand
from fintune.cli.main import main
from fintune.util.text import abridge_remarks


@click.command(cls=PastedCommand)
@click.option("--input_json", type=PATH, required=True, help="Official FinQA JSON, a list or lines, plain or .gz.")
@click.option("--output_dataset", type=PATH, required=True, metavar="DIR", help="Folder to write.")
@click.option("--strict", is_flag=True, help="Refuse a file with a record that cannot be used.")
def preprocess(input_json: Path, output_dataset: Path, strict: bool) -> None:
    """Check FinQA records and write them as a dataset. Needs no model."""
    read = write_dataset(input_json, output_dataset, strict=strict)
    for problem in abridge_remarks(read.problems):
        click.echo(f"fintune: {problem}", err=True)
    dropped = ", ".join(f"{number} {reason}" for reason, number in read.dropped.most_common())
    echo(f"{output_dataset}: {len(read.records)} records{dropped and f', left out {dropped}'}")


if __name__ == "__main__":
    main(preprocess, "preprocess.py")
