"""The finance guide's quick start, from files of the trader shapes and a stand-in of the hub: stopped in every stage,
begun again, skipped, and its outputs used as the guide uses them."""

from __future__ import annotations

import filecmp
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from support.checkout_stand_in import calls, make_checkout
from support.finance_data import CARD, INVESTOPEDIA, investopedia, write_datasets
from support.hub_server import HubServer
from support.killed_finance import BETWEEN_TOOLS, STOPS
from support.paths import ROOT
from support.tiny import make_tiny_model

pytest.importorskip("torch")

SMALL = (
    *("--max_seq_length", "256", "--investopedia_rows", "40"),
    *(
        "--extra_train_args",
        "train.max_steps=3 train.save_steps=1 train.logging_steps=1 train.threads=1 export.threads=1",
    ),
)
OUTPUTS = ("financial_lora", "merged_financial_fp16", "financial_model_fp16.gguf", "financial_model_q4_k_m.gguf")


@dataclass(frozen=True)
class Story:
    """What became of the command.

    Attributes:
        stopped: Folder in which it was stopped everywhere and then came to its end.
        whole: Folder in which it ran once, and a second time.
        converted: A copy of it, in which a llama.cpp checkout converted again.
        attempts: Stage, signal and exit status of each attempt.
        before: Names, times and contents of the outputs in ``whole``, and requests to the hub, before the second time.
        after: Likewise after it.
    """

    stopped: Path
    whole: Path
    converted: Path
    attempts: list[list[str]]
    before: tuple[dict[Path, int], dict[str, bytes], object]
    after: tuple[dict[Path, int], dict[str, bytes], object]


def contents(folder: Path) -> dict[str, bytes]:
    files = [
        path
        for name in OUTPUTS
        for path in ([folder / name] if (folder / name).is_file() else (folder / name).iterdir())
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def server():
    running = HubServer(INVESTOPEDIA, {"train.csv": investopedia(), "README.md": CARD})
    yield running
    running.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("finance") / "model", hidden_size=256, num_layers=1)


