"""A step of a run, and the selection of steps that the user asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fintune.config import Config
from fintune.errors import ArtifactError
from fintune.manifest import Facts

Stage = Callable[[Config, Mapping[str, Path], Path], Facts]
"""A stage: (configuration, folders of its inputs by step name, folder to write into) -> facts for the manifest."""


@dataclass(frozen=True)
class Step:
    """A stage of a run, or one of its variants.

    Attributes:
        name: ``train`` or ``predict/merged``; also the folder below the run's.
        inputs: Names of the steps whose folders it reads.
        options: Prefixes of the options that can change its result.
        run: The stage.
        sources: Returns the fingerprints of the user's files and models that it reads, by option name.
        needed_bytes: Predicts the disk space that it needs.
        resumes: Whether it can resume an interrupted attempt.
        resume_word: Describes how it resumes from an interrupted attempt's folder; ``run`` if it starts over.
        check: Refuses early what is sure to fail later, such as a missing data file; it loads nothing.
        about: A step whose result this one examines. If the user skips that step, this one is skipped, too.
        view: Returns the configuration as this step reads it, if it is one of several that differ in an option.
        is_cheap: Whether a damaged result is made again without asking: that takes minutes and gives the same bytes.
        may_change: Options that say how the work is done and at most decide near-ties of the result. With another value
            an interrupted attempt resumes, and a finished result stays.
    """

    name: str
    inputs: tuple[str, ...]
    options: tuple[str, ...]
    run: Stage
    sources: Callable[[Config], dict[str, str]] = lambda _: {}
    needed_bytes: Callable[[Config], int] = lambda _: 1_000_000
    resumes: bool = False
    resume_word: Callable[[Path], str] = lambda _: "resume"
    check: Callable[[Config], None] = lambda _: None
    about: str | None = None
    view: Callable[[Config], Config] = lambda config: config
    is_cheap: bool = False
    may_change: tuple[str, ...] = ()

    @property
    def verb(self) -> str:
        """The part before the slash: ``predict`` for ``predict/merged``."""
        return self.name.partition("/")[0]

    @property
    def reads_what_exists(self) -> bool:
        """The report and the card of a push show the results that exist; every other stage needs all its inputs."""
        return self.verb in ("report", "publish")

    @property
    def checked_step(self) -> str | None:
        """The step that this one checks beforehand: it examines that step, and reads nothing that the run wrote."""
        return None if self.inputs else self.about


@dataclass(frozen=True)
class Selection:
    """The part of the pipeline that the user asked for.

    Every name is a verb (``predict``) or a step (``predict/merged``).

    Attributes:
        skip: Steps to leave out.
        start: The first step to run.
        only: The only steps to run; empty for all.
        redo: Steps to rerun even if they are up to date.
    """

    skip: Collection[str] = ()
    start: str | None = None
    only: Collection[str] = ()
    redo: Collection[str] = ()


def matches(step: Step, names: Collection[str]) -> bool:
    """Whether one of the names means the step."""
    return step.name in names or step.verb in names


def check_selection(steps: Sequence[Step], selection: Selection) -> None:
    """Refuse a name that is no step.

    Raises:
        ArtifactError: A name is unknown; the hint has the nearest one, or all.
    """
    known = {step.name for step in steps} | {step.verb for step in steps}
    asked = [*selection.skip, *selection.only, *selection.redo, *([selection.start] if selection.start else [])]
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            stages = ", ".join(step.name for step in steps)
            hint = f"did you mean {near[0]}?" if near else f"the stages are {stages}"
            if name in ("predict", "score"):
                hint = "it measures no answers, because its data are conversations or predict.models is empty"
            raise ArtifactError(f"{name!r} is no stage of this run", hint=hint)


def skipped_with_others(steps: Sequence[Step], selection: Selection) -> dict[str, str]:
    """Return the steps that are skipped because the step that they examine is: name -> the examined step."""
    skipped = {step.name for step in steps if matches(step, selection.skip)}
    return {
        step.name: step.about
        for step in steps
        if step.about in skipped and step.name not in skipped and not matches(step, selection.only)
    }


def select_steps(steps: Sequence[Step], selection: Selection) -> set[str]:
    """Return the names of the steps to run or to find up to date; the others stay untouched."""
    chosen = {step.name for step in steps if not matches(step, selection.skip)}
    chosen -= skipped_with_others(steps, selection).keys()
    if selection.only:
        chosen &= {step.name for step in steps if matches(step, selection.only)}
    if selection.start is not None:
        first = next(i for i, step in enumerate(steps) if matches(step, [selection.start]))
        chosen &= {step.name for step in steps[first:]}
    return chosen
