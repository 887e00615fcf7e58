"""The order of stages: what a run will do is worked out and printed before any work starts.

A step is up to date when its options, the user's files behind them and the outputs of the steps before it are what
they were. An option or file that the user changed stops the run with its name, since the old result may be dear; a
step whose inputs were made anew in this run is made anew without asking.
"""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fintune import machine
from fintune.artifact import Facts, Key, Manifest, Outcome, Slot, State, describe, digests
from fintune.config import effective
from fintune.errors import ArtifactError
from fintune.options import Config
from fintune.progress import console

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
    """

    name: str
    inputs: tuple[str, ...]
    options: tuple[str, ...]
    run: Stage
    sources: Callable[[Config], dict[str, str]]
    needed_bytes: Callable[[Config], int]
    resumes: bool = False

    @property
    def verb(self) -> str:
        """``predict`` of ``predict/merged``."""
        return self.name.partition("/")[0]


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
            raise ArtifactError(
                f"{name!r} is no stage of this run", hint=f"there are {', '.join(s.name for s in steps)}"
            )


def selected(steps: Sequence[Step], selection: Selection) -> set[str]:
    """Names of the steps to look at; the others are taken as they lie."""
    chosen = {step.name for step in steps if not matches(step, selection.skip)}
    if selection.only:
        chosen &= {step.name for step in steps if matches(step, selection.only)}
    if selection.start is not None:
        first = next(i for i, step in enumerate(steps) if matches(step, [selection.start]))
        chosen &= {step.name for step in steps[first:]}
    return chosen


class Pipeline:
    """The steps of one run's folder."""

    def __init__(self, config: Config, steps: Sequence[Step], selection: Selection) -> None:
        check_names(steps, selection)
        self.config, self.steps, self.selection = config, steps, selection
        self.chosen = selected(steps, selection)

    def slot(self, name: str) -> Slot:
        """Where a step's result lies."""
        return Slot(self.config.folder, name)

    def key(self, step: Step) -> Key | None:
        """What the step's result will depend on; None while a step before it has no result yet."""
        inputs = {}
        for name in self._present_inputs(step):
            manifest = self.slot(name).manifest()
            if manifest is None:
                return None
            inputs[name] = manifest.digest
        options = effective(self.config, step.options)
        return Key(step=step.name, options=options, sources=step.sources(self.config), inputs=inputs)

    def preview(self) -> list[tuple[Step, str]]:
        """Every step with what will be done about it, in words, without touching anything.

        Raises:
            ArtifactError: A changed option, or a skipped step whose result is needed and not there.
        """
        lines, remade = [], set[str]()
        for step in self.steps:
            if step.name not in self.chosen:
                there = self.slot(step.name).manifest() is not None
                lines.append((step, "skipped" + (", its result is there" if there else "")))
                continue
            for name in step.inputs:
                if name not in self.chosen and self.slot(name).manifest() is None and not self._optional(step):
                    raise ArtifactError(
                        f"{step.name} needs {name}, which is left out and has no result in {self.config.folder}",
                        hint=f"run it first: fintune run CONFIG --only {name}",
                    )
            slot = self.slot(step.name)
            if slot.manifest() is None and slot.unfinished() is None:
                word = "run"  # nothing to compare with, so the model need not be fetched to say so
            elif remade & set(step.inputs):
                self._refuse_changed(step, self.key(step))
                word = "run"
            else:
                word = self._word(step, self.key(step))
            if word != "up to date":
                remade.add(step.name)
            lines.append((step, word))
        return lines

    def run(self) -> list[Outcome]:
        """Do what :meth:`preview` says.

        Raises:
            ArtifactError: As ``preview``, or the run's folder is in use.
            FintuneError: Whatever a stage refuses.
        """
        with lock(self.config.folder):
            self._require_space(self.preview())
            return [self._do(step) for step in self.steps]

    def _require_space(self, plan: Sequence[tuple[Step, str]]) -> None:
        """Hours into a run is a bad time to learn that its last stage does not fit, or cannot be done at all."""
        work = [step for step, word in plan if not word.startswith(("skipped", "up to date"))]
        needed = sum(step.needed_bytes(self.config) for step in work)
        machine.require_space(self.config.folder, needed, f"the run's {len(work)} stages")

    def _do(self, step: Step) -> Outcome:
        slot = self.slot(step.name)
        if step.name not in self.chosen:
            return Outcome(step.name, "skipped", 0.0, {})
        key = self.key(step)
        assert key is not None, "preview() has checked that every input has a result"
        word = self._word(step, key)
        if word == "up to date":
            manifest = slot.manifest()
            assert manifest is not None
            console.print(f"[dim]· {step.name}: up to date[/dim]")
            return Outcome(step.name, word, manifest.seconds, manifest.facts)
        needed = step.needed_bytes(self.config)
        machine.require_space(self.config.folder, needed, step.name)
        console.print(f"[bold]> {step.name}[/bold] [dim]{word}[/dim]")
        folder = slot.begin(key, resume=step.resumes)
        machine.reset_peak_memory()
        started = time.monotonic()
        inputs = {name: self.slot(name).folder for name in self._present_inputs(step)}
        facts = step.run(self.config, inputs, folder)
        gc.collect()  # a model of the stage before must not count against the next
        seconds = time.monotonic() - started
        manifest = Manifest(
            key=key,
            fingerprint=key.fingerprint,
            outputs=digests(folder),
            facts=facts,
            versions=machine.versions(),
            commit=machine.commit(),
            machine=machine.machine(),
            seed=self.config.run.seed,
            finished=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            seconds=round(seconds, 2),
            peak_memory_bytes=machine.peak_memory_bytes(),
        )
        slot.finish(manifest)
        console.print(f"  {step.name}: done in {seconds:.0f} s")
        return Outcome(step.name, "done", seconds, facts)

    def _word(self, step: Step, key: Key | None) -> str:
        """What is to be done about a step whose inputs all stand still."""
        if key is None:
            return "run"
        state: State = self.slot(step.name).state(key)[0]
        redo = matches(step, self.selection.redo)
        if state == "up to date" and not redo:
            return "up to date"
        if redo:
            return "run anew, as asked"
        self._refuse_changed(step, key)
        if state == "inputs changed":
            return "run anew, its inputs changed"
        return "resume" if state == "unfinished" and step.resumes else "run"

    def _refuse_changed(self, step: Step, key: Key | None) -> None:
        if key is None or matches(step, self.selection.redo):
            return
        slot = self.slot(step.name)
        state, changes = slot.state(key)
        unfinished = slot.unfinished()
        if state == "unfinished" and step.resumes and unfinished is not None and unfinished != key:
            changes = key.differences(unfinished)
        if changes:
            raise ArtifactError(
                f"{slot.folder} was made with other settings: {describe(changes)}",
                hint=f"--redo {step.name} makes it and what follows anew, run.name=OTHER keeps it",
            )

    def _present_inputs(self, step: Step) -> list[str]:
        if not self._optional(step):
            return list(step.inputs)
        return [name for name in step.inputs if name in self.chosen or self.slot(name).manifest() is not None]

    @staticmethod
    def _optional(step: Step) -> bool:
        """The report shows what there is; every other stage needs all its inputs."""
        return step.verb == "report"


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process.

    Raises:
        ArtifactError: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ArtifactError(
            f"{folder} is in use by another process", hint="wait for it, or set run.name to another name"
        ) from None
