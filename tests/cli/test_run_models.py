"""A run's folder where a model is named."""

from __future__ import annotations

import json

import pytest

from fintune.cli.common import resolve_run_model
from fintune.errors import ArtifactError, ModelError
from support import finished_step
from support.command import fintune


def finish(folder, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    finished_step.finish(folder, options={"prompt.system": "Answer it."}, **facts)


@pytest.fixture
def run(tmp_path):
    """A run that was trained."""
    adapter = tmp_path / "runs" / "chat" / "train" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "acme/base"}))
    finish(adapter.parents[1] / "prepare")
    finish(adapter.parent)
    return adapter.parents[1]


def test_resolve_run_model_prefers_gguf(run, capsys):
    (run / "merge").mkdir()
    (run / "merge" / "config.json").write_text("{}")
    assert resolve_run_model(str(run)) == (str(run / "merge"), ['prompt.system="Answer it."'])
    (run / "export").mkdir()
    (run / "export" / "chat-Q4_K_M.gguf").write_bytes(b"GGUF")
    finish(run / "export", file_bytes={"Q4_K_M": 4})
    assert resolve_run_model(str(run))[0] == str(run / "export" / "chat-Q4_K_M.gguf")
    with pytest.raises(ModelError, match="is a run's folder, which needs no adapter"):
        resolve_run_model(str(run), with_adapter=True)


def test_resolve_run_model_warns_about_chat_runs(run, capsys):
    (run / "merge").mkdir()
    (run / "merge" / "config.json").write_text("{}")
    resolve_run_model(str(run))
    assert "trained on" not in capsys.readouterr().err
    finished_step.finish(run / "prepare", options={"data.source": "chat"})
    assert resolve_run_model(str(run))[0] == str(run / "merge")
    told = [line for line in capsys.readouterr().err.splitlines() if "trained on" in line]
    assert len(told) == 1
    assert told[0].endswith(f"fintune serve {run}")


def test_resolve_run_model_hints_at_the_adapter(run):
    adapter = run / "train" / "adapter"
    with pytest.raises(ArtifactError, match=f"no merged or exported model: .* acme/base --adapter {adapter}"):
        resolve_run_model(str(run))
    with pytest.raises(
        ModelError, match=f"holds an adapter, not a model: name its base: acme/base --adapter {adapter}"
    ):
        resolve_run_model(str(adapter))


def test_resolve_run_model_keeps_other_names(tmp_path, tiny_model):
    for name in ("acme/base", "builtin:smollm2-135m", "http://x/v1#m", str(tmp_path), str(tiny_model)):
        assert resolve_run_model(name) == (name, [])


def test_ask_and_predict_name_the_model_of_a_run(run, tiny_model, tmp_path):
    (run / "merge").symlink_to(tiny_model)
    page = tmp_path / "page.csv"
    page.write_text("name;2023;2022\nrevenue;1.250,5;1.120,0\n")
    done = fintune("ask", run, "what fell?", "--page", page, "predict.max_new_tokens=3")
    assert f"using {run / 'merge'}" in done.err
    assert done.status in (0, 1), done.err
    refused = fintune("predict", "--model", run / "train" / "adapter", "--data", page, "--out", tmp_path / "p.json")
    assert "holds an adapter, not a model: name its base: acme/base --adapter" in refused.err
