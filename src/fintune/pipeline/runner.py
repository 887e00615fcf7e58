"""The runner: works out what a run will do, checks it, and then does it step by step.

A step is up to date if its options, the user's files and the outputs of its input steps are unchanged. If the user
changed an option or a file, the run stops and names it, since the old result may have cost hours. If an input step was
rerun in this run with another result, the step is rerun without asking.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence

from rich.text import Text

from fintune.config import Config
from fintune.config.load import effective
from fintune.errors import ArtifactError
from fintune.manifest import Facts, Key, Manifest, Outcome, Slot, hash_files
from fintune.pipeline.run_folder import lock_run
from fintune.pipeline.step import Selection, Step, check_selection, matches, select_steps, skipped_with_others
from fintune.pipeline.steps import build_steps
from fintune.util.console import console, say, stage
from fintune.util.disk import require_space
from fintune.util.memory import peak_memory_bytes, release_memory, reset_peak_memory
from fintune.util.system import checkout_commit, installed_versions, machine_facts
from fintune.util.text import format_duration

_NOTHING_TO_DO = ("skipped", "up to date")
_AS_ASKED = "rerun, as asked"
_ANOTHER_DISK = "set run.dir to a folder on another disk"
_DONE = {"prepare": "prepared", "train": "trained", "merge": "merged", "export": "exported"}


def run(config: Config, selection: Selection | None = None) -> list[Outcome]:
    """Run a configuration: every stage that is not up to date.

    Args:
        config: From :func:`fintune.load_config`.
        selection: The part of the run that is wanted; all of it if None.

    Returns:
        The outcome of every step, in order. Its ``facts`` are what the stage reported.

    Raises:
        FintuneError: A stage refused, or an option changed since a finished stage was made.
    """
    return Pipeline(config, build_steps(config), selection or Selection()).run()


class Pipeline:
    """The steps of one run's folder."""

    def __init__(self, config: Config, steps: Sequence[Step], selection: Selection, *, called: str = "CONFIG") -> None:
        """Select steps.

        Args:
            config: The run's configuration.
            steps: All steps of the run, inputs before the steps that read them.
            selection: What the user asked for.
            called: What the user typed for the configuration, for commands in messages.

        Raises:
            ArtifactError: The selection names an unknown step, or asks to rerun a step that it leaves out.
        """
        check_selection(steps, selection)
        self.config, self.steps, self.called = config, steps, called
        self.chosen = select_steps(steps, selection)
        self.skipped_with = skipped_with_others(steps, selection)
        self.redone = {step.name for step in steps if matches(step, selection.redo)}
        if conflicts := self.redone - self.chosen:
            raise ArtifactError(
                f"--redo asks for {', '.join(sorted(conflicts))}, which --skip, --from or --only leaves out",
                hint="drop one of the two",
            )

    def slot(self, name: str) -> Slot:
        """Return the folder of a step."""
        return Slot(self.config.folder, name)

    def manifest(self, name: str) -> Manifest | None:
        """Return a step's manifest, or None if there is none, or an unreadable one of a step that will be rerun.

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
        """Return what the step's result will depend on; an input without a result counts as an empty digest."""
        manifests = {name: self.manifest(name) for name in self._present_inputs(step)}
        inputs = {name: manifest.digest if manifest is not None else "" for name, manifest in manifests.items()}
        options = effective(step.view(self.config), step.options)
        return Key(step=step.name, options=options, sources=step.sources(self.config), inputs=inputs)

    def preview(self) -> list[tuple[Step, str]]:
        """Return every step with a phrase that says what will be done about it. Touches nothing.

        Raises:
            ArtifactError: An option changed, a result is damaged, or a skipped step is needed and has no result.
            FintuneError: A step's ``check`` refuses.
        """
        lines, rerun = [], set[str]()
        for step in self.steps:
            if step.name not in self.chosen:
                is_kept = self.manifest(step.name) is not None
                lines.append((step, self._skipped(step) + (", its result is kept" if is_kept else "")))
                continue
            self._require_inputs(step)
            action = self._predict_action(step, bool(rerun & set(step.inputs)))
            if action != "up to date":
                step.check(self.config)
                rerun.add(step.name)
            lines.append((step, action))
        return lines

    def _skipped(self, step: Step) -> str:
        return f"skipped, as {self.skipped_with[step.name]} is" if step.name in self.skipped_with else "skipped"

    def _require_inputs(self, step: Step) -> None:
        run = f"fintune run {self.called}"
        for name in step.inputs if not step.reads_what_exists else ():
            if name not in self.chosen and self.manifest(name) is None:
                done, folder = _DONE.get(name), self.config.folder
                first = f"{run} --only {name}" if "/" in name else f"fintune {name} {self.called}"
                raise ArtifactError(
                    f"nothing is {done} in {folder}" if done else f"{folder} has no result of {name}",
                    hint=f"{first} first, or {run} for everything",
                )
        if step.inputs and not self._present_inputs(step):
            raise ArtifactError(
                f"{step.name} has nothing to read: no stage has a result in {self.config.folder}",
                hint=f"run the stages first: {run}",
            )

    def _predict_action(self, step: Step, are_inputs_rerun: bool) -> str:
        slot = self.slot(step.name)
        is_finished = self.manifest(step.name) is not None
        if step.name in self.redone:
            return _AS_ASKED
        if not (is_finished or slot.unfinished()):
            # There is nothing to compare with, so the model need not be fetched for an answer.
            if slot.folder.exists():
                raise ArtifactError(
                    f"{slot.folder} already exists and holds no manifest.json, so no finished stage wrote it",
                    hint=f"move it elsewhere, or replace it with --redo {step.name}",
                )
            return "run"
        action = self._action(step, self.key(step))
        if are_inputs_rerun:
            return "run, if its inputs change" if is_finished else "run"
        return action

    def run(self) -> list[Outcome]:
        """Do what :meth:`preview` announces.

        Raises:
            ArtifactError: As :meth:`preview`; or another process uses the run's folder.
            FintuneError: A stage refuses.
        """
        # A refusal leaves no folder, so a new run is checked before its folder is made.
        plan = None if self.config.folder.exists() else self._checked_plan()
        with lock_run(self.config.folder):
            if plan is None:
                for step in self.steps:
                    self.slot(step.name).finalize()
                plan = self._checked_plan()
            num_work = sum(not action.startswith(_NOTHING_TO_DO) for _, action in plan)
            console.print(Text(f"{self.config.folder}: {num_work} of {len(plan)} stages to do"), soft_wrap=True)
            return [self._do(step) for step in self.steps]

    def _checked_plan(self) -> list[tuple[Step, str]]:
        """Preview, and refuse a run that will not fit on the disk: its last stage may be hours away."""
        plan = self.preview()
        work = [step for step, action in plan if not action.startswith(_NOTHING_TO_DO)]
        needed = sum(step.needed_bytes(self.config) for step in work)
        require_space(self.config.folder, needed, f"the run's {len(work)} stages", way_out=_ANOTHER_DISK)
        return plan

    def _do(self, step: Step) -> Outcome:
        if step.name not in self.chosen:
            if step.name in self.skipped_with:
                self._print_line(step, {}, self._skipped(step), style="dim")
            return Outcome(step.name, "skipped", 0.0, {})
        slot, key, finished = self.slot(step.name), self.key(step), self.manifest(step.name)
        action = self._action(step, key)
        if action == "up to date" and finished is not None:
            self._print_line(step, finished.facts, action, style="dim")
            return Outcome(step.name, action, finished.seconds, finished.facts)
        require_space(self.config.folder, step.needed_bytes(self.config), step.name, way_out=_ANOTHER_DISK)
        inputs = {name: self.slot(name) for name in self._present_inputs(step)}
        for earlier in inputs.values():
            # Of weights, the page shows only the size, and a push compares what it sends.
            earlier.verify(lambda name: not (step.reads_what_exists and name.endswith((".safetensors", ".gguf"))))
        if action != "run":
            say(f"{step.name}: {action}")
        # Unfinished work beside a finished result belongs to an interrupted --redo; the same command resumes it.
        starts_over = step.name in self.redone and finished is None
        folder = slot.start(key, resume=step.resumes and not starts_over, may_change=step.may_change)
        reset_peak_memory()
        started = time.monotonic()
        with stage(step.name):
            facts = step.run(step.view(self.config), {name: slot.folder for name, slot in inputs.items()}, folder)
        release_memory()  # a model of this stage must not count against the next
        seconds = time.monotonic() - started
        outputs = hash_files(folder)
        manifest = Manifest(
            key=key,
            fingerprint=key.fingerprint,
            outputs=outputs,
            output_bytes={name: (folder / name).stat().st_size for name in outputs},
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
        self._print_line(step, facts, format_duration(seconds) if seconds >= 1 else "")
        return Outcome(step.name, "done", seconds, facts)

    def _print_line(self, step: Step, facts: Facts, what: str, style: str = "") -> None:
        """Print one line for a stage: its name, its most important figure, and what was done."""
        name = step.name.ljust(max(len(step.name) for step in self.steps))
        parts = ", ".join(part for part in (str(facts.get("summary", "")), what) if part)
        console.print(Text.assemble((name, "bold"), "  ", parts, style=style), soft_wrap=True)

    def _action(self, step: Step, key: Key) -> str:
        """Decide what to do about a step whose inputs are all final.

        Raises:
            ArtifactError: The user changed something that the result, or the unfinished work, was made with; or a
                result that takes long to make is damaged.
        """
        if step.name in self.redone:
            return _AS_ASKED
        slot = self.slot(step.name)
        state, changes = slot.state(key, step.may_change)
        unfinished = slot.unfinished() if step.resumes and state == "unfinished" else None
        resumable = key.with_values_of(unfinished, step.may_change)
        if unfinished is not None:
            changes = resumable.differences(unfinished)
        if changes and step.checked_step in self.redone:
            return f"rerun, as {step.checked_step} is"
        if changes:
            since = "it was made" if unfinished is None else "it was interrupted"
            raise ArtifactError(
                f"{slot.folder}: settings changed since {since}: {'; '.join(changes)}",
                hint=f"--redo {step.checked_step or step.name} reruns it, run.name=OTHER starts a new run",
            )
        if state == "inputs changed":
            return "rerun, its inputs changed"
        if state == "up to date":
            damage = slot.damage()
            if damage and not step.is_cheap:
                raise ArtifactError(damage, hint=f"put it back, or rerun the stage with --redo {step.name}")
            return f"rerun, as {damage}" if damage else state
        return step.resume_word(slot.work) if unfinished == resumable else "run"

    def _present_inputs(self, step: Step) -> list[str]:
        if not step.reads_what_exists:
            return list(step.inputs)
        return [name for name in step.inputs if name in self.chosen or self.manifest(name) is not None]
