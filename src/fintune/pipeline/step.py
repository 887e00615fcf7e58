"""What a step of a run is, and which of the steps the user asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fintune.config import Config
from fintune.errors import ArtifactError
from fintune.manifest import Facts

Stage = Callable[[Config, Mapping[str, Path], Path], Facts]


@dataclass(frozen=True)
class Step:
    """One stage of a run, or one of its variants.

    Attributes:
        name: ``train`` or ``predict/merged``; the folder below the run's.
        inputs: Steps whose folders it reads.
        options: Prefixes of the options that can change its result.
        run: The stage.
        sources: Fingerprints of the user's files and model that it reads, by option name.
        needed_bytes: Disk that it will take, predicted.
        resumes: Whether it goes on with an earlier, unfinished attempt.
        resume_word: How it goes on with what lies in the folder of that attempt; ``run`` where it begins anew.
        check: Refuses at once what is sure to fail later, such as a data file that is not there; loads nothing.
        about: A step whose results this one is about: where the user skips that one, this one is left out with it.
        view: The options as this step has them, where it is one of several that differ in an option.
        may_change: Options that say how the work is done and at most tip near-ties of the result: with another value an
            unfinished attempt goes on, and what is finished stays.
    """

    name: str
    inputs: tuple[str, ...]
    options: tuple[str, ...]
    run: Stage
    sources: Callable[[Config], dict[str, str]]
    needed_bytes: Callable[[Config], int]
    resumes: bool = False
    resume_word: Callable[[Path], str] = lambda _: "resume"
    check: Callable[[Config], None] = lambda _: None
    about: str | None = None
    view: Callable[[Config], Config] = lambda config: config
    may_change: tuple[str, ...] = ()

    @property
    def verb(self) -> str:
        """``predict`` of ``predict/merged``."""
        return self.name.partition("/")[0]

    @property
    def ahead_of(self) -> str | None:
        """The step that this one checks beforehand: it is about that one, and reads nothing that this run made."""
        return None if self.inputs else self.about


@dataclass(frozen=True)
class Selection:
    """What of the pipeline the user asked for; names are verbs (``predict``) or steps (``predict/merged``)."""

    skip: Collection[str] = ()
    start: str | None = None
    only: Collection[str] = ()
    redo: Collection[str] = ()


def matches(step: Step, names: Collection[str]) -> bool:
    """Whether a step is meant by one of the names."""
    return step.name in names or step.verb in names


def check_names(steps: Sequence[Step], selection: Selection) -> None:
    """Refuse a name that is no step.

    Raises:
        ArtifactError: With the names that there are.
    """
    known = {step.name for step in steps} | {step.verb for step in steps}
    asked = [*selection.skip, *selection.only, *selection.redo, *([selection.start] if selection.start else [])]
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            there = f"there are {', '.join(step.name for step in steps)}"
            raise ArtifactError(f"{name!r} is no stage of this run", hint=f"did you mean {near[0]}?" if near else there)


def left_out_with(steps: Sequence[Step], selection: Selection) -> dict[str, str]:
    """Steps that the user did not name, but whose reason is skipped: name -> that reason."""
    skipped = {step.name for step in steps if matches(step, selection.skip)}
    return {
        step.name: step.about
        for step in steps
        if step.about in skipped and step.name not in skipped and not matches(step, selection.only)
    }


def selected(steps: Sequence[Step], selection: Selection) -> set[str]:
    """Names of the steps to look at; the others are taken as they lie."""
    chosen = {step.name for step in steps if not matches(step, selection.skip)}
    chosen -= left_out_with(steps, selection).keys()
    if selection.only:
        chosen &= {step.name for step in steps if matches(step, selection.only)}
    if selection.start is not None:
        first = next(i for i, step in enumerate(steps) if matches(step, [selection.start]))
        chosen &= {step.name for step in steps[first:]}
    return chosen
