"""Wordings of questions about one quantity or two: changes, ratios, sums, averages, returns, prices times counts.

The slots are those of ``wordings``.
"""

from __future__ import annotations

QUANTITIES: dict[str, tuple[str, ...]] = {
    "change": (
        "what was the change in {x} from {a} to {b}?",
        "what is the net change in {x} from {a} to {b}?",
        "by how much did {x} change from {a} to {b}?",
        "what was the difference in {x} between {a} and {b}?",
        "between {a} and {b} , what was the change in {x}?",
        "considering the years {a} and {b} , what is the variation observed in {x}?",
        "how much did {x} change between {a} and {b}?",
        "what is the net difference in {x} from {a} to {b}?",
    ),
    "change_unit": (
        "what was the change in {x} from {a} to {b} in {unit}?",
        "in {unit} , what was the change in {x} between {a} and {b}?",
        "what is the net change in {x} from {a} to {b} , in {unit}?",
    ),
    "increase": (
        "what was the increase in {x} from {a} to {b}?",
        "by how much did {x} increase from {a} to {b}?",
        "how much did {x} grow between {a} and {b}?",
    ),
    "percent_change": (
        "what was the percentage change in {x} from {a} to {b}?",
        "what was the percent change in {x} between {a} and {b}?",
        "what is the growth rate in {x} from {a} to {b}?",
        "what was the percent of the change in {x} from {a} to {b}",
        "by what percentage did {x} change from {a} to {b}?",
        "what is the percentual change in {x} between {a} and {b}?",
        "in {b} , what was the percentage change in {x} compared to {a}?",
        "considering the years {a} and {b} , what is the percentage change in {x}?",
        "what is the rate of change in {x} from {a} to {b}?",
        "what was the growth rate of {x} between {a} and {b}?",
    ),
    "percent_increase": (
        "what was the percentage increase in {x} from {a} to {b}?",
        "by what percent did {x} increase from {a} to {b}?",
        "what was the percentage growth in {x} from {a} to {b}?",
    ),
    "yearly_growth": (
        "what is the growth rate in {x} in {b}?",
        "what was the percentage change in {x} during {b}?",
        "what is the growth rate of {x} in the year {b}?",
    ),
    "yearly_change": (
        "what was the average annual change in {x} from {a} to {b}?",
        "what is the average yearly change in {x} between {a} and {b}?",
    ),
    "billions": (
        "what was the change in {x} from {a} to {b} in {unit}?",
        "in {unit} , by how much did {x} change from {a} to {b}?",
    ),
    "greater": (
        "was {x} greater than {y} in {b}?",
        "did {x} exceed {y} in {b}?",
        "in {b} , was {x} higher than {y}?",
        "was {x} larger than {y} in {b}?",
    ),
    "rose": (
        "did {x} increase from {a} to {b}?",
        "was {x} in {b} greater than in {a}?",
        "was {x} higher in {b} than in {a}?",
        "did {x} grow between {a} and {b}?",
    ),
    "fell": (
        "did {x} decrease from {a} to {b}?",
        "was {x} higher in {a} than in {b}?",
        "did {x} decline between {a} and {b}?",
    ),
    "ratio": (
        "what was the ratio of {x} to {y} in {b}?",
        "what is the ratio of {x} to {y} for {b}?",
        "in {b} , what was the ratio of {x} to {y}?",
    ),
    "percent_of": (
        "what was {x} as a percentage of {y} in {b}?",
        "in {b} , {x} was what percent of {y}?",
        "as a percentage of {y} , what was {x} in {b}?",
        "what percent of {y} was {x} in {b}?",
        "{x} equaled what portion of {y} in {b}?",
    ),
    "ratio_years": (
        "what was the ratio of {x} in {b} to {a}?",
        "what is the ratio of {b} {x} to {a} {x}?",
        "{x} in {b} was how many times the {a} figure?",
    ),
    "difference": (
        "what was the difference between {x} and {y} in {b}?",
        "in {b} , how much more was {x} than {y}?",
        "what is the difference between {x} and {y} for {b}?",
        "by how much did {x} exceed {y} in {b}?",
    ),
    "sum_rows": (
        "what was the total of {x} and {y} in {b}?",
        "what is the sum of {x} and {y} in {b}?",
        "in {b} , what were {x} and {y} combined?",
        "what was the combined amount of {x} and {y} for {b}?",
    ),
    "sum_years": (
        "what was the total {x} in {a} and {b}?",
        "what is the sum of {x} for {a} and {b}?",
        "what was the combined {x} for {a} and {b}?",
    ),
    "sum_three": (
        "what was the total {x} for {a} , {m} and {b}?",
        "what is the sum of {x} in {a} , {m} and {b}?",
        "in {a} , {m} and {b} , what was the combined {x}?",
    ),
    "average_two": (
        "what was the average {x} for {a} and {b}?",
        "what is the average of {x} in {a} and {b}?",
        "for {a} and {b} , what was the average {x}?",
        "in {unit} , what was the average {x} in {a} and {b}?",
    ),
    "average_three": (
        "what was the average {x} for {a} , {m} and {b}?",
        "what is the average of {x} in {a} , {m} and {b}?",
        "in {unit} , what was the average {x} for {a} , {m} and {b}?",
    ),
    "average_four": (
        "what was the average {x} for {a} , {l} , {m} and {b}?",
        "what is the average of {x} in {a} , {l} , {m} and {b}?",
    ),
    "table_average": (
        "what was the average {x} over all years shown?",
        "for the years shown in the table , what was the average {x}?",
        "what is the average annual {x} for all years in the table?",
        "considering all years shown , what is the average {x}?",
    ),
    "table_max": (
        "what was the highest {x} of all years shown?",
        "for the years shown in the table , what was the greatest {x}?",
        "what is the maximum {x} in the table?",
        "considering all years shown , what is the highest {x}?",
    ),
    "table_min": (
        "what was the lowest {x} of all years shown?",
        "for the years shown in the table , what was the smallest {x}?",
        "what is the minimum {x} in the table?",
        "considering all years shown , what is the lowest {x}?",
    ),
    "table_sum": (
        "what was the total {x} over all years shown?",
        "for the years shown in the table , what was the sum of {x}?",
        "what is the sum of {x} for all years in the table?",
        "considering all years shown , what is the total {x}?",
    ),
    "range": (
        "what is the range of {x} over all years shown?",
        "for the years shown in the table , what was the difference between the highest and the lowest {x}?",
    ),
    "ratio_growth": (
        "what was the percentage change in the ratio of {x} to {y} from {a} to {b}?",
        "what is the growth rate in {x} as a percentage of {y} from {a} to {b}?",
    ),
    "growth_gap": (
        "what was the difference between the growth rates of {x} and {y} from {a} to {b}?",
        "from {a} to {b} , by how much did the growth rate of {x} exceed that of {y}?",
    ),
    "total_growth": (
        "what was the percentage change in {x} and {y} combined from {a} to {b}?",
        "what is the growth rate in the sum of {x} and {y} from {a} to {b}?",
    ),
    "roi": (
        "what is the roi of an investment in {x} from {a} to {b}?",
        "what was the percentage return of {x} from {a} to {b}?",
        "what was the total return on {x} from {a} to {b}?",
        "what is the percentage cumulative return for {x} from {a} to {b}?",
    ),
    "roi_gap": (
        "what was the difference in percentage return between {x} and {y} from {a} to {b}?",
        "from {a} to {b} , by how much did the roi of {x} exceed that of {y}?",
    ),
    "product": (
        "what was the {x}?",
        "what is the total {x}?",
        "how much was the {x}?",
    ),
    "product_unit": (
        "what was the {x} , in {unit}?",
        "in {unit} , what is the total {x}?",
        "how much was the {x} , in {unit}?",
    ),
    "product_share": (
        "what was the {x} as a percentage of {y}?",
        "the {x} was what portion of {y}?",
    ),
    "rate": (
        "what was the amount of {x} in {b}?",
        "in {b} , how much was {x}?",
        "what was {x} in {b} in {unit}?",
    ),
    "rate_rest": (
        "what was {y} in {b} without {x}?",
        "excluding {x} , what was {y} in {b}?",
    ),
    "without_charge": (
        "what would {y} have been in {b} without {x}?",
        "excluding {x} , what would {y} have been in {b}?",
    ),
    "per_piece": (
        "what was {y} per {x} in {b} , in dollars?",
        "in dollars , what was {y} for each {x} in {b}?",
        "in {b} , how many dollars of {y} were there per {x}?",
    ),
}
