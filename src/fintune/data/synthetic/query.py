"""What every kind of question uses: numbers of a page drawn to fit, wordings, and programs built from templates."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, TypeAlias, TypeVar

from fintune.data.synthetic.company import phrases
from fintune.data.synthetic.page import Contents, NumberSeries, Page, PageNumber
from fintune.finqa.program import Argument, Constant, Nothing, Number, Program, ProgramStep, Reference, RowName

AnswerForm: TypeAlias = Literal["number", "percent", "yes_no"]
Operands: TypeAlias = Mapping[str, PageNumber | NumberSeries | int]
SeriesPair: TypeAlias = tuple[NumberSeries, NumberSeries, list[int]]
_Item = TypeVar("_Item")

UNITS = {1_000: "thousands", 1_000_000: "millions", 1_000_000_000: "billions"}

CHANGES = frozenset({"cash_change", "working_capital", "net_borrowings"})
"""Lines that are changes themselves: "the change in the change in cash" is no question."""

_UNPAIRED = CHANGES | {"liabilities_and_equity"}
"""Lines of no pair: "total liabilities and equity and …" could be read in two ways."""

# "the average the tax rate"
_DOUBLED_ARTICLE = re.compile(r"\b(average|annual|combined|greatest|highest|lowest|m(?:ax|in)imum|smallest|total) the ")


class Draft(NamedTuple):
    """A question with its program, before the program is executed; ``evidence`` has the numbers that it uses."""

    question: str
    program: Program
    evidence: tuple[PageNumber, ...]
    answer_form: AnswerForm


class NoQuestionError(Exception):
    """The page has nothing that this kind of question can ask about."""


def require(condition: bool) -> None:
    """Raise a :class:`NoQuestionError` unless the condition holds."""
    if not condition:
        raise NoQuestionError


@dataclass(frozen=True)
class Query:
    """A page, and the evidence that a question shall use: "table", "text" or "both"."""

    page: Page
    evidence: str
    rng: random.Random

    @property
    def source(self) -> Contents:
        """What can be asked about the table or about the text."""
        return self.page.table if self.evidence == "table" else self.page.text

    def choose(self, items: Iterable[_Item]) -> _Item:
        """Draw an item; without one there is no question."""
        items = list(items)
        require(bool(items))
        return self.rng.choice(items)

    def pair(self, num_years: int = 1) -> SeriesPair:
        """Draw two series of the table, of the text, or one of the text and one of the table; see `pair_of`."""
        first = self.page.table if self.evidence == "table" else self.page.text
        second = self.page.text if self.evidence == "text" else self.page.table
        return self.pair_of(first.series, second.series, num_years)

    def pair_of(self, first: Sequence[NumberSeries], second: Sequence[NumberSeries], num_years: int = 1) -> SeriesPair:
        """Draw two series of money and years that both have; a flow goes with a flow, a stock with a stock."""
        x, y = self.choose(
            (x, y)
            for x in first
            for y in second
            if x.key != y.key
            and not {x.key, y.key} & _UNPAIRED
            and x.measure == y.measure == "money"
            and (x.when == y.when or first is not second)
            and len(x.numbers.keys() & y.numbers) >= num_years
        )
        years = sorted(self.rng.sample(sorted(x.numbers.keys() & y.numbers), num_years))
        require(same_sign(*(series.numbers[year] for series in (x, y) for year in years)))
        return x, y, years

    def draft(
        self,
        wording: str,
        template: str,
        operands: Operands,
        slots: Mapping[str, object],
        form: AnswerForm = "number",
        *,
        asked_unit: str = "",
    ) -> Draft:
        """Draw a wording and build the program from its template.

        Args:
            wording: The kind of wording; one that names the unit is drawn only if there is a slot for it.
            template: The program in nested form over the names of the operands, as ``divide(subtract(b, a), a)``.
            operands: Numbers of the page; a series for a table operation on its row; an int for a constant.
            slots: Values for the slots of the wording.
            form: How the answer is written.
            asked_unit: Unit to ask for at the end of the question.
        """
        wordings = phrases("wordings")[wording]
        text = self.rng.choice([text for text in wordings if "{unit}" not in text or slots.get("unit")])
        question = _DOUBLED_ARTICLE.sub(r"\1 ", text.format(**slots))
        if asked_unit:
            question = f"{question.rstrip('?')} , in {asked_unit}?"
        return Draft(question, *_fill(template, operands), form)


@cache
def _parse_template(template: str) -> ast.expr:
    return ast.parse(template, mode="eval").body


def _fill(template: str, operands: Operands) -> tuple[Program, tuple[PageNumber, ...]]:
    """Return the program of a template, and its numbers in the order in which the steps use them."""
    steps: dict[str, ProgramStep] = {}
    evidence: list[PageNumber] = []

    def argument(node: ast.expr) -> Argument:
        if isinstance(node, ast.Call):
            text = ast.unparse(node)
            if text not in steps:
                calls_first = sorted(node.args, key=lambda item: not isinstance(item, ast.Call))
                arguments = {item: argument(item) for item in calls_first}
                first, second = (*(arguments[item] for item in node.args), Nothing())[:2]
                steps[text] = ProgramStep(ast.unparse(node.func), first, second)
            return Reference(list(steps).index(text))
        operand = operands[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)
        if isinstance(operand, int):
            return Constant(f"const_{operand}")
        if isinstance(operand, PageNumber):
            evidence.append(operand)
            return Number(operand.text)
        evidence.append(operand.numbers[min(operand.numbers)])
        return RowName(str(operand.row_name))

    argument(_parse_template(template))
    return Program(tuple(steps.values())), tuple(evidence)


def converted(operand: str, number: PageNumber, scale: int) -> str:
    """Return the template of an operand that is counted in another unit, by one step if the units differ."""
    if number.scale == scale:
        return operand
    larger = number.scale > scale
    return f"multiply({operand}, {number.scale // scale})" if larger else f"divide({operand}, {scale // number.scale})"


def unit_of(number: PageNumber) -> str:
    """Return what a number of money counts, such as "millions", or "" for counts and prices."""
    return UNITS.get(number.scale, "")


def same_sign(*numbers: PageNumber) -> bool:
    """Return whether no number is 0 and all have one sign."""
    return all(number.value > 0 for number in numbers) or all(number.value < 0 for number in numbers)
