"""How the official script (github.com/czyssrs/FinQA, code/evaluate/evaluate.py) reads steps and numbers, quirks kept.

Execution and equality both rest on this reading; neither asks whether a program is in the language.
"""

from __future__ import annotations

from collections.abc import Sequence

from fintune.finqa.program import OPERATIONS


def structure_error(body: Sequence[str]) -> str | None:
    """Why tokens without their last one fail the official test of structure, None where they pass.

    Every fourth token, from the first, must name an operation, and every fourth, from the fourth, must be ")". A name
    may lack its "(" or have several, an incomplete last step passes.
    """
    for index, piece in enumerate(body):
        if index % 4 == 0 and piece.strip("(") not in OPERATIONS:
            return f"token {index + 1}, {piece!r}, is no operation"
        if index % 4 == 3 and piece != ")":
            return f"token {index + 1}, {piece!r}, is not ')': each step has one operation and two arguments"
    return None


def split_steps(body: Sequence[str]) -> list[str]:
    """Steps as the official script sees them: tokens joined with "|", cut at every ")", the rest left out."""
    return "|".join(body).split(")")[:-1]


def split_step(raw: str) -> tuple[str, str, str]:
    """Operation and two arguments of one of `split_steps`, stripped; further arguments are ignored.

    Raises:
        ValueError: There are several "(", none, or fewer than two arguments; with the reason.
    """
    head, *rest = raw.split("(")
    if len(rest) > 1:
        raise ValueError("'(' stands inside an argument")
    if not rest:
        raise ValueError("no '(' after the operation")
    arguments = rest[0].strip("|").strip().split("|")
    if len(arguments) < 2:
        raise ValueError("two arguments are needed")
    return head.strip("|").strip(), arguments[0].strip(), arguments[1].strip()


def str_to_num(text: str) -> float | None:
    """Read a number as the official script does, None for what is none.

    Commas are dropped; what Python's ``float`` reads is a number ("1e3", "1_000", "nan"), then ``x%`` is x / 100, then
    ``const_x`` is x and ``const_m1`` is -1.

    Raises:
        ValueError: A constant without a number, ``const_x``; for the official script that is an exception, while other
            text is an invalid argument.
    """
    text = text.replace(",", "")
    try:
        return float(text)
    except ValueError:
        pass
    if "%" in text:
        try:
            return float(text.replace("%", "")) / 100.0
        except ValueError:
            return None
    if "const" in text:
        text = text.replace("const_", "")
        return float("-1" if text == "m1" else text)
    return None


def cell_number(cell: str) -> float | None:
    """Number of a table cell as table operations read it: without "$", up to the first "("; None where it is none.

    Raises:
        ValueError: See `str_to_num`.
    """
    return str_to_num(cell.replace("$", "").strip().split("(")[0].strip())
