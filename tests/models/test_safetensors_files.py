from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fintune.errors import ModelError
from fintune.models.safetensors_files import SafetensorFolder
from support.synthetic import write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "sharded", num_layers=1, num_shards=3)


def test_rows_of_all_float_types_come_as_float32(tmp_path):
    values = np.random.default_rng(0).standard_normal((6, 4), np.float32)
    save_file({"half": values.astype(np.float16), "single": values}, tmp_path / "model.safetensors")
    header = json.dumps({"brain": {"dtype": "BF16", "shape": [6, 4], "data_offsets": [0, 48]}}).encode()
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    (tmp_path / "model-2.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + upper.tobytes())
    with SafetensorFolder(tmp_path) as weights:
        read = {name: weights.rows(tensor, 1, 5) for name, tensor in weights.tensors.items()}
    assert np.array_equal(read["single"], values[1:5])
    assert np.array_equal(read["half"], values[1:5].astype(np.float16).astype(np.float32))
    assert np.array_equal(read["brain"], (upper.astype(np.uint32) << 16).view(np.float32)[1:5])


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of the 3 weight files .* model-00002-of-00003\.safetensors"):
        SafetensorFolder(folder)


@pytest.mark.parametrize("kept", [0, 5, 300, 4000])
def test_a_truncated_file_names_the_path(folder, kept):
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model-00001-of-00003\.safetensors "):
        SafetensorFolder(folder)


def test_index_with_tensors_missing_in_shards_is_refused(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"1 tensors of the index .* model\.extra\.weight"):
        SafetensorFolder(folder)


def test_quantised_weights_are_refused(tmp_path):
    save_file({"w": np.zeros((2, 2), np.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"tensor w has type U8.*16-bit weights"):
        SafetensorFolder(tmp_path)
