"""Small steps for tests of the pipeline: each writes one file and remembers that it ran."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from fintune.config import Config
from fintune.config.load import effective, load
from fintune.pipeline.runner import Pipeline
from fintune.pipeline.step import Selection, Step

DECODING = ("predict.max_new_tokens", "predict.batch_size")
Act = Callable[[Config, Mapping[str, Path], Path], None]


class Chain:
    """prepare -> train -> predict/base, predict/merged -> report, with files in place of models.

    Attributes:
        ran: Names of the steps that ran, in order.
        acts: What a step does after it wrote its file; an exception here is an interruption.
        source: Content that `prepare` reads, as a user's file would be.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.ran: list[str] = []
        self.acts: dict[str, Act] = {}
        self.needed: dict[str, int] = {}
        self.source = "data"

    def config(self, *overrides: str) -> Config:
        return load(None, [f"run.dir={self.runs}", "run.name=trial", *overrides]).config

    @property
    def folder(self) -> Path:
        return self.runs / "trial"

    def steps(self) -> list[Step]:
        prepare = self.step("prepare", (), ("data", "run.seed"))
        return [
            replace(prepare, sources=lambda _: {"data.train": self.source}),
            self.step("train", ("prepare",), ("train",), resumes=True),
            replace(self.step("predict/base", ("prepare",), DECODING, resumes=True), may_change=DECODING[1:]),
            replace(self.step("predict/merged", ("prepare", "train"), DECODING, resumes=True), may_change=DECODING[1:]),
            self.step("report", ("prepare", "train", "predict/base", "predict/merged"), ()),
        ]

    def pipeline(
        self,
        *overrides: str,
        skip: tuple[str, ...] = (),
        start: str | None = None,
        only: tuple[str, ...] = (),
        redo: tuple[str, ...] = (),
    ) -> Pipeline:
        return Pipeline(self.config(*overrides), self.steps(), Selection(skip, start, only, redo))

    def run(self, *overrides: str, **selection: object) -> list[str]:
        """Run the selection; names of the steps that really ran."""
        self.ran.clear()
        self.pipeline(*overrides, **selection).run()  # type: ignore[arg-type]
        return list(self.ran)

    def preview(self, *overrides: str, **selection: object) -> dict[str, str]:
        return {s.name: word for s, word in self.pipeline(*overrides, **selection).preview()}  # type: ignore[arg-type]

    def snapshot(self) -> dict[str, tuple[str, int]]:
        """Every path below the runs with its content and time of change."""
        return {
            str(path.relative_to(self.runs)): (path.read_text() if path.is_file() else "", path.stat().st_mtime_ns)
            for path in sorted(self.runs.rglob("*"))
        }

    def step(self, name: str, inputs: tuple[str, ...], options: tuple[str, ...], *, resumes: bool = False) -> Step:
        """A step that writes one file."""

        def run(config: Config, inputs: Mapping[str, Path], folder: Path) -> dict[str, object]:
            self.ran.append(name)
            read = {step: (path / "out.json").read_text() for step, path in inputs.items()}
            values = effective(config, options)
            (folder / "out.json").write_text(json.dumps([name, read, values, self.source], sort_keys=True))
            if name in self.acts:
                self.acts[name](config, inputs, folder)
            return {"summary": f"{name} made"}

        return Step(name, inputs, options, run, lambda _: {}, lambda _: self.needed.get(name, 0), resumes=resumes)
