"""Publishing a finished run to a stand-in of the hub, through the real client and the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fintune.config import Config
from fintune.config.load import load
from fintune.pipeline.stages import publish as stage
from support.command import Done, fintune
from support.model_hub import LIBRARY_WARNS, TOKEN, ModelHub, Repository, connected
from support.published_run import finish, write_run

pytest.importorskip("peft")
pytestmark = LIBRARY_WARNS
ALL = "publish.artifacts=[adapter,merged,gguf]"


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data").mkdir()
    for name in ("train", "eval"):
        (folder / "data" / f"{name}.json").write_text("[]", encoding="utf-8")
    write_run(load(None, overrides(folder, tiny_model)).config, tiny_model)
    return folder


def overrides(folder: Path, model: Path, *more: str) -> list[str]:
    data = [f"data.{name}={folder / 'data' / name}.json" for name in ("train", "eval")]
    named = ["run.name=demo", f"run.dir={folder / 'runs'}", f"model.name={model}", "data.source=finqa"]
    published = ["publish.repo_id=ann/demo", "publish.base_model=acme/tiny"]
    return [*named, *data, *published, *more]


class Run:
    """A copy of the finished run, and the command on it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.demo = folder / "runs" / "demo"
        self.yaml = folder / "demo.yaml"
        self.yaml.write_text("{}\n", encoding="utf-8")

    def config(self, *more: str) -> Config:
        return load(None, overrides(self.folder, self.model, *more)).config

    def publish(self, *more: str) -> Done:
        flags = [each for each in more if each.startswith("--")]
        keys = [each for each in more if not each.startswith("--")]
        return fintune("publish", *flags, self.yaml, *overrides(self.folder, self.model, *keys))

    @property
    def facts(self) -> dict[str, object]:
        return json.loads((self.demo / "publish" / "manifest.json").read_text(encoding="utf-8"))["facts"]


@pytest.fixture
def run(finished, tiny_model, tmp_path) -> Run:
    shutil.copytree(finished, tmp_path / "copy")
    return Run(tmp_path / "copy", tiny_model)


@pytest.fixture
def hub(monkeypatch) -> Iterator[ModelHub]:
    stage.check_push.cache_clear()
    with connected(monkeypatch) as running:
        yield running


def test_publish_everything_to_one_private_repo(run, hub):
    done = run.publish(ALL)
    assert done.status == 0, done.err
    files = hub.files("ann/demo")
    assert hub.repositories["ann/demo"].private
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", "README.md"} <= files.keys()
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files.keys()
    assert {"demo-F16.gguf", "demo-Q4_K_M.gguf", "Modelfile"} <= files.keys()
    assert not any("manifest" in name or name == "adapter_config.json" for name in files)
    assert json.loads(files["adapter/adapter_config.json"])["base_model_name_or_path"] == "acme/tiny"
    assert files["README.md"] == (run.demo / "publish" / "README.md").read_bytes()
    assert run.facts["commit"] == hub.repositories["ann/demo"].sha("main")
    assert run.facts["file_bytes"] == {name: len(content) for name, content in files.items()}
    assert not any(
        str(run.folder).encode() in content or str(run.model).encode() in content for content in files.values()
    )


def test_publish_card_names_base_data_method_and_figures(run, hub):
    run.publish(ALL)
    card = hub.files("ann/demo")["README.md"].decode()
    assert "base_model: acme/tiny\nbase_model_relation: finetune\n" in card
    assert "| train.json: 800 examples to train on, 0 held out |" in card
    assert "| method | DoRA |\n| rank, alpha, dropout | 4, 8, 0.0 |" in card
    assert "| precision | bfloat16 |" in card
    assert "| training loss, first to last steps | 2.500 to 0.125, means of 10 |" in card
    assert "8 min 12 s, 2,220 tokens a second, on 2 cores of Test CPU" in card
    assert re.search(r"\| adapter \| 12 \| \d+\.\d %? ?\| \d+\.\d–\d+\.\d \|", card.replace("\u00a0", " "))
    assert "| GGUF Q4_K_M | 94.2 % | 0.012 | 1.3 |" in card
    assert "800 examples were trained on, 160 held out; left out: 4 program does not run." in card
    assert "license: unknown" in card


