"""Steps and numbers as the official script reads them (github.com/czyssrs/FinQA, code/evaluate/evaluate.py).

Its quirks are kept. Execution and equality both use this reading. Neither checks whether a program is in the language.
"""

from __future__ import annotations

from collections.abc import Sequence

from fintune.finqa.program import OPERATIONS


def structure_error(body: Sequence[str]) -> str | None:
    """Return why tokens fail the official test of structure, or None if they pass.

    Tokens 1, 5, 9 ... must name an operation, and tokens 4, 8, 12 ... must be ")". A name may lack its "(" or have
    several of them. An incomplete last step passes.

    Args:
        body: The tokens without the last one.
    """
    for index, piece in enumerate(body):
        if index % 4 == 0 and piece.strip("(") not in OPERATIONS:
            return f"token {index + 1}, {piece!r}, is not an operation"
        if index % 4 == 3 and piece != ")":
            return f"token {index + 1}, {piece!r}, is not ')': each step has one operation and two arguments"
    return None


def split_steps(body: Sequence[str]) -> list[str]:
    """Split tokens into the official steps: joined with "|" and cut at every ")"; what follows the last is dropped."""
    return "|".join(body).split(")")[:-1]


def split_step(raw: str) -> tuple[str, str, str]:
    """Return the operation and the two arguments of a step from `split_steps`, stripped; more arguments are ignored.

    Raises:
        ValueError: The step has no "(", several, or fewer than two arguments. The message is the reason.
    """
    head, *rest = raw.split("(")
    if len(rest) > 1:
        raise ValueError("an argument contains '('")
    if not rest:
        raise ValueError("no '(' after the operation")
    arguments = rest[0].strip("|").strip().split("|")
    if len(arguments) < 2:
        raise ValueError("two arguments are needed")
    return head.strip("|").strip(), arguments[0].strip(), arguments[1].strip()


def str_to_num(text: str) -> float | None:
    """Read a number as the official script does; return None if the text is not a number.

    Commas are dropped. A number is what Python's ``float`` reads ("1e3", "1_000", "nan"), then ``x%``, which is x /
    100, then ``const_x``, which is x, and ``const_m1``, which is -1.

    Raises:
        ValueError: A constant has no number, as in ``const_x``. The official script raises an exception there, while
            other text is an invalid argument.
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
    """Read a table cell as table operations do: without "$" and up to the first "("; None if it is not a number.

    Raises:
        ValueError: See `str_to_num`.
    """
    return str_to_num(cell.replace("$", "").strip().split("(")[0].strip())
