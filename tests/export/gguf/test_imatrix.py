"""ImportanceMatrix matrices: formats, what is summed, and llama.cpp's bytes when it quantises with one."""

from __future__ import annotations

import hashlib
import json
import platform
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from fintune.errors import DataError, ModelError
from fintune.export.gguf.imatrix import read_imatrix, write_imatrix
from fintune.export.gguf.writer import write_gguf
from support.synthetic import importance_of, write_folder

# What llama.cpp's quantiser (in cyllama 0.2.18) made of these folders with these importance matrices.
UPSTREAM = json.loads((Path(__file__).parent / "upstream_imatrix_sha256.json").read_text())
CASES = {
    "llama": {},
    "llama-tied-odd": {"tied": True, "hidden_size": 320, "pre": "smollm", "dtype": "F32"},
    "qwen3": {"model_type": "qwen3", "pre": "qwen2", "tied": True, "head_dim": 64},
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the hashes were taken on x86-64")
@pytest.mark.parametrize("case", CASES)
def test_weighed_files_are_those_of_llama_cpps_own_quantiser(tmp_path, case):
    folder = write_folder(tmp_path / "model", **CASES[case])
    importance = read_imatrix(importance_of(folder, tmp_path / "m.gguf"))
    outputs = {kind: tmp_path / f"{kind}.gguf" for kind in UPSTREAM[case]}
    write_gguf(folder, outputs, threads=2, name="Tiny Model 1", imatrix=importance)
    assert {kind: hashlib.sha256(path.read_bytes()).hexdigest() for kind, path in outputs.items()} == UPSTREAM[case]


def test_the_converters_types_know_of_no_importance(llama_folder, tmp_path):
    importance = read_imatrix(importance_of(llama_folder, tmp_path / "m.gguf"))
    write_gguf(llama_folder, {"F16": tmp_path / "weighed"}, name="m", imatrix=importance)
    write_gguf(llama_folder, {"F16": tmp_path / "plain"}, name="m")
    assert (tmp_path / "weighed").read_bytes() == (tmp_path / "plain").read_bytes()


def test_a_written_matrix_reads_back_as_means(tmp_path):
    sums = {"blk.0.attn_q.weight": np.array([2, 4, 6], np.float32), "blk.0.ffn_up.weight": np.ones(2, np.float32)}
    counts = {"blk.0.attn_q.weight": 2000, "blk.0.ffn_up.weight": 0}
    write_imatrix(tmp_path / "m.gguf", sums, counts, datasets=["a.txt", "b.txt"], chunk_size=512)
    read = read_imatrix(tmp_path / "m.gguf")
    assert (read.file, read.dataset, read.num_chunks) == ("m.gguf", "a.txt", 3)
    assert read.columns["blk.0.attn_q.weight"].tolist() == pytest.approx([0.001, 0.002, 0.003])
    # What nothing was routed to counts alike.
    assert read.columns["blk.0.ffn_up.weight"].tolist() == [1, 1]
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.type"].contents() == "imatrix" and "general.architecture" not in fields


def legacy(entries, trailer: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += np.array(values, "<f4").tobytes()
    return data + trailer


def test_the_older_format_is_read(tmp_path):
    trailer = struct.pack("<ii", 7, 5) + b"a.txt"
    (tmp_path / "m.dat").write_bytes(legacy([("blk.0.attn_q.weight", 4, [2.0, 4.0])], trailer))
    read = read_imatrix(tmp_path / "m.dat")
    assert (read.dataset, read.num_chunks) == ("a.txt", 7)
    assert read.columns["blk.0.attn_q.weight"].tolist() == [0.5, 1.0]
    (tmp_path / "old.dat").write_bytes(legacy([("blk.0.attn_q.weight", 0, [2.0])]))
    read = read_imatrix(tmp_path / "old.dat")
    assert (read.dataset, read.num_chunks, read.columns["blk.0.attn_q.weight"].tolist()) == (None, 0, [2.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no readable importance matrix"),
        (legacy([("blk.0.attn_q.weight", 1, [1.0, 2.0])])[:-1], "truncated"),
        (legacy([]), "no entries"),
        (legacy([("blk.0.attn_q.weight", 1, [1.0, float("nan")])]), "blk.0.attn_q.weight is negative or not finite"),
        (legacy([("blk.0.attn_q.weight", 1, [-1.0])]), "blk.0.attn_q.weight is negative"),
        (b"GGUF" + bytes(40), "no readable importance matrix"),
    ],
)
def test_a_broken_matrix_is_one_line_that_names_the_file(tmp_path, content, message):
    (tmp_path / "m.dat").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_imatrix(tmp_path / "m.dat")
    assert "m.dat" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_matrix_and_a_models_file_are_refused(llama_folder, tmp_path):
    with pytest.raises(ModelError, match="no readable importance matrix"):
        read_imatrix(tmp_path / "none.gguf")
    write_gguf(llama_folder, {"Q8_0": tmp_path / "model.gguf"})
    with pytest.raises(ModelError, match=r"imatrix\.datasets is missing"):
        read_imatrix(tmp_path / "model.gguf")


def test_imatrix_of_another_model_is_refused_before_writing(llama_folder, tmp_path):
    other = write_folder(tmp_path / "other", hidden_size=320)
    wider = read_imatrix(importance_of(other, tmp_path / "m.gguf"))
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"m\.gguf: 320 values for blk\.0\.\w+\.weight, which has 256 columns"):
        write_gguf(llama_folder, {"Q4_K_M": tmp_path / "out" / "m"}, imatrix=wider)
    write_imatrix(
        tmp_path / "x.gguf",
        {"blk.99.attn_q.weight": np.ones(4)},
        {"blk.99.attn_q.weight": 1},
        datasets=["x"],
        chunk_size=1,
    )
    with pytest.raises(ModelError, match="none of its entries is a tensor of this model"):
        write_gguf(llama_folder, {"Q4_K_M": tmp_path / "out" / "m"}, imatrix=read_imatrix(tmp_path / "x.gguf"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def loaded(tiny_model):
    from fintune.models.load import fetch, load_model

    return load_model(fetch(str(tiny_model)), dtype="float32", device="cpu")


def test_what_is_summed_is_what_each_matrix_is_multiplied_with(loaded, tiny_model, tmp_path):
    from fintune.export.gguf.imatrix import compute_imatrix

    texts = [[5, 9, 3, 77], [8, 5]]
    num = compute_imatrix(loaded, texts, tmp_path / "m.gguf", dataset="texts", max_tokens=100)
    read = read_imatrix(tmp_path / "m.gguf")
    assert num == 6 and len(read.columns) == 14
    # The queries of the first layer see the normalised embeddings, which need no attention to be known.
    weights = load_file(tiny_model / "model.safetensors")
    rows = weights["model.embed_tokens.weight"][[token for text in texts for token in text]].astype(np.float64)
    rows /= np.sqrt((rows**2).mean(1, keepdims=True) + loaded.config.rms_norm_eps)
    rows *= weights["model.layers.0.input_layernorm.weight"]
    for name in ("attn_q", "attn_k", "attn_v"):
        assert read.columns[f"blk.0.{name}.weight"] == pytest.approx((rows**2).mean(0), rel=1e-5)
    assert read.columns["blk.1.ffn_down.weight"].shape == (128,)


def test_no_text_is_begun_after_enough_tokens(loaded, tmp_path):
    from fintune.export.gguf.imatrix import compute_imatrix

    assert compute_imatrix(loaded, [[5, 6, 7]] * 9, tmp_path / "m.gguf", dataset="texts", max_tokens=7) == 9
    with pytest.raises(DataError, match="texts holds no text"):
        compute_imatrix(loaded, [], tmp_path / "m.gguf", dataset="texts", max_tokens=7)