@pytest.mark.slow
def test_publish_card_snippets_run(run, hub, tiny_model, tmp_path):
    assert run.publish(ALL, "publish.branch=try", "publish.private=false").status == 0
    hub.repositories["acme/tiny"] = Repository(False, {"main": {p.name: p.read_bytes() for p in tiny_model.iterdir()}})
    card = (run.demo / "publish" / "README.md").read_text(encoding="utf-8")
    peft, transformers = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    fetch = re.findall(r"^hf download (\S+) (\S+) (\S+) --local-dir (\S+) --revision (\S+)$", card, re.MULTILINE)
    assert fetch == [("ann/demo", "demo-Q4_K_M.gguf", "Modelfile", "demo", "try")]
    code = f"{peft}\nadapted = output\n{transformers}\nassert output.tolist() != [] and adapted.shape[1] > 10\n"
    code += "from huggingface_hub.cli.hf import main\nimport sys\nsys.argv = ['hf', *sys.argv[1:]]\nmain()\n"
    arguments = ["download", *fetch[0][:3], "--local-dir", "demo", "--revision", "try"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "demo-Q4_K_M.gguf").read_bytes() == hub.files("ann/demo", "try")["demo-Q4_K_M.gguf"]
    assert (tmp_path / "demo" / "Modelfile").read_text().startswith("FROM ./demo-Q4_K_M.gguf")


def test_publish_adapter_alone_at_the_root(run, hub, tmp_path):
    base = shutil.copytree(run.model, tmp_path / "named")
    (base / "README.md").write_text("---\nlicense: llama3.2\n---\n", encoding="utf-8")
    (base / "LICENSE.txt").write_text("Llama", encoding="utf-8")
    done = run.publish(f"model.name={base}", "publish.base_model=")
    assert done.status == 0, done.err
    assert "set publish.base_model" in done.err
    files = hub.files("ann/demo")
    assert set(files) == {"README.md", "LICENSE.txt", "adapter_config.json", "adapter_model.safetensors"}
    card = files["README.md"].decode()
    assert 'base = "named"  # ' in card
    assert 'PeftModel.from_pretrained(model, "ann/demo")' in card
    assert "license: other\nlicense_name: llama3.2-and-unknown" in card
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "named"


def test_publish_dry_run_writes_card_without_requests(run, hub):
    done = run.publish(ALL, "--dry-run")
    assert done.status == 0, done.err
    assert not hub.asked
    assert re.search(r"demo-Q4_K_M\.gguf +30,000", done.out)
    assert "Would be pushed to ann/demo, branch main (private)" in done.out
    assert (run.demo / "publish-preview" / "README.md").read_text(encoding="utf-8").startswith("---\nbase_model:")
    assert not (run.demo / "publish").exists()


def test_publish_again_sends_nothing_and_removes_old_files(run, hub):
    run.publish()
    commit = run.facts["commit"]
    assert run.publish().status == 0
    assert (run.facts["sent"], run.facts["commit"]) == ([], commit)
    del hub.repositories["ann/demo"]
    assert run.publish().status == 0
    assert set(hub.files("ann/demo")) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert run.publish(ALL).status == 0
    assert run.facts["removed"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert "adapter_config.json" not in hub.files("ann/demo")


def test_publish_resumes_after_a_network_failure(run, hub, monkeypatch):
    monkeypatch.setattr(stage, "RETRY_PAUSES", ())
    hub.drop = {"commit/": 99}
    done = run.publish(ALL)
    assert done.status == 2
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("fintune: ann/demo was not published: the hub cannot be reached")
    assert "Traceback" not in done.err
    assert not (run.demo / "publish").exists()
    sent = list(hub.stored)
    hub.drop = {}
    assert run.publish(ALL).status == 0
    assert hub.stored == sent


def test_publish_refused_token_before_any_work(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = run.publish()
    assert done.status == 2
    assert "the hub refuses the token (status 401)" in done.err
    assert "hf_wrong" not in done.err + done.out
    assert set(hub.asked) == {"GET /api/whoami-v2"}
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "needs a token, and there is none: run `hf auth login`" in run.publish().err


def test_publish_writes_the_token_nowhere(run, hub):
    done = run.publish(ALL)
    written = b"".join(path.read_bytes() for path in run.demo.rglob("*") if path.is_file())
    pushed = b"".join(hub.files("ann/demo").values())
    assert TOKEN.encode() not in written + pushed
    assert TOKEN not in done.out + done.err
    assert hub.tokens <= {f"Bearer {TOKEN}", None}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda demo: shutil.rmtree(demo / "merge"), "publish.artifacts names merged, but merge has no result in"),
        (lambda demo: (demo / "merge" / "config.json").write_text("{}"), "was changed after merge wrote it"),
        (lambda demo: (demo / "merge" / "LICENSE").unlink(), "LICENSE is missing: rerun the stage with --redo merge"),
        (lambda demo: finish(demo / "merge", "merge", inputs={"train": "0" * 64}), "was made from an older result of"),
    ],
)
def test_publish_refuses_missing_changed_or_stale_results(run, hub, spoil, told):
    spoil(run.demo)
    done = run.publish(ALL)
    assert done.status == 2
    assert told in done.err
    assert not hub.repositories


