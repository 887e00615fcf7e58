"""Length and operations of programs, to be compared with those of FinQA's test set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_STEP = re.compile(r"(?:^|, )([a-z_]+)\(")

LONGEST = 4
"""Programs of this many steps or more are counted together."""


@dataclass(frozen=True)
class Distribution:
    """Shares in a set of programs.

    Attributes:
        steps: Share of the programs with 1, 2, 3 and at least 4 steps; the keys are "1" to "4+".
        operations: Share of the steps that use the operation.
    """

    steps: Mapping[str, float]
    operations: Mapping[str, float]


_TEST_OPERATIONS = {
    "divide": 820,
    "subtract": 521,
    "add": 260,
    "multiply": 109,
    "greater": 20,
    "table_average": 15,
    "table_max": 10,
    "table_sum": 10,
    "table_min": 4,
    "exp": 3,
}

FINQA_TEST = Distribution(
    steps={"1": 0.570, "2": 0.357, "3": 0.048, "4+": 0.025},
    operations={name: number / sum(_TEST_OPERATIONS.values()) for name, number in _TEST_OPERATIONS.items()},
)
"""FinQA's test set of 1,147 questions (github.com/czyssrs/FinQA)."""


def operations(program: str) -> list[str]:
    """Return the operations of a program's linear form, in order."""
    return _STEP.findall(program)


def distribution(programs: Iterable[str]) -> Distribution:
    """Return the shares over programs in linear form; without programs, all are zero."""
    used: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    for program in programs:
        names = operations(program)
        used.update(names)
        steps[f"{LONGEST}+" if len(names) >= LONGEST else str(len(names))] += 1
    num_programs, num_steps = max(1, steps.total()), max(1, used.total())
    return Distribution(
        steps={key: steps[key] / num_programs for key in sorted({*FINQA_TEST.steps, *steps})},
        operations={name: used[name] / num_steps for name in dict.fromkeys([*FINQA_TEST.operations, *sorted(used)])},
    )
