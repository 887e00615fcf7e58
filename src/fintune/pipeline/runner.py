"""The order of stages: what a run will do is worked out and checked before any work starts.

A step is up to date when its options, the user's files behind them and the outputs of the steps before it are what
they were. An option or file that the user changed stops the run with its name, since the old result may be dear; a
step whose inputs were made anew in this run is made anew without asking.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.text import Text

from fintune.config import Config
from fintune.config.load import effective
from fintune.errors import ArtifactError
from fintune.manifest import Facts, Key, Manifest, Outcome, Slot, describe, digests
from fintune.pipeline.step import Selection, Step, check_names, left_out_with, matches, selected
from fintune.util.console import console, say, stage
from fintune.util.disk import require_space
from fintune.util.memory import peak_memory_bytes, release_memory, reset_peak_memory
from fintune.util.system import checkout_commit, installed_versions, machine_facts
from fintune.util.text import format_duration

_NOTHING_TO_DO = ("skipped", "up to date")
_ANOTHER_DISK = "set run.dir to a folder on another disk"
_DONE = {"prepare": "prepared", "train": "trained", "merge": "merged", "export": "exported"}


class Pipeline:
    """The steps of one run's folder."""

    def __init__(self, config: Config, steps: Sequence[Step], selection: Selection, *, called: str = "CONFIG") -> None:
        """``called`` is what the user wrote for the configuration, for commands in messages."""
        check_names(steps, selection)
        self.called = called
        self.config, self.steps, self.selection = config, steps, selection
        self.chosen = selected(steps, selection)
        self.left_out = left_out_with(steps, selection)
        self.redone = {step.name for step in steps if matches(step, selection.redo)}
        if left_out := self.redone - self.chosen:
            raise ArtifactError(
                f"--redo asks for {', '.join(sorted(left_out))}, which --skip, --from or --only leaves out",
                hint="drop one of the two",
            )

    def slot(self, name: str) -> Slot:
        """Where a step's result lies."""
        return Slot(self.config.folder, name)

    def manifest(self, name: str) -> Manifest | None:
        """A step's manifest; None where there is none, or none that can be read and the step is to be made anew.

        Raises:
            ArtifactError: A manifest that cannot be read.
        """
        try:
            return self.slot(name).manifest()
        except ArtifactError:
            if name in self.redone:
                return None
            raise

    def key(self, step: Step) -> Key:
        """What the step's result will depend on; an input that has no result yet counts as an empty digest."""
        manifests = {name: self.manifest(name) for name in self._present_inputs(step)}
        inputs = {name: manifest.digest if manifest is not None else "" for name, manifest in manifests.items()}
        options = effective(step.view(self.config), step.options)
        return Key(step=step.name, options=options, sources=step.sources(self.config), inputs=inputs)

    def preview(self) -> list[tuple[Step, str]]:
        """Every step with what will be done about it, in words, without touching anything.

        Raises:
            ArtifactError: A changed option, or a skipped step whose result is needed and not there.
            FintuneError: Whatever a step's ``check`` refuses.
        """
        lines, remade = [], set[str]()
        for step in self.steps:
            if step.name not in self.chosen:
                there = self.manifest(step.name) is not None
                reason = f", as {self.left_out[step.name]} is" if step.name in self.left_out else ""
                lines.append((step, f"skipped{reason}" + (", its result is there" if there else "")))
                continue
            for name in step.inputs:
                if name not in self.chosen and self.manifest(name) is None and not self._optional(step):
                    raise self._missing(name)
            if step.inputs and not self._present_inputs(step):
                raise ArtifactError(
                    f"{step.name} has nothing to read: no stage has a result in {self.config.folder}",
                    hint="make one first: fintune run CONFIG",
                )
            word = self._foreseen(step, bool(remade & set(step.inputs)))
            if word != "up to date":
                step.check(self.config)
                remade.add(step.name)
            lines.append((step, word))
        return lines

    def _missing(self, name: str) -> ArtifactError:
        verb = name.partition("/")[0]
        done = _DONE.get(name)
        what = f"nothing is {done} in {self.config.folder}" if done else f"{self.config.folder} has no result of {name}"
        first = f"fintune {verb} {self.called}" if name == verb else f"fintune run {self.called} --only {name}"
        return ArtifactError(what, hint=f"{first} first, or fintune run {self.called} for everything")

    def _foreseen(self, step: Step, inputs_remade: bool) -> str:
        slot = self.slot(step.name)
        finished = self.manifest(step.name) is not None
        if step.name in self.redone or not (finished or slot.unfinished()):
            # Nothing to compare with, so the model need not be fetched to say so.
            self._refuse_foreign(step)
            return "run anew, as asked" if step.name in self.redone else "run"
        word = self._word(step, self.key(step))
        if inputs_remade:
            return "run, if what it reads changes" if finished else "run"
        return word

    def run(self) -> list[Outcome]:
        """Do what :meth:`preview` says.

        Raises:
            ArtifactError: As ``preview``, or the run's folder is in use.
            FintuneError: Whatever a stage refuses.
        """
        if not self.config.folder.exists():
            self._require_space(self.preview())  # what is refused leaves no folder behind
        with lock(self.config.folder):
            for step in self.steps:
                self.slot(step.name).settle()
            plan = self.preview()
            self._require_space(plan)
            num_work = sum(not word.startswith(_NOTHING_TO_DO) for _, word in plan)
            console.print(Text(f"{self.config.folder}: {num_work} of {len(plan)} stages to do"), soft_wrap=True)
            return [self._do(step) for step in self.steps]

    def _require_space(self, plan: Sequence[tuple[Step, str]]) -> None:
        """Hours into a run is a bad time to learn that its last stage does not fit, or cannot be done at all."""
        work = [step for step, word in plan if not word.startswith(_NOTHING_TO_DO)]
        needed = sum(step.needed_bytes(self.config) for step in work)
        require_space(self.config.folder, needed, f"the run's {len(work)} stages", way_out=_ANOTHER_DISK)

    def _do(self, step: Step) -> Outcome:
        slot = self.slot(step.name)
        if step.name not in self.chosen:
            if step.name in self.left_out:
                self._tell(step, {}, f"skipped, as {self.left_out[step.name]} is", style="dim")
            return Outcome(step.name, "skipped", 0.0, {})
        key = self.key(step)
        word = self._word(step, key)
        finished = self.manifest(step.name)
        if word == "up to date":
            assert finished is not None
            self._tell(step, finished.facts, word, style="dim")
            return Outcome(step.name, word, finished.seconds, finished.facts)
        needed = step.needed_bytes(self.config)
        require_space(self.config.folder, needed, step.name, way_out=_ANOTHER_DISK)
        if word != "run":
            say(f"{step.name}: {word}")
        # Beside a finished result, unfinished work is that of an interrupted --redo, which the same command takes up.
        anew = step.name in self.redone and finished is None
        folder = slot.begin(key, resume=step.resumes and not anew, may_change=step.may_change)
        reset_peak_memory()
        started = time.monotonic()
        inputs = {name: self.slot(name).folder for name in self._present_inputs(step)}
        with stage(step.name):
            facts = step.run(step.view(self.config), inputs, folder)
        release_memory()  # a model of the stage before must not count against the next
        seconds = time.monotonic() - started
        manifest = Manifest(
            key=key,
            fingerprint=key.fingerprint,
            outputs=digests(folder),
            facts=facts,
            versions=installed_versions(),
            commit=checkout_commit(),
            machine=machine_facts(),
            seed=self.config.run.seed,
            finished=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            seconds=round(seconds, 2),
            peak_memory_bytes=peak_memory_bytes(),
        )
        slot.finish(manifest)
        self._tell(step, facts, format_duration(seconds) if seconds >= 1 else "")
        return Outcome(step.name, "done", seconds, facts)

    def _tell(self, step: Step, facts: Facts, what: str, style: str = "") -> None:
        """One line a stage: its name, the figure that matters most, and how it came to be."""
        name = step.name.ljust(max(len(step.name) for step in self.steps))
        told = ", ".join(part for part in (str(facts.get("summary", "")), what) if part)
        console.print(Text.assemble((name, "bold"), "  ", told, style=style), soft_wrap=True)

    def _word(self, step: Step, key: Key) -> str:
        """What is to be done about a step whose inputs all stand still.

        Raises:
            ArtifactError: The user changed what its result, or its unfinished work, was made with.
        """
        if step.name in self.redone:
            return "run anew, as asked"
        slot = self.slot(step.name)
        state, changes = slot.state(key, step.may_change)
        unfinished = slot.unfinished() if step.resumes and state == "unfinished" else None
        wanted = key.taking(unfinished, step.may_change)
        if unfinished is not None:
            changes = wanted.differences(unfinished)
        if changes and step.ahead_of in self.redone:
            return f"run anew, as {step.ahead_of} is"
        if changes:
            made = "was made" if unfinished is None else "is unfinished work, made"
            raise ArtifactError(
                f"{slot.folder} {made} with other settings: {describe(changes)}",
                hint=f"--redo {step.ahead_of or step.name} makes it anew, run.name=OTHER keeps it",
            )
        if state == "inputs changed":
            return "run anew, its inputs changed"
        if state == "up to date":
            return state
        return step.resume_word(slot.work) if unfinished == wanted else "run"

    def _refuse_foreign(self, step: Step) -> None:
        """What someone else laid under a step's name is not ours to delete."""
        folder = self.slot(step.name).folder
        if step.name not in self.redone and folder.exists():
            raise ArtifactError(
                f"{folder} is in the way: it holds no manifest.json, so no finished stage made it",
                hint=f"move it elsewhere, or --redo {step.name} replaces it",
            )

    def _present_inputs(self, step: Step) -> list[str]:
        if not self._optional(step):
            return list(step.inputs)
        return [name for name in step.inputs if name in self.chosen or self.manifest(name) is not None]

    @staticmethod
    def _optional(step: Step) -> bool:
        """The report shows what there is, and so does the card of a push; every other stage needs all its inputs."""
        return step.verb in ("report", "publish")


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process.

    Raises:
        ArtifactError: Another process holds it, or it cannot be a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        in_place = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "a file is in its place" if in_place else (error.strerror or str(error)).lower()
        raise ArtifactError(
            f"{folder} cannot be made: {reason}", hint="set run.dir to another folder, or run.name to another name"
        ) from None
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ArtifactError(
            f"{folder} is in use by another process", hint="wait for it, or set run.name to another name"
        ) from None
