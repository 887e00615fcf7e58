"""``fintune merge`` and ``fintune export`` of models and adapters that belong to no run."""

from __future__ import annotations

import json
import shutil

import pytest

from command import fintune
from stages.test_export import trained

torch = pytest.importorskip("torch")


@pytest.fixture
def adapter(tiny_model, tmp_path):
    return trained(tmp_path, tiny_model)["train"] / "adapter"


def told(done):
    return " ".join(done.err.split())


def test_merging_then_exporting_gives_the_bytes_of_exporting_base_and_adapter(tiny_model, adapter, tmp_path):
    merged, both, direct = (tmp_path / "out" / name for name in ("merged", "both", "direct"))
    done = fintune("merge", "--model", tiny_model, "--adapter", adapter, "--out", merged, "merge.dtype=float16")
    assert done.status == 0, done.err
    assert "weights moved" in done.out
    types = "export.types=[F16,Q8_0]"
    for model, out, more in ((merged, both, ()), (tiny_model, direct, ("--adapter", adapter))):
        done = fintune("export", "--model", model, *more, "--out", out, types, "run.name=same", "merge.dtype=float16")
        assert done.status == 0, done.err
    for name in ("same-F16.gguf", "same-Q8_0.gguf"):
        assert (both / name).read_bytes() == (direct / name).read_bytes()
    made = json.loads((direct / "manifest.json").read_text())
    assert (made["model"], made["adapter"]) == (str(tiny_model), str(adapter))
    assert made["facts"]["source"] == "base + adapter"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["both", "direct", "merged"]


def test_the_files_are_named_after_the_folder(tiny_model, tmp_path):
    assert fintune("export", "--model", tiny_model, "--out", tmp_path / "small", "export.types=[F16]").status == 0
    assert (tmp_path / "small" / "small-F16.gguf").is_file()


def test_mistakes_are_one_line_and_leave_nothing(tiny_model, adapter, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    (other / "model.safetensors").unlink()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    out = tmp_path / "x" / "new"
    cases = {
        "give a CONFIG, or --model and --out together": ("export", "--model", tiny_model),
        "give a CONFIG, or --model, --adapter and --out together": ("merge", "--model", tiny_model, "--out", out),
        f"{full}: exists, and nothing there is overwritten": ("export", "--model", tiny_model, "--out", full),
        "holds no adapter: adapter_config.json is missing": (
            *("merge", "--model", tiny_model, "--adapter", full, "--out", out),
        ),
        "unknown GGUF type 'Q9'": ("export", "--model", tiny_model, "--out", out, "export.types=[Q9]"),
        "export.importance: compute reads the training texts": (
            *("export", "--model", tiny_model, "--out", out, "export.importance=compute"),
        ),
        str(other): ("export", "--model", other, "--out", out),
    }
    for expected, words in cases.items():
        done = fintune(*words)
        assert done.status == 2, (words, done)
        assert expected in told(done)
        assert not out.exists()
        assert not out.parent.exists() or not list(out.parent.iterdir())
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
