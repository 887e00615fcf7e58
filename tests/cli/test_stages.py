"""``fintune merge`` and ``fintune export`` of models and adapters that belong to no run."""

from __future__ import annotations

import json
import shutil
from typing import NamedTuple

import pytest

from pipeline.stages.test_export import trained
from pipeline.stages.test_merge import grown
from support.checkout_stand_in import make_checkout
from support.command import fintune
from support.tiny import make_tiny_model

torch = pytest.importorskip("torch")


@pytest.fixture
def adapter(tiny_model, tmp_path):
    return trained(tmp_path, tiny_model)["train"] / "adapter"


class Disk(NamedTuple):
    """What ``shutil.disk_usage`` gives."""

    total: int
    used: int
    free: int


def told(done):
    return " ".join(done.err.split())


def test_merge_then_export_equals_direct_export(tiny_model, adapter, tmp_path):
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


def test_export_names_files_after_the_folder(tiny_model, tmp_path):
    assert fintune("export", "--model", tiny_model, "--out", tmp_path / "small", "export.types=[F16]").status == 0
    assert (tmp_path / "small" / "small-F16.gguf").is_file()


def test_merge_and_export_errors_leave_nothing(tiny_model, adapter, tmp_path):
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
        f"{full}: already exists, and nothing there is overwritten": ("export", "--model", tiny_model, "--out", full),
        "holds no adapter: adapter_config.json is missing": (
            *("merge", "--model", tiny_model, "--adapter", full, "--out", out),
        ),
        "unknown GGUF type 'Q9'": ("export", "--model", tiny_model, "--out", out, "export.types=[Q9]"),
        "export.imatrix: compute reads the training texts": (
            *("export", "--model", tiny_model, "--out", out, "export.imatrix=compute"),
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


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_merge_refuses_unsaved_embeddings_first(tiny_model, tmp_path, monkeypatch, verb):
    lora, _ = grown(tiny_model, tmp_path / "lora", saved=False)
    monkeypatch.setattr("fintune.export.merge.merged_weights.MergedWeights.rows", None)  # no weight is read for it
    out = tmp_path / "new" / "out"
    done = fintune(verb, "--model", tiny_model, "--adapter", lora, "--out", out)
    assert done.status == 2
    assert told(done).endswith(
        f"{lora} was trained with a tokenizer of 402 tokens, {tiny_model} has 400, and the embeddings of the other "
        "tokens were not saved with the adapter: save the adapter with save_embedding_layers=True"
    )
    assert not list((tmp_path / "new").iterdir())


def test_merge_names_an_adapter_that_does_not_fit(tmp_path):
    base = make_tiny_model(tmp_path / "base")
    lora, _ = grown(base, tmp_path / "lora", saved=False, target_modules=["q_proj"])
    make_tiny_model(base, num_layers=1)
    done = fintune("merge", "--model", base, "--adapter", lora, "--out", tmp_path / "out")
    layer = "model.layers.1.self_attn.q_proj"
    assert done.err == f"fintune: {lora} adapts {layer}, which {base} does not have\n"


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_merge_full_disk_names_the_folder(tiny_model, adapter, tmp_path, monkeypatch, verb):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Disk(100, 99, 1))
    out = tmp_path / "out"
    done = fintune(verb, "--model", tiny_model, "--adapter", adapter, "--out", out)
    assert done.status == 2
    assert f" in {out}, 1 B is free: free some" in told(done)
    assert ".part" not in told(done)
    assert not out.exists()


def test_export_by_checkout_checks_the_disk(tiny_model, tmp_path, monkeypatch):
    checkout, out = make_checkout(tmp_path / "llama.cpp"), tmp_path / "out"
    monkeypatch.setattr("shutil.disk_usage", lambda _: Disk(100, 99, 1))
    done = fintune("export", "--model", tiny_model, "--out", out, f"export.llama_cpp_path={checkout}")
    assert done.status == 2
    assert told(done).startswith("fintune: no space for the GGUF files: it needs about ")
    assert told(done).endswith(f" in {out}, 1 B is free: free some")
    assert not (checkout / "calls.txt").exists()


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_merge_interruption_leaves_nothing(tiny_model, adapter, tmp_path, monkeypatch, verb):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fintune.export.merge.merged_weights.MergedWeights.rows", interrupt)
    out = tmp_path / "new" / "out"
    done = fintune(verb, "--model", tiny_model, "--adapter", adapter, "--out", out)
    assert done.status == 130
    assert told(done) == f"fintune: interrupted; {out} is empty, and the same command starts from the beginning"
    assert not list(out.parent.iterdir())
