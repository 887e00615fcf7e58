"""FinQA files divided anew, so that no report or company stands in two of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fintune.finqa.identity import Level, group_of
from fintune.records import FinQARecord


@dataclass(frozen=True)
class Disjoint:
    """The new splits.

    Attributes:
        splits: Records by the name of the file; none is lost but those of ``num_repeated``.
        num_before: Records that each had.
        num_came: Records of each that stood in another file before.
        num_repeated: Records left out because an earlier one has their id.
        groups: Reports or companies of each, sorted.
    """

    splits: dict[str, list[FinQARecord]]
    num_before: dict[str, int]
    num_came: dict[str, int]
    num_repeated: int = 0
    groups: dict[str, list[str]] = field(default_factory=dict)


def divide(splits: Mapping[str, Sequence[FinQARecord]], by: Level) -> Disjoint:
    """Give every report or company to one split.

    One that stands in a single split stays there. Of the others, the largest first, each goes to that of its splits
    that is farthest below the number of records that it had. No chance is involved.

    Args:
        splits: Records by name.
        by: What must not stand in two splits.
    """
    seen: set[str] = set()
    origin: dict[str, str] = {}
    groups: dict[str, list[FinQARecord]] = defaultdict(list)
    num_repeated = 0
    for name, records in splits.items():
        for record in records:
            if record.id in seen:
                num_repeated += 1
                continue
            seen.add(record.id)
            origin[record.id] = name
            groups[group_of(record.id, by)].append(record)
    homes = {group: list(dict.fromkeys(origin[record.id] for record in records)) for group, records in groups.items()}
    place = {group: names[0] for group, names in homes.items() if len(names) == 1}
    size = Counter(dict.fromkeys(splits, 0))
    for group, name in place.items():
        size[name] += len(groups[group])
    aim = Counter(origin.values())
    torn = sorted((group for group in groups if group not in place), key=lambda group: (-len(groups[group]), group))
    for group in torn:
        place[group] = min(homes[group], key=lambda name: size[name] / aim[name])
        size[place[group]] += len(groups[group])
    divided: dict[str, list[FinQARecord]] = {name: [] for name in splits}
    for group, records in groups.items():
        divided[place[group]] += records
    return Disjoint(
        divided,
        num_before={name: len(records) for name, records in splits.items()},
        num_came={n: sum(origin[record.id] != n for record in records) for n, records in divided.items()},
        num_repeated=num_repeated,
        groups={name: sorted(group for group in place if place[group] == name) for name in splits},
    )
