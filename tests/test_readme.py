"""What README and docs say is executed: the two commands, every fintune line, every link and every folder named."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT
from support.tiny import make_tiny_model

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FINQA = ROOT.parent / "shared" / "finqa"


def commands(page: Path) -> list[str]:
    """The lines of a page's code blocks that call fintune with a configuration."""
    blocks = re.findall(r"```\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if re.match(r"fintune \w+ configs/", line.strip())]


ALL_COMMANDS = sorted({line for page in PAGES for line in commands(page)})


def run(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True, check=False)


def test_the_pages_hold_commands_to_check():
    assert len(ALL_COMMANDS) >= 2


@pytest.mark.parametrize("line", ALL_COMMANDS)
def test_a_documented_command_is_understood(line, tmp_path):
    model = make_tiny_model(tmp_path / "model")
    verb, config, *overrides = shlex.split(line.split("#")[0])[1:]
    given = ("model.name=", "data.train=", "data.eval=", "data.sources=")
    overrides = [word for word in overrides if not word.startswith(given)]
    if "chat" in config or "preference" in config:
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"prompt": "Hello?", "completion": "Hello.", "chosen": "Hello.", "rejected": "No."}\n')
        overrides += [f"data.sources={rows}"]
    if "finqa" in config:
        if not FINQA.is_dir():
            pytest.skip("the real FinQA files are not here")
        overrides += [f"data.train={FINQA / 'train.json.gz'}", f"data.eval={FINQA / 'dev.json.gz'}"]
    overrides += [f"model.name={model}", f"run.dir={tmp_path}"]
    done = run(sys.executable, "-m", "fintune.cli.main", verb, config, *overrides, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "prepare" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_structure_names_every_room_and_file_at_the_top():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    structure = text.split("## Structure")[1].split("```")[1]
    package = ROOT / "src" / "fintune"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"^  ([a-z]+)/", structure, re.MULTILINE)) == rooms
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(re.findall(r"\b(\w+\.py)\b", structure)) == files


def test_the_rooms_table_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", text):
        assert (ROOT / "src" / "fintune" / name).is_file() or (ROOT / name).is_file(), name


def test_the_site_builds_without_a_broken_link(tmp_path):
    done = run(sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "results" / "train_speed_h100.json").is_file()


def test_ci_runs_the_readmes_test_command():
    assert "exec make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert run("make", "--dry-run", "test", "demo").returncode == 0


def test_the_lock_pins_every_package_and_names_no_address():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+(; python_version (<|>=) \"3\.11\")?", pin) for pin in pins)
    assert "torch==2.13.0" in pins


@pytest.mark.slow
@pytest.mark.skipif(not sys.executable.startswith(str(ROOT / ".venv")), reason="make test runs this from .venv")
def test_make_demo_runs_the_chain_and_prints_where_the_page_lies(tmp_path):
    small = "data.statements.train_companies=8 data.max_eval_samples=2 train.max_steps=2 predict.max_new_tokens=8"
    done = run("make", "demo", f"ARGS={small} run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    page = tmp_path / "demo" / "report" / "index.html"
    assert page.is_file()
    assert str(page) in done.stdout
