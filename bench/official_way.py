"""FinQA's official scoring written the direct way: what score_speed.py measures fintune against.

In the words of the specification of github.com/czyssrs/FinQA, code/evaluate/evaluate.py (0f16e28): every prediction is
executed and compared on its own, and each comparison that is made gives both programs to sympy as text. Nothing is
remembered from one prediction to the next. Only the printing of the official script is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

OPERATIONS = (
    "add",
    "subtract",
    "multiply",
    "divide",
    "exp",
    "greater",
    "table_max",
    "table_min",
    "table_sum",
    "table_average",
)
SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "exp": "**", "greater": ">"}

Step = tuple[str, str, str]


class Left(Exception):  # noqa: N818 - no error, the way out of a loop
    """Where the official script leaves its loop over the steps and still rounds what it has."""


def number(text: str) -> float | str:
    """The number that an argument or a cell stands for, "n/a" where it is none."""
    text = text.replace(",", "")
    try:
        return float(text)
    except ValueError:
        pass
    if "%" in text:
        try:
            return float(text.replace("%", "")) / 100.0
        except ValueError:
            return "n/a"
    if "const" in text:
        text = text.replace("const_", "")
        return float("-1" if text == "m1" else text)
    return "n/a"


def well_formed(body: Sequence[str]) -> bool:
    """Whether each fourth token names an operation and each fourth one closes it."""
    for place, piece in enumerate(body):
        if place % 4 == 0 and piece.strip("(") not in OPERATIONS:
            return False
        if (place + 1) % 4 == 0 and piece != ")":
            return False
    return True


def split(step: str) -> Step:
    """Operation and both arguments of a step as it stands between two ")"."""
    step = step.strip()
    assert step.count("(") <= 1
    head, arguments = step.split("(")[0].strip("|").strip(), step.split("(")[1].strip("|").strip()
    return head, arguments.split("|")[0].strip(), arguments.split("|")[1].strip()


def execute(tokens: Sequence[str], table: Sequence[Sequence[str]]) -> tuple[int, float | str]:
    """Invalid flag and result of a program."""
    invalid, result = 0, "n/a"
    try:
        body = list(tokens)[:-1]
        if not well_formed(body):
            return 1, "n/a"
        results: dict[int, float | str] = {}
        cells: list[float | str] | None = None
        for place, raw in enumerate("|".join(body).split(")")[:-1]):
            operation, first, second = split(raw)
            if operation in SIGNS:
                result = calculate(operation, *(operand(argument, results) for argument in (first, second)))
            elif "table" in operation:
                # A reference is looked up and not used: the row of an earlier step stands in for it.
                cells = cells if "#" in first else read_row(first, table)
                result = over_row(operation, cells)
            else:
                continue
            results[place] = result
    except Left:
        invalid = 1
    except Exception:
        return 1, result
    try:
        return invalid, result if result in {"yes", "no", "n/a"} else round(result, 5)
    except Exception:
        return 1, result


def operand(text: str, results: dict[int, float | str]) -> float | str:
    """Value of an argument."""
    value = results[int(text.replace("#", ""))] if "#" in text else number(text)
    if value == "n/a":
        raise Left
    return value


def read_row(name: str, table: Sequence[Sequence[str]]) -> list[float | str]:
    """Numbers of the last row with a name."""
    rows = {row[0]: row[1:] for row in table}
    if name not in rows:
        raise Left
    cells = [number(cell.replace("$", "").strip().split("(")[0].strip()) for cell in rows[name]]
    if "n/a" in cells:
        raise Left
    return cells


def calculate(operation: str, first: float | str, second: float | str) -> float | str:
    """One arithmetic step."""
    if operation == "add":
        return first + second
    if operation == "subtract":
        return first - second
    if operation == "multiply":
        return first * second
    if operation == "divide":
        return first / second
    if operation == "exp":
        return first**second
    return "yes" if first > second else "no"


def over_row(operation: str, cells: Sequence[float]) -> float:
    """One table step."""
    if operation == "table_max":
        return max(cells)
    if operation == "table_min":
        return min(cells)
    total = 0.0
    for cell in cells:
        total += cell
    return total if operation == "table_sum" else total / len(cells)


def equal(gold: Sequence[str], predicted: Sequence[str]) -> bool:
    """Whether two programs are one: literals of the gold one only, and the same expression for sympy."""
    from sympy import simplify

    symbols: dict[str, str] = {}
    gold_steps = "|".join(gold[:-1]).split(")")[:-1]
    for raw in gold_steps:
        for name in literals(raw):
            symbols.setdefault(name, f"a{len(symbols)}")
    body = list(predicted)[:-1]
    steps = "|".join(body).split(")")[:-1]
    try:
        if not (well_formed(body) and all(allowed(raw, place, symbols) for place, raw in enumerate(steps))):
            return False
    except Exception:
        return False
    simplified = simplify(expression(gold_steps, symbols), evaluate=False)
    try:
        return bool(simplified == simplify(expression(steps, symbols), evaluate=False))
    except Exception:
        return False


def literals(raw: str) -> list[str]:
    """What becomes a symbol: a table step as a whole, of any other its arguments that are no reference."""
    operation, *arguments = split(raw)
    return [raw.strip()] if "table" in operation else [argument for argument in arguments if "#" not in argument]


def allowed(raw: str, place: int, symbols: dict[str, str]) -> bool:
    """Whether a predicted step names only the gold program's literals and earlier steps."""
    operation, *arguments = split(raw)
    references = [] if "table" in operation else [argument for argument in arguments if "#" in argument]
    earlier = all(int(argument.strip("#")) < place for argument in references)
    return earlier and all(name in symbols for name in literals(raw))


def expression(steps: Sequence[str], symbols: dict[str, str]) -> str:
    """The last step as text over the symbols, with all that it uses."""

    def written(place: int) -> str:
        raw = steps[place]
        operation, first, second = split(raw)
        if "table" in operation:
            return symbols[raw.strip()]
        parts = [written(int(a.replace("#", ""))) if "#" in a else symbols[a] for a in (first, second)]
        return f"( {parts[0]} {SIGNS[operation]} {parts[1]} )"

    return written(len(steps) - 1)
