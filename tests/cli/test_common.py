"""What a run says when it has ended."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from fintune.cli.common import optional_config_arguments
from fintune.pipeline import steps
from support.command import fintune
from support.fake_steps import Chain


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """A run of files in place of models, which merges and exports."""
    chain = Chain(tmp_path / "my runs")
    chain.acts["merge"] = lambda _, __, folder: (folder / "config.json").write_text("{}")

    def export(_, __, folder):
        for name in ("chat-Q4_K_M.gguf", "chat-imatrix.gguf"):
            (folder / name).write_bytes(b"GGUF")

    chain.acts["export"] = export
    made = [chain.step(name, (), ()) for name in ("merge", "export", "report")]
    monkeypatch.setattr(steps, "build_steps", lambda _: made)
    return chain


def run(chain, source, *words):
    rows = chain.runs.parent / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    config = chain.runs.parent / "chat.yaml"
    config.write_text(json.dumps({"data": source, "run": {"dir": str(chain.runs)}}))
    done = fintune("run", config, *words)
    assert done.status == 0, done.err
    return [line for line in done.out.splitlines() if line]


def test_run_of_conversations_ends_with_its_files(chain):
    source = {"source": "chat", "sources": [str(chain.runs.parent / "rows.jsonl")]}
    folder = chain.runs / "chat"
    lines = [
        f"Merged model: {folder / 'merge'}",
        f"GGUF: {folder / 'export' / 'chat-Q4_K_M.gguf'}",
        f"To serve it: fintune serve '{folder}'",
    ]
    page = f"The run's page: {folder / 'report' / 'index.html'}"
    assert run(chain, source) == [*lines, page]
    assert run(chain, source) == [*lines, page], "up to date"
    assert run(chain, source, "--only", "report") == [page]


def test_run_with_scores_ends_with_its_page(chain):
    assert run(chain, {}) == [f"The run's page: {chain.runs / 'chat' / 'report' / 'index.html'}"]


@pytest.mark.parametrize(
    ("first", "is_override"),
    [
        ("export.imatrix=/tmp/x.gguf", True),
        ("export.types=[F16]", True),
        ("predict.endpoint=http://127.0.0.1:8080//v1#m", True),
        ("run.yaml", False),
        ("runs/lr=1e-4/run.yaml", False),
        ("runs/lr=1e-4.yaml", False),
    ],
)
def test_is_override_looks_at_the_key_only(first, is_override):
    @click.command()
    @optional_config_arguments
    def command(config, overrides):
        found.append((config, overrides))

    found = []
    command.main([first, "a.b=1"], standalone_mode=False)
    command.main([], standalone_mode=False)
    whole = (None, (first, "a.b=1")) if is_override else (Path(first), ("a.b=1",))
    assert found == [whole, (None, ())]
