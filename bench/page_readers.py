"""Which reader leaves every number of a filing's table under its names: fintune, pandas or edgartools.

    python bench/page_readers.py --tables ../shared/cases/pages/filing_tables.jsonl.gz \
        --libraries ENV/bin/python --out bench/results/page_readers.json

The tables are those of eight real filings, as filed, with unique numbers in place of the reported ones. A number is
`right` if the name of its column has all header texts above it, `partly` if it has some, `nameless` if it has none,
`wrong` if the name has the header text of another column, and `lost` if it is nowhere. `--libraries` names a Python
with pandas, lxml and edgartools. Each reader runs in a process of its own; processor seconds include its start.

`--filings` takes whole 10-K files. From every table that fintune reads in one, a number is drawn, and its names make a
question: "what was net revenue, 2024?". The choice is right if the chosen table has this number under these names.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Table = list[list[str]]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=Path, required=True, help="gzipped JSON lines with html and numbers")
    parser.add_argument("--libraries", default=sys.executable, help="Python with pandas and edgartools")
    parser.add_argument("--filings", type=Path, nargs="*", default=[], help="whole filings in HTML")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--one", choices=READERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    with gzip.open(given.tables, "rt", encoding="utf-8") as lines:
        tables = [json.loads(line) for line in lines]
    if given.one:
        json.dump(_read_all(given.one, tables), sys.stdout)
        return
    results = {name: _measure(name, tables, given.tables, given.libraries) for name in READERS}
    result = {"num_tables": len(tables), "readers": results}
    result["choice"] = {path.name: _choose(path) for path in given.filings}
    text = json.dumps(result, indent=2) + "\n"
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    print(text, end="")


def _measure(name: str, tables: list[dict[str, Any]], path: Path, libraries: str) -> dict[str, Any]:
    python = sys.executable if name == "fintune" else libraries
    done = subprocess.run([python, __file__, "--tables", path, "--one", name], capture_output=True, check=True)
    read = json.loads(done.stdout)
    counts = Counter(dict.fromkeys(("numbers", "right", "partly", "nameless", "wrong", "lost"), 0))
    num_bad = 0
    for table, rows in zip(tables, read["tables"], strict=True):
        before = counts["right"] - counts["numbers"]
        _score(table["numbers"], rows, counts)
        num_bad += counts["right"] - counts["numbers"] != before
    return {"version": read["version"], **counts, "tables_with_a_fault": num_bad, "cpu_seconds": read["cpu_seconds"]}


def _score(numbers: dict[str, Any], rows: Table, counts: Counter[str]) -> None:
    texts = {_plain(name) for entry in numbers.values() for name in entry["column"]}
    for number, entry in numbers.items():
        names = [_plain(name) for name in entry["column"]]
        if not names:
            continue
        counts["numbers"] += 1
        found = re.compile(rf"(?<!\d){number}(?!\d)")
        column = next((k for r in rows for k, cell in enumerate(r) if found.search(cell.replace(",", ""))), None)
        if column is None:
            counts["lost"] += 1
            continue
        above = _plain(rows[0][column])
        num_held = sum(name in above for name in names)
        is_foreign = any(text in above and not any(text in name for name in names) for text in texts if text)
        counts[
            "wrong" if is_foreign else ("nameless", "partly", "right")[(num_held > 0) + (num_held == len(names))]
        ] += 1


def _choose(path: Path) -> dict[str, int]:
    """Ask for a number of each table of a filing, and count the questions that choose its table."""
    from fintune.data.page_file import choose_table
    from fintune.data.page_layout import read_grid
    from fintune.data.page_markup import html_blocks

    blocks = html_blocks(path.read_text(encoding="utf-8"), path)
    rows_of = {k: read_grid(block, path).rows for k, block in enumerate(blocks) if not isinstance(block, str)}
    draw = random.Random(17)  # noqa: S311
    num = num_right = 0
    for rows in rows_of.values():
        named = [
            (r, c) for r, row in enumerate(rows) for c, cell in enumerate(row) if r and c and row[0] and rows[0][c]
        ]
        figures = [(r, c) for r, c in named if re.search(r"\d", rows[r][c])]
        if not figures:
            continue
        r, c = draw.choice(figures)
        number, names = rows[r][c], (rows[r][0], rows[0][c])
        at, _ = choose_table(blocks, f"what was {names[0]}, {names[1]}?", None, path)
        chosen = rows_of[at]
        cells = [(row[0], name, cell) for row in chosen[1:] for name, cell in zip(chosen[0], row, strict=True)]
        num += 1
        num_right += (*names, number) in cells
    return {"tables": len(rows_of), "questions": num, "right": num_right}


def _plain(text: str) -> str:
    return re.sub(r"[\s,.:$()\u200b]", "", text).lower()


def _read_all(name: str, tables: list[dict[str, Any]]) -> dict[str, Any]:
    read = READERS[name]
    rows = []
    for table in tables:
        try:
            rows.append(read(table["html"]))
        except (ValueError, IndexError, KeyError):
            rows.append([])
    seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    return {"tables": rows, "version": version(name), "cpu_seconds": round(seconds, 1)}


def _fintune(html: str) -> Table:
    from fintune.data.page_file import read_page

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page.html")
        path.write_text(html, encoding="utf-8")
        return [list(row) for row in read_page(path, decimal="point").record.table]


def _pandas(html: str) -> Table:
    import pandas as pd

    return _frame_rows(pd.read_html(io.StringIO(html))[0])


def _edgartools(html: str) -> Table:
    from edgar.documents import parse_html

    return _frame_rows(parse_html(f"<html><body>{html}</body></html>").tables[0].to_dataframe().reset_index())


def _frame_rows(frame: Any) -> Table:
    names = [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in frame.columns]
    cells = [[str(cell).removesuffix(".0") for cell in row] for row in frame.fillna("").to_numpy().tolist()]
    return [names, *cells]


READERS: dict[str, Callable[[str], Table]] = {"fintune": _fintune, "pandas": _pandas, "edgartools": _edgartools}

if __name__ == "__main__":
    main()
