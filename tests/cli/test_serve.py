"""``fintune serve``, asked over loopback by our own client, and the lines of docs/serving.md as they stand there."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from fintune.cli.serve import gguf_of, key_from
from fintune.errors import ArtifactError, ConfigError, ModelError, ResourceError
from fintune.export.gguf.writer import write_gguf
from fintune.inference.http_pool import OWN_KEY
from fintune.inference.llama_cpp import LlamaCppEngine
from fintune.inference.llama_server import LlamaServer
from fintune.inference.openai import OpenAIEngine, parse_endpoint
from fintune.inference.protocol import Decoding, sorted_by_prompt
from fintune.records import Message
from fintune.util.console import quiet_libraries
from support.command import fintune, fintune_process
from support.finished_step import finish
from support.paths import ROOT
from support.synthetic import lora_of
from support.tiny import patch_json

pytest.importorskip("xllamacpp")

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
KEY = "sk-of-the-test"
ASKED = [[Message(role="user", content=f"net revenue in {year}")] for year in (2018, 2019)]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Path:
    """What a run named demo leaves, as far as it is served."""
    folder = tmp_path_factory.mktemp("cwd") / "runs" / "demo"
    (folder / "export").mkdir(parents=True)
    kinds = ("F16", "Q4_K_M")
    report = write_gguf(tiny_model, {kind: folder / "export" / f"demo-{kind}.gguf" for kind in kinds})
    finish(folder / "export", file_bytes={file.kind: file.num_bytes for file in report.files})
    (folder / "merge").symlink_to(tiny_model)
    (folder / "train").mkdir()
    adapter = lora_of(tiny_model, folder / "train" / "adapter")
    patch_json(adapter / "adapter_config.json", target_modules=["q_proj"], task_type="CAUSAL_LM")
    return folder


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(OWN_KEY, raising=False)


@contextmanager
def served(*arguments: object, key: str = ""):
    """The command as a user starts it; yields its process and the address that it prints."""
    command = [sys.executable, "-m", "fintune.cli.main", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    environment = {**os.environ, OWN_KEY: key}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        yield process, re.search(r"at (http://\S+),", line)[1], line
    finally:
        process.kill()
        process.communicate()


def test_serve_answers_like_the_engine_until_ctrl_c(run, monkeypatch):
    with served(run, key=KEY) as (process, url, line):
        assert line.startswith("Serving demo-Q4_K_M at") and OWN_KEY in line and KEY not in line
        for path, body in (("/chat/completions", b"{}"), ("/models", None)):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(urllib.request.Request(f"{url}{path}", body))
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/health") as answer:
            assert answer.status == 200
        monkeypatch.setenv(OWN_KEY, KEY)
        engine = OpenAIEngine(parse_endpoint(f"{url}#demo-Q4_K_M"), parallel=1)
        found = [each.token_ids for each in sorted_by_prompt(engine.chat(ASKED, Decoding(6)))]
        engine.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stdout.readline().startswith("To ask it: curl ")
        assert process.stdout.read() == "stopped\n" and process.stderr.read() == ""
    with closing(LlamaCppEngine(run / "export" / "demo-Q4_K_M.gguf", context_tokens=256, parallel=1)) as local:
        wanted = sorted_by_prompt(local.generate([local.render(each) for each in ASKED], Decoding(6)))
    assert found == [each.token_ids for each in wanted]


@pytest.mark.parametrize("key", ["", KEY])
def test_serve_prints_a_request_that_works(run, monkeypatch, key):
    with served(run, key=key) as (process, url, _):
        line = process.stdout.readline()
        assert KEY not in line
        monkeypatch.setenv(OWN_KEY, key)
        curl, address, *options = shlex.split(os.path.expandvars(line.removeprefix("To ask it: ")))
        assert (curl, address) == ("curl", f"{url}/chat/completions")
        given = list(zip(options[::2], options[1::2], strict=True))
        assert [option for option, _ in given] == ["-H", *(["-H"] if key else []), "-d"]
        headers = dict(value.split(": ") for option, value in given if option == "-H")
        with urllib.request.urlopen(urllib.request.Request(address, given[-1][1].encode(), headers)) as answer:
            assert json.load(answer)["choices"][0]["message"]["role"] == "assistant"


def test_serve_stops_during_a_request(run):
    with served(run / "export" / "demo-F16.gguf") as (process, url, _):
        body = b'{"prompt": "a", "max_tokens": 100000, "ignore_eos": true, "stream": true}'
        with urllib.request.urlopen(urllib.request.Request(f"{url}/completions", body)) as answer:
            assert answer.readline().startswith(b"data:")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


def test_serve_context_is_limited_by_the_model(run):
    server = LlamaServer(gguf_of(run), port=0, threads=1, context_tokens=256, parallel=3)
    assert (server.model, server.context_tokens) == ("demo-Q4_K_M", 256)
    server.close()
    server = LlamaServer(gguf_of(run, kind="f16"), port=0, threads=1, context_tokens=999_999, parallel=1)
    assert (server.model, server.context_tokens) == ("demo-F16", 4096)
    server.close()


def test_serve_refuses_other_origins(run):
    server = LlamaServer(gguf_of(run), port=0, threads=1)
    request = urllib.request.Request(f"{server.url}/models", headers={"origin": "http://elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)
    server.close()


def test_serve_refuses_contexts_beyond_the_library(run):
    with pytest.raises(ResourceError, match="2147483647 tokens: use a shorter context"):
        LlamaServer(gguf_of(run), port=0, context_tokens=1 << 30, parallel=2)


def test_gguf_of_accepts_a_config(run, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("run:\n  name: demo\n")
    assert gguf_of(config, [f"run.dir={run.parent}"]) == run / "export" / "demo-Q4_K_M.gguf"
    with pytest.raises(ArtifactError, match=r"no finished export: .*--only export"):
        gguf_of(config, [f"run.dir={tmp_path}"])


def test_serve_errors(run, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"no model")
    (tmp_path / "cut.gguf").write_bytes((run / "export" / "demo-F16.gguf").read_bytes()[:4000])
    with pytest.raises(ModelError, match="no such file or folder"):
        gguf_of(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match=r"m\.gguf: not a GGUF file"):
        LlamaServer(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"cut\.gguf: llama\.cpp cannot load it"):
        LlamaServer(tmp_path / "cut.gguf", port=0)
    with pytest.raises(ArtifactError, match="holds no Q5_K_M: it has F16, Q4_K_M"):
        gguf_of(run, kind="Q5_K_M")
    with pytest.raises(ConfigError, match="only a YAML file takes overrides"):
        gguf_of(run, ["run.name=x"])
    with pytest.raises(ConfigError, match="--type F16 selects a file of a run"):
        gguf_of(run / "export" / "demo-F16.gguf", kind="F16")
    with pytest.raises(ResourceError, match="the environment variable NOT_SET is not set"):
        key_from("NOT_SET")
    with pytest.raises(ResourceError, match=r"0\.0\.0\.0"):
        LlamaServer(gguf_of(run), host="0.0.0.0")


def test_serve_port_and_host_errors(run, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = fintune("serve", run, "--port", port)
    assert done.status == 2 and len(done.err.splitlines()) == 1
    assert f"127.0.0.1 port {port}: address already in use" in done.err
    monkeypatch.setenv(OWN_KEY, KEY)
    with pytest.raises(ResourceError, match=r"192\.0\.2\.1 port 8080: cannot assign"):
        LlamaServer(gguf_of(run), host="192.0.2.1", key=KEY)


def test_serve_help_names_the_defaults():
    help_text = fintune("serve", "--help").out
    assert all(word in help_text for word in ("127.0.0.1", "8080", "4096", "FINTUNE_API_KEY"))


def test_serve_docs_command_and_client(run):
    words = re.search(r"```\nfintune serve (\S+) --port 8080\n", PAGE)[1]
    client = next(text for text in SNIPPETS if "8080" in text)
    with served(run.parents[1] / words) as (_, url, _line):
        assert python(client.replace("http://127.0.0.1:8080/v1", url), run).endswith("\n")


@pytest.mark.parametrize("text", [s for s in SNIPPETS if "8080" not in s], ids=lambda s: re.findall(r"\w+", s)[1])
def test_serve_docs_programs(run, tiny_model, tmp_path, monkeypatch, capsys, text):
    (tmp_path / "program.py").write_text(text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model)))
    monkeypatch.chdir(run.parents[1])
    with quiet_libraries():
        runpy.run_path(str(tmp_path / "program.py"))
    # A random model may write nothing but white space.
    assert len(capsys.readouterr().out) > len("\n")


def python(code: str, run: Path) -> str:
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run.parents[1], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_serve_docs_name_every_tool():
    assert len(SNIPPETS) == 4
    for tool in ("fintune serve", "llama-server", "ollama create", "lms import", "vllm serve"):
        assert re.search(rf"```\n[^`]*{tool}", PAGE), tool
    assert fintune_process("serve").status == 2
