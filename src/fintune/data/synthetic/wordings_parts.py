"""Wordings of questions about the parts of a total: rows of a page, payments due, prices, facilities, purchases.

The slots are those of ``wordings``. A kind that ends in ``_due``, ``_price``, ``_facility`` or ``_month`` asks about
parts of that sort, any other about rows.
"""

from __future__ import annotations

PARTS: dict[str, tuple[str, ...]] = {
    "share": (
        "what percentage of {t} was {p} in {b}?",
        "what percent of {t} in {b} was related to {p}?",
        "what portion of {t} was {p} in {b}?",
        "in {b} , what percentage of {t} was attributable to {p}?",
        "{p} was what percent of {t} in {b}?",
        "as a percentage of {t} , what was {p} in {b}?",
        "in {b} , what portion of {t} is comprised of {p}?",
        "what was the percent of {t} that was {p} in {b}",
    ),
    "share_due": (
        "what percentage of {t} is due in {p}?",
        "what portion of {t} is due in {p}?",
        "what percent of {t} will be paid in {p}?",
        "what is the share of {t} that is payable in {p}?",
        "payments due in {p} are what percentage of {t}?",
    ),
    "share_after": (
        "what percentage of {t} is due after {p}?",
        "what portion of {t} is payable after {p}?",
        "what percent of {t} will be paid after {p}?",
    ),
    "share_price": (
        "what percentage of {t} was {p}?",
        "what portion of {t} is related to {p}?",
        "{p} was what percent of {t}?",
        "what percent of {t} was allocated to {p}?",
    ),
    "share_facility": (
        "what percentage of {t} was used?",
        "what portion of {t} was drawn in {b}?",
        "in {b} , what percent of {t} was outstanding?",
    ),
    "share_month": (
        "what percentage of {t} was purchased in {p}?",
        "what portion of {t} was bought in {p}?",
        "purchases in {p} were what percent of {t}?",
    ),
    "rest_month": (
        "how many of {t} were not purchased in {p}?",
        "what was {t} excluding {p}?",
    ),
    "share_rest_month": (
        "what percentage of {t} was not purchased in {p}?",
        "what portion of {t} was bought in other months than {p}?",
    ),
    "share_two_month": (
        "what percentage of {t} was purchased in {p} and {q}?",
        "what portion of {t} was bought in {p} and {q} combined?",
    ),
    "sum_month": (
        "how many shares were purchased in {p} and {q} combined?",
        "what is the sum of the shares purchased in {p} and {q}?",
    ),
    "difference_month": (
        "how many more shares were purchased in {p} than in {q}?",
        "what is the difference between the shares purchased in {p} and in {q}?",
    ),
    "ratio_month": (
        "what is the ratio of the shares purchased in {p} to those in {q}?",
        "purchases in {p} were how many times those in {q}?",
    ),
    "greater_month": (
        "were more shares purchased in {p} than in {q}?",
        "did the shares purchased in {p} exceed those in {q}?",
    ),
    "rest": (
        "what was {t} excluding {p} in {b}?",
        "without {p} , what would {t} have been in {b}?",
        "in {b} , how much of {t} was not {p}?",
    ),
    "rest_due": (
        "how much of {t} is not due in {p}?",
        "excluding {p} , what are {t}?",
    ),
    "rest_price": (
        "how much of {t} was not {p}?",
        "what was {t} excluding {p}?",
    ),
    "rest_facility": (
        "how much of {t} was available in {b}?",
        "what amount of {t} was not drawn?",
        "what is the unused amount of {t}?",
    ),
    "share_rest": (
        "what percentage of {t} was not {p} in {b}?",
        "in {b} , what portion of {t} was other than {p}?",
    ),
    "share_rest_due": (
        "what percentage of {t} is not due in {p}?",
        "what portion of {t} is payable in other years than {p}?",
    ),
    "share_rest_price": (
        "what percentage of {t} was not {p}?",
        "what portion of {t} was other than {p}?",
    ),
    "share_rest_facility": (
        "what percentage of {t} was available in {b}?",
        "what portion of {t} was not drawn?",
    ),
    "share_two": (
        "what percentage of {t} was {p} and {q} in {b}?",
        "in {b} , what portion of {t} was {p} and {q} combined?",
        "{p} and {q} together were what percent of {t} in {b}?",
    ),
    "share_two_due": (
        "what percentage of {t} is due in {p} and {q}?",
        "what portion of {t} is due in {p} and {q} combined?",
        "what percent of {t} will be paid in {p} and {q}?",
    ),
    "sum_due": (
        "how much is due in {p} and {q}?",
        "what is the total of the payments due in {p} and {q}?",
        "what amount of {t} is due in {p} and {q} combined?",
    ),
    "difference_due": (
        "what is the difference between the payments due in {p} and {q}?",
        "how much more is due in {p} than in {q}?",
    ),
    "ratio_due": (
        "what is the ratio of the payments due in {p} to those in {q}?",
        "payments due in {p} are how many times those due in {q}?",
    ),
    "greater_due": (
        "is more due in {p} than in {q}?",
        "are the payments due in {p} greater than those in {q}?",
    ),
    "share_change": (
        "what was the change in {p} as a percentage of {t} from {a} to {b}?",
        "by how much did the share of {p} in {t} change from {a} to {b}?",
        "what is the difference in the percentage of {t} that was {p} between {a} and {b}?",
    ),
}