@pytest.fixture(scope="module")
def story(tmp_path_factory, model, server) -> Story:
    stopped, whole, converted = (tmp_path_factory.mktemp(name) for name in ("stopped", "whole", "converted"))
    make_checkout(converted / "llama.cpp")
    for folder in (stopped, whole):
        write_datasets(folder / "datasets")
    server.break_after.append(4000)

    def look() -> tuple[dict[Path, int], dict[str, bytes], object]:
        times = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name not in ("log.txt", ".lock")}
        return {path: time for path, time in times.items() if path.is_file()}, contents(whole), server.asked.copy()

    cache = tmp_path_factory.mktemp("cache")
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    hub = {"HF_ENDPOINT": server.url, "HF_HOME": str(cache)}
    environment = {**os.environ, **hub, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    folders = (stopped, whole, converted)
    command = [
        sys.executable,
        ROOT / "tests" / "support" / "killed_finance.py",
        *folders,
        "--model_name",
        model,
        *SMALL,
    ]
    with subprocess.Popen(
        [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        lines = [process.stdout.readline() for _ in range(len(STOPS) + 2)]
        before = look()
        lines += process.communicate("go on\n")[0].splitlines()
    return Story(stopped, whole, converted, [line.split() for line in lines], before, look())


def test_attempts_end_where_they_are_stopped(story):
    ends = {"SIGKILL": -signal.SIGKILL, "SIGINT": 130}
    expected = [[stage, name, str(int(ends[name]))] for stage, _, _, name in (*STOPS, BETWEEN_TOOLS)]
    expected[-1:-1] = [[name, "-", "0"] for name in ("last", "whole", "again")]
    expected += [["converted", "-", "0"]]
    assert story.attempts == expected, (story.stopped / "log.txt").read_text()
    log = (story.stopped / "log.txt").read_text()
    assert log.count("fintune: interrupted") == sum(stop[3] == "SIGINT" for stop in STOPS)
    assert "train: resume" in log


def test_interruptions_change_no_output(story):
    stopped, whole = contents(story.stopped), contents(story.whole)
    assert stopped.keys() == whole.keys()
    assert {name for name, data in stopped.items() if data != whole[name]} == set()
    assert not list(story.stopped.rglob("*.part*"))
    assert not list((story.stopped / "financial_lora" / "run" / ".work").iterdir())


def test_interrupted_checkout_starts_again(story):
    made = ["convert F16 vocabulary", "convert F16", "convert F16", "quantise Q4_K_M"]
    assert calls(story.converted / "llama.cpp") == made
    for name, kind in (("financial_model_fp16.gguf", "F16"), ("financial_model_q4_k_m.gguf", "Q4_K_M")):
        exported = story.converted / "financial_lora" / "run" / "export" / f"run-{kind}.gguf"
        assert filecmp.cmp(story.converted / name, exported, shallow=False)
    q4 = "financial_model_q4_k_m.gguf"
    assert (story.converted / q4).stat().st_size > (story.whole / q4).stat().st_size, "the stand-in quantises nothing"
    assert not list(story.converted.rglob("*.part*"))


def test_download_resumes_at_its_byte(story, server):
    assert "bytes=4000-" in server.ranges


def test_second_run_does_nothing(story):
    assert story.after == story.before
    assert re.search(r"run: 0 of \d+ stages to do", (story.whole / "log.txt").read_text())


def test_sources_are_read_and_reported(story):
    report = json.loads((story.whole / "financial_lora" / "run" / "prepare" / "report.json").read_text())
    folder, hub = report["sources"]
    assert folder["shapes"] == {"messages": 8, "preference": 8, "sharegpt": 8, "alpaca": 8}
    assert hub["licence"]["name"].lower() == "cc-by-nc-4.0"
    (unused,) = report["unused_rows"]
    assert "trader_sft_data.jsonl, row 9: messages[0].role: 'usr' is no role" in unused
    log = (story.stopped / "log.txt").read_text()
    assert "not for commercial use" in log


def snippets(language: str) -> list[str]:
    """The code under "Using the outputs" of the guide's page."""
    text = (ROOT / "docs" / "finance.md").read_text(encoding="utf-8")
    part = text.split("## Using the outputs")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", part, re.DOTALL)


def stand_in_for_unsloth() -> ModuleType:
    """Loads as transformers does, in 4 bits where asked for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(model_name, max_seq_length, dtype, load_in_4bit):
            assert (max_seq_length, dtype, load_in_4bit) == (4096, None, True)
            quantised = BitsAndBytesConfig(load_in_4bit=True)
            model = AutoModelForCausalLM.from_pretrained(model_name, quantization_config=quantised)
            return model, AutoTokenizer.from_pretrained(model_name)

    module = ModuleType("unsloth")
    module.FastLanguageModel = FastLanguageModel
    return module


@pytest.mark.parametrize("number", range(3), ids=["peft", "unsloth", "transformers"])
def test_snippets_of_the_page_load_the_outputs(story, model, number, tmp_path, monkeypatch):
    import torch

    monkeypatch.setitem(sys.modules, "unsloth", stand_in_for_unsloth())
    monkeypatch.chdir(story.whole)
    code = snippets("python")[number].replace("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", str(model))
    (tmp_path / "snippet.py").write_text(code, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about each other
        left = runpy.run_path(str(tmp_path / "snippet.py"))
    if "PeftModel" in left:
        adapted = [name for name, _ in left["model"].named_parameters() if "lora_B" in name]
        assert len(adapted) == 7
    if "tokenizer" in left:
        messages = [{"role": "user", "content": "Roll 3?"}]
        ids = left["tokenizer"].apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = ids["input_ids"] if not isinstance(ids, torch.Tensor) else ids
        assert left["model"](ids).logits.isfinite().all()


LLAMA_CLI = """#!{python}
import argparse
parser = argparse.ArgumentParser(allow_abbrev=False)
for flag, kind in (("-m", str), ("-p", str), ("-n", int), ("--temp", float), ("-ngl", int)):
    parser.add_argument(flag, type=kind, required=True)
asked = parser.parse_args()
from fintune.inference.llama_cpp import LlamaCppEngine
engine = LlamaCppEngine(asked.m, threads=1)
print(len(engine.tokenise([asked.p])[0]), engine.path.name)
"""
"""A stand-in that takes the guide's flags and loads the file with the llama.cpp that is installed."""


def test_llama_cpp_command_loads_the_file(story):
    tool = story.whole / "llama.cpp" / "build" / "bin" / "llama-cli"
    tool.parent.mkdir(parents=True)
    tool.write_text(LLAMA_CLI.format(python=sys.executable), encoding="utf-8")
    tool.chmod(0o755)
    (command,) = snippets("bash")
    done = subprocess.run(["bash", "-c", command], cwd=story.whole, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("financial_model_q4_k_m.gguf\n")
