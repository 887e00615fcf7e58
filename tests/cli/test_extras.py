"""The light install: what lacks a library says so in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from fintune.cli.main import EXTRAS, missing_extra
from support.paths import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

LIGHT = """
import contextlib, io, json, sys
from fintune.cli.main import EXTRAS

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from fintune.cli.main import main

told = []
for words in json.load(sys.stdin):
    sys.argv, err = ["fintune", *words], io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
    told.append([words[0], status, err.getvalue()])
print(json.dumps(told))
"""


def test_light_install_names_the_missing_extra(tiny_model, tmp_path):
    (tmp_path / "page.csv").write_text("name,2023\nrevenue,12\n")
    page = {"id": "A", "pre_text": [], "post_text": [], "table": [["", "2019"], ["cash", "12"]]}
    (tmp_path / "data.json").write_text(json.dumps([{**page, "qa": {"question": "what is cash?"}}]))
    (tmp_path / "run.yaml").write_text(f"model:\n  name: {tiny_model}\nrun:\n  dir: {tmp_path / 'runs'}\n")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(64))
    model, config, data = str(tiny_model), str(tmp_path / "run.yaml"), str(tmp_path / "data.json")
    page_of, out = ["--page", str(tmp_path / "page.csv")], str(tmp_path / "out.json")
    commands = [
        ["ask", model, "what fell?", *page_of],
        ["ask", str(tmp_path / "m.gguf"), "what fell?", *page_of],
        ["predict", "--model", model, "--data", data, "--out", out],
        ["inspect", config],
        ["run", config],
    ]
    words = [sys.executable, "-c", LIGHT]
    done = subprocess.run(words, input=json.dumps(commands), capture_output=True, text=True, check=True)
    for verb, status, err in json.loads(done.stdout):
        last = err.splitlines()[-1]
        assert (status, "Traceback" in err) == (2, False), (verb, err)
        extra = "gguf" if "xllamacpp" in last else "train"
        assert re.fullmatch(rf'fintune: .*\w+.*: pip install "fintune\[{extra}\]"', last), last


def test_extras_list_every_library():
    named = {"libggml-python": "libggml"}
    for extra, block in re.findall(r"^(train|gguf|vllm|wandb) = \[(.*?)\]$", PROJECT, re.MULTILINE | re.DOTALL):
        for library in re.findall(r'"([\w-]+)', block):
            if library != "jinja2":  # the core has it, too
                assert named.get(library, library) in EXTRAS, (extra, library)


@pytest.mark.parametrize("name", ["fintune.nothing", "sympy", None])
def test_missing_extra_ignores_other_modules(name):
    assert missing_extra(ModuleNotFoundError("No module", name=name)) is None
