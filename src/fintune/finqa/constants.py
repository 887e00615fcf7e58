"""The words of the FinQA program language (Chen et al. 2021, FinQA, section 3; github.com/czyssrs/FinQA)."""

from __future__ import annotations

ARITHMETIC_OPERATIONS = ("add", "subtract", "multiply", "divide", "exp", "greater")
"""Operations over two numbers; ``greater`` gives "yes" or "no"."""

TABLE_OPERATIONS = ("table_max", "table_min", "table_sum", "table_average")
"""Operations over all cells of one table row; the second argument is ``none``."""

OPERATIONS = ARITHMETIC_OPERATIONS + TABLE_OPERATIONS

CONSTANTS = (
    *(f"const_{value}" for value in range(1, 11)),
    "const_100",
    "const_1000",
    "const_10000",
    "const_100000",
    "const_1000000",
    "const_10000000",
    "const_1000000000",
    "const_m1",
)
"""Constants of the official generator's vocabulary; ``const_m1`` is -1. The evaluator takes ``const_<any number>``."""

END = "EOF"
"""Last token of every program in the official prediction format."""

NOTHING = "none"
"""Second argument of a table operation."""
