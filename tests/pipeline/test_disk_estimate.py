"""Predictions of disk against what the stages really write, on the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fintune.config import Config
from fintune.config.load import load
from fintune.pipeline import disk_estimate
from fintune.pipeline.steps import build_steps


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


FIXED_BYTES = 20_000_000
"""What every prediction adds for logs, configuration and tokenizer."""


@pytest.fixture
def configure(tiny_model: Path):
    def configured(*overrides: str) -> Config:
        return load(None, [f"model.name={tiny_model}", *overrides]).config

    return configured


def test_shapes_and_types_are_those_of_the_loaded_model(tiny_model: Path) -> None:
    from safetensors.torch import load_file

    loaded = load_file(tiny_model / "model.safetensors")
    found = disk_estimate.tensors(tiny_model)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: tuple(w.shape) for n, w in loaded.items()}
    assert {tensor.dtype for tensor in found.values()} == {"F32"}


def test_tensors_reads_the_shards_of_the_index(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_model / "model.safetensors")
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    save_file({f"copy.{name}": weight for name, weight in weights.items()}, tmp_path / "consolidated.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert disk_estimate.tensors(tmp_path) == disk_estimate.tensors(tiny_model)


def test_a_damaged_header_is_left_to_the_stage_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert disk_estimate.tensors(tmp_path) == {}


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_a_merged_folder_takes_what_was_predicted(configure, tiny_model: Path, tmp_path: Path, dtype: Any) -> None:
    from fintune.models import load as models

    # "auto" keeps the type in which the base is stored, here float32.
    model = models.load_model(models.fetch(str(tiny_model)), dtype="float32" if dtype == "auto" else dtype)
    model.save_pretrained(tmp_path)
    weights = disk_estimate.merge_bytes(configure(f"merge.dtype={dtype}")) - FIXED_BYTES
    assert weights / 1.1 < (tmp_path / "model.safetensors").stat().st_size < weights
    assert folder_bytes(tmp_path) < weights + FIXED_BYTES


@pytest.mark.parametrize("r", [4, 32])
def test_an_adapter_and_its_checkpoints_take_what_was_predicted(
    configure, tiny_model: Path, tmp_path: Path, r: int
) -> None:
    from fintune.models import load as models
    from fintune.training import lora

    config = configure(f"adapter.r={r}")
    base = models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")
    adapted = lora.attach_adapter(base, config.adapter)
    num_weights = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    lora.save_adapter(adapted, str(tiny_model), None, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 4 * num_weights * 1.2
    # The adapter, and three checkpoints of the adapter and two moments of each of its weights.
    assert disk_estimate.train_bytes(config) - FIXED_BYTES == pytest.approx(4 * num_weights * 10 * 1.05, rel=1e-6)
    more = configure(f"adapter.r={r}", "train.save_total_limit=4")
    assert disk_estimate.train_bytes(more) - FIXED_BYTES == pytest.approx(4 * num_weights * 16 * 1.05, rel=1e-6)


def test_gguf_files_take_what_was_predicted(configure, tiny_model: Path, tmp_path: Path) -> None:
    from fintune.pipeline.stages.export import export

    config = configure("run.name=tiny")
    export(config, {"merge": tiny_model}, tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.gguf"))
    assert disk_estimate.export_bytes(config) == pytest.approx(written, rel=1e-3)


@pytest.mark.parametrize("size", ["small", "full"])
def test_generated_pages_take_no_more_than_predicted(configure, tmp_path: Path, size: str) -> None:
    from fintune.pipeline.stages.prepare import prepare

    counts = ["data.statements.train_companies=8", "data.statements.eval_companies=4"]
    config = configure(*counts, f"data.statements.size={size}", "prompt.max_length=4096")
    prepare(config, {}, tmp_path)
    assert folder_bytes(tmp_path) < disk_estimate.prepare_bytes(config) < 20 * folder_bytes(tmp_path)


def test_bare_finqa_records_take_no_more_than_predicted(configure, tmp_path: Path) -> None:
    from fintune.data.synthetic import generate
    from fintune.pipeline.stages.prepare import prepare

    pages = generate(12, pages_per_company=1, questions_per_page=2, seed=5, size="full")
    records = [record.model_dump(mode="json") for record in pages]
    files = {name: tmp_path / f"{name}.json" for name in ("train", "eval")}
    for path in files.values():
        path.write_text(json.dumps(records))
    named = [f"data.{name}={path}" for name, path in files.items()]
    config = configure("data.source=finqa", *named, "prompt.max_length=4096")
    (tmp_path / "out").mkdir()
    prepare(config, {}, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") < disk_estimate.prepare_bytes(config)


def test_a_packed_file_counts_for_more_than_a_plain_one(configure, tmp_path: Path) -> None:
    for name in ("a.json", "b.json.gz"):
        (tmp_path / name).write_bytes(b"x" * 1000)
    plain, packed = (
        configure("data.source=finqa", f"data.train={tmp_path / name}", f"data.eval={tmp_path / name}")
        for name in ("a.json", "b.json.gz")
    )
    assert disk_estimate.prepare_bytes(packed) == 5 * disk_estimate.prepare_bytes(plain)


def test_predict_bytes_covers_the_finqa_test_set(configure) -> None:
    from fintune.records import Prediction

    predict = next(step for step in build_steps(configure()) if step.verb == "predict")
    one = Prediction(
        id="ACME/2009/page_17.pdf-1",
        text="subtract(5829, 5735), divide(#0, 5735)" * 4,
        program="subtract(5829, 5735), divide(#0, 5735)" * 4,
        finish_reason="length",
        seconds=0.123456,
        num_prompt_tokens=2048,
        token_ids=tuple(range(100_000, 100_096)),
        margins=tuple(1.234567 + i / 7 for i in range(96)),
    )
    assert 1147 * len(one.model_dump_json()) < predict.needed_bytes(configure())


def test_export_bytes_refuses_an_unknown_family(tiny_model: Path, tmp_path: Path) -> None:
    from fintune.errors import ModelError
    from support.tiny import patch_json

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    patch_json(folder / "config.json", architectures=["MambaForCausalLM"], model_type="mamba")
    with pytest.raises(ModelError, match="mamba"):
        disk_estimate.export_bytes(load(None, [f"model.name={folder}"]).config)