def test_publish_refuses_public_repo(run, hub):
    hub.repositories["ann/demo"] = Repository(private=False)
    done = run.publish()
    assert done.status == 2
    assert "ann/demo can be read by everybody" in done.err
    assert not hub.files("ann/demo")


def test_publish_refuses_licence_that_data_forbid(run, hub):
    report = json.loads((run.demo / "prepare" / "report.json").read_text(encoding="utf-8"))
    licence = {"name": "CC-BY-NC-4.0", "origin": "known", "non_commercial": True}
    counts = {"num_rows": 9, "shapes": {}, "dropped": {}, "num_train": 8, "num_eval": 1, "weight": 1.0}
    report["sources"] = [{"path": "hub:FinLang/investopedia", "licence": licence, **counts}]
    (run.demo / "prepare" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    done = run.publish("publish.license=apache-2.0", "--dry-run")
    assert done.status == 2
    assert "apache-2.0 allows commercial use, which FinLang/investopedia (CC-BY-NC-4.0) forbids" in done.err
    assert run.publish("--dry-run").status == 0
    card = (run.demo / "publish-preview" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"> \*\*Not for commercial use\.\*\* .* FinLang/investopedia \(CC-BY-NC-4\.0\)\.", card)
    assert "datasets:\n- FinLang/investopedia\n" in card
    assert "license_name: unknown-and-cc-by-nc-4.0" in card


def test_publish_hint_names_the_command_to_rerun(run, hub):
    folder = ("publish", run.demo, f"model.name={run.model}", "publish.repo_id=ann/demo", "publish.artifacts=[merged]")
    finish(run.demo / "merge", "merge", inputs={"train": "0" * 64})
    assert f": rerun it first: the command that made {run.demo}\n" in fintune(*folder).err
    told = run.publish(ALL).err
    assert f": rerun it first: fintune run {run.yaml} run.name=demo " in told
    assert "CONFIG" not in told


def test_publish_needs_the_result_of_prepare(run, hub):
    shutil.rmtree(run.demo / "prepare")
    for flag in ((), ("--dry-run",)):
        done = run.publish("publish.license=apache-2.0", *flag)
        assert done.status == 2
        assert "has no result of prepare, without which the card cannot name the data and their licences" in done.err
        assert "rerun it: fintune prepare" in done.err
    done = fintune("publish", run.demo, f"model.name={run.model}", "publish.repo_id=ann/demo")
    assert done.status == 2
    assert "has no result of prepare, so its data are unknown: put it back, or name the run's" in done.err
    assert not hub.repositories
    assert not (run.demo / "publish-preview" / "README.md").exists()


def test_publish_option_errors_are_one_line(run, hub):
    for wrong, told in (
        ("publish.repo_id=", "publish.repo_id is empty"),
        ("publish.repo_id=a/b/c", "is not a valid hub name; write OWNER/NAME"),
        ("publish.artifacts=[lora]", "publish.artifacts"),
        ("publish.artifacts=[gguf,gguf]", "names something twice"),
        ("publish.branch=a b", "publish.branch"),
        ("adapter.kind=full", "set publish.artifacts to merged or gguf"),
    ):
        done = run.publish(wrong)
        assert done.status == 2, wrong
        assert told in done.err
        assert done.err.count("\n") == 1
    assert not hub.asked


def test_publish_stage_is_up_to_date_or_refuses_new_options(run, hub):
    only = ["run", "--only", "publish", run.yaml, *overrides(run.folder, run.model)]
    assert fintune(*only).status == 0
    again = fintune(*only)
    assert "up to date" in again.err
    other = fintune(*only, "publish.repo_id=ann/other")
    assert other.status == 2
    assert 'publish.repo_id was "ann/demo" and is now "ann/other"' in other.err
    assert set(hub.repositories) == {"ann/demo"}


def test_publish_takes_a_run_folder(run, hub):
    done = fintune("publish", run.demo, f"model.name={run.model}", "publish.repo_id=ann/demo", ALL)
    assert done.status == 0, done.err
    assert {"demo-F16.gguf", "config.json", "adapter/adapter_config.json"} <= hub.files("ann/demo").keys()
    for wrong in (run.folder / "data", run.folder / "runs"):
        empty = fintune("publish", wrong, "publish.repo_id=ann/demo")
        assert empty.status == 2
        assert "holds no finished stage: name a run's folder or its configuration file" in empty.err
