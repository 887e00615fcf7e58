from __future__ import annotations

import importlib.util

import gguf
import numpy as np
import pytest

from fintune.errors import ResourceError
from fintune.export.gguf import ggml


@pytest.fixture
def rows():
    return np.random.default_rng(3).standard_normal((24, 512), np.float32)


def test_block_layouts_are_those_of_the_gguf_package():
    for name, kind in ggml.TYPES.items():
        theirs = gguf.GGMLQuantizationType[name]
        assert (kind.id, kind.block_elements, kind.block_bytes) == (theirs, *gguf.GGML_QUANT_SIZES[theirs])


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("F32", 0), ("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 0.02), ("Q6_K", 0.1), ("Q5_K", 0.2), ("Q4_K", 0.4),
     ("Q3_K", 0.8), ("Q4_0", 0.5), ("Q5_0", 0.25), ("Q5_1", 0.2)],
)  # fmt: skip
def test_what_was_stored_reads_back_near_its_source(rows, name, tolerance):
    data = ggml.load_ggml().quantise(name, rows)
    back = (
        gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
        if name not in ("F32", "F16")
        else data.view({"F32": np.float32, "F16": np.float16}[name])
    )
    assert np.abs(back.reshape(rows.shape).astype(np.float32) - rows).max() <= tolerance
    assert ggml.load_ggml().is_valid(name, data)


@pytest.mark.parametrize("name", ggml.TYPES)
def test_the_bytes_do_not_depend_on_how_the_rows_are_shared_out(rows, name):
    library = ggml.load_ggml()
    whole = library.quantise(name, rows)
    for step in (1, 5, 23):
        parts = [library.quantise(name, rows[start : start + step]) for start in range(0, 24, step)]
        assert np.array_equal(whole, np.concatenate(parts))


def test_important_columns_are_stored_more_exactly(rows):
    library = ggml.load_ggml()
    importance = np.where(np.arange(512) % 8 == 0, np.float32(100), np.float32(0.01))
    errors = []
    for weights in (None, importance):
        data = library.quantise("Q4_K", rows, weights)
        back = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_K)
        errors.append(np.sqrt(np.mean((back - rows)[:, ::8] ** 2)))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_K"])
def test_values_that_are_not_finite_are_found(rows, name):
    rows[3, 70] = np.inf
    library = ggml.load_ggml()
    assert not library.is_valid(name, library.quantise(name, rows))


def test_a_library_of_another_layout_is_refused(monkeypatch):
    monkeypatch.setitem(ggml.TYPES, "Q4_K", ggml.GgmlType(12, 256, 148))
    with pytest.raises(ResourceError, match=r"has type 12 as .*Q4_K"):
        ggml.Ggml(ggml.load_ggml().path)


def test_a_file_that_is_no_library_is_refused(tmp_path):
    (tmp_path / "libggml-base.so").write_bytes(b"no library")
    with pytest.raises(ResourceError, match="cannot be used"):
        ggml.Ggml(tmp_path / "libggml-base.so")


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"pip install .fintune\[gguf\]"):
        ggml.load_ggml.__wrapped__()
