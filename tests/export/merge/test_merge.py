"""Merging shard by shard: PEFT's bits, what a merged folder holds, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fintune.errors import ArtifactError, ModelError, ResourceError
from fintune.export.merge import merge as module
from fintune.export.merge.merge import merge_folders
from fintune.models.adapter import load_adapter, quiet_peft
from fintune.models.folder import model_fingerprint
from fintune.models.load import fetch, load_model
from fintune.models.safetensors_files import from_stored, to_stored
from fintune.util.console import quiet_libraries
from support.synthetic import lora_of, write_folder
from support.tiny import make_tiny_model, patch_json

torch = pytest.importorskip("torch")

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 8},
    "patterns": {"alpha_pattern": {"v_proj": 3, "layers.1.mlp.up_proj": 7}, "rank_pattern": {"q_proj|k_proj": 2}},
    "dora": {"use_dora": True},
    "high-rank": {"r": 256},
    "dora-high-rank": {"r": 160, "use_dora": True, "use_rslora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "down_proj"]},
    "embedding-dora": {"target_modules": ["embed_tokens", "down_proj"], "use_dora": True},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("merge") / "untied", tie_word_embeddings=False)


def adapted(base: Path, **options: object):
    """The base with random adapter weights."""
    from peft import LoraConfig, get_peft_model

    model = load_model(fetch(str(base)), dtype="float32", device="cpu")
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    with quiet_libraries(), quiet_peft():
        wrapped = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(5)
    for name, weight in wrapped.named_parameters():
        if weight.requires_grad:
            by = 1.5 if "magnitude" in name else 0.0
            weight.data = weight.data * by + torch.randn_like(weight) * (0.01 if by else 0.1)
    return wrapped


def saved(base: Path, folder: Path, **options: object) -> Path:
    with quiet_libraries():
        adapted(base, **options).save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def merged(base: Path, adapter: Path, folder: Path, **options: object) -> Path:
    folder.mkdir()
    merge_folders(base, adapter, folder, **options)
    return folder


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 60)[None]).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_sums_are_pefts_bit_for_bit(untied, tmp_path, kind):
    adapter = saved(untied, tmp_path / "adapter", **KINDS[kind])
    with quiet_libraries():
        theirs = load_adapter(load_model(fetch(str(untied)), dtype="float32", device="cpu"), adapter)
        theirs = theirs.merge_and_unload().state_dict()
    ours = load_file(merged(untied, adapter, tmp_path / "merged") / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name].numpy())] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_torchs(untied, tmp_path, dtype):
    adapter = saved(untied, tmp_path / "adapter")
    exact = load_file(merged(untied, adapter, tmp_path / "exact") / "model.safetensors")
    from safetensors.torch import load_file as load_torch

    rounded = load_torch(merged(untied, adapter, tmp_path / "rounded", dtype=dtype) / "model.safetensors")
    for name, values in exact.items():
        assert torch.equal(rounded[name], torch.from_numpy(values).to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000])
def test_a_number_that_is_none_stays_none_whatever_its_bits(dtype, bits):
    spoilt = np.array([bits, 0x3F800000], np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        found = from_stored(to_stored(spoilt, dtype))
    assert np.array_equal(found, spoilt, equal_nan=True)


def test_an_adapter_with_a_number_that_is_none_is_refused(untied, tmp_path):
    adapter = saved(untied, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name].view(np.uint32)[0, 0] = 0x7FFFFFFF
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="holds values that are not finite in bfloat16: the training diverged"):
        merged(untied, adapter, tmp_path / "merged", dtype="bfloat16")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("dora", [False, True])
def test_tied_embeddings_of_which_one_was_adapted_are_parted(tiny_model, tmp_path, target, dora):
    adapter = saved(tiny_model, tmp_path / "adapter", target_modules=[target, "q_proj"], use_dora=dora)
    with quiet_libraries():
        expected = logits(load_adapter(load_model(fetch(str(tiny_model)), dtype="float32", device="cpu"), adapter))
    folder = merged(tiny_model, adapter, tmp_path / "merged")
    found = logits(load_model(fetch(str(folder)), dtype="float32", device="cpu"))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert float((expected - found).abs().max()) < 1e-4


def test_a_tied_model_whose_embeddings_stand_still_stays_tied(tiny_model, tmp_path):
    folder = merged(tiny_model, saved(tiny_model, tmp_path / "adapter"), tmp_path / "merged")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merge_refuses_grown_vocabulary_without_embeddings(untied, tmp_path, target):
    grown = make_tiny_model(tmp_path / "grown", tie_word_embeddings=False, vocab_size=408)
    adapter = saved(grown, tmp_path / "adapter", target_modules=[target, "q_proj"])
    patch_json(adapter / "adapter_config.json", base_model_name_or_path="someone/base")  # whose weights nobody knows
    (tmp_path / "merged").mkdir()
    told = r"with a vocabulary of 408 tokens, .* has 400, and the resized embeddings were not saved .*save_embedding_l"
    with pytest.raises(ModelError, match=told):
        merge_folders(untied, adapter, tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_merge_keeps_grown_vocabulary_and_tokenizer(tiny_model, tmp_path):
    adapter = saved(tiny_model, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    grown = np.ones((408, 64), np.float32)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[f"base_model.model.{name}"] = grown
    save_file(tensors, adapter / "adapter_model.safetensors")
    tokenizer = json.loads((tiny_model / "tokenizer.json").read_text())
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    folder = merged(tiny_model, adapter, tmp_path / "merged")
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (408, True)
    assert (folder / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape == (408, 64)


def test_shards_keep_their_names_and_tensors(tmp_path):
    base = write_folder(tmp_path / "base", num_shards=3, dtype="F16")
    adapter = lora_of(base, tmp_path / "adapter")
    folder = merged(base, adapter, tmp_path / "merged")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    for path in sorted(base.glob("*.safetensors")):
        old, new = load_file(path), load_file(folder / path.name)
        assert {name: (v.shape, v.dtype) for name, v in old.items()} == {n: (v.shape, v.dtype) for n, v in new.items()}
        assert all(("q_proj" in name) != np.array_equal(old[name], new[name]) for name in old)


def test_slabs_smaller_than_a_matrix_change_nothing(llama_folder, tmp_path, monkeypatch):
    adapter = lora_of(llama_folder, tmp_path / "adapter")
    whole = merged(llama_folder, adapter, tmp_path / "whole")
    monkeypatch.setattr(module, "_SLAB_ELEMENTS", 256 * 30)
    assert model_fingerprint(merged(llama_folder, adapter, tmp_path / "slabs")) == model_fingerprint(whole)


def test_older_readers_find_the_rotary_base_and_the_type(llama_folder, tmp_path):
    folder = merged(llama_folder, lora_of(llama_folder, tmp_path / "adapter"), tmp_path / "merged", dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"


def test_weights_that_rounding_holds_back_are_named(llama_folder, tmp_path):
    adapter = lora_of(llama_folder, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"] *= np.float32(1e-9)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=r"1 of 3 adapted weights .*float16, .*layers\.1\.self_attn\.q_proj"):
        merged(llama_folder, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged" / "config.json").exists()


def test_an_adapter_of_another_base_names_both(llama_folder, tmp_path):
    other = write_folder(tmp_path / "other", hidden_size=320, num_layers=4)
    adapter = lora_of(other, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"trained on the/right-one, not on .*256\] in the base and \[320, 320\]"):
        merged(llama_folder, adapter, tmp_path / "merged")
    deeper = lora_of(write_folder(tmp_path / "deeper", num_layers=4), tmp_path / "deep")
    with pytest.raises(ModelError, match=r"it adapts model\.layers\.3\.self_attn\.q_proj, which is missing there"):
        merged(llama_folder, deeper, tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'"),
        ({"bias": "all"}, 'bias is "all"'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa"'),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
)
def test_an_adapter_that_changes_more_than_low_rank_is_refused(llama_folder, tmp_path, changes, message):
    adapter = lora_of(llama_folder, tmp_path / "adapter", **changes)
    with pytest.raises(ModelError, match=message):
        merged(llama_folder, adapter, tmp_path / "merged")


def test_half_a_pair_and_a_folder_without_adapter_are_refused(llama_folder, tmp_path):
    adapter = lora_of(llama_folder, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.2\.self_attn\.q_proj lacks one of its two matrices"):
        merged(llama_folder, adapter, tmp_path / "merged")
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        merged(llama_folder, llama_folder, tmp_path / "again")


def test_a_quantised_truncated_or_incomplete_base_is_refused(llama_folder, tmp_path):
    adapter = lora_of(llama_folder, tmp_path / "adapter")
    base = Path(shutil.copytree(llama_folder, tmp_path / "base"))
    patch_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match=r"is quantised \(bitsandbytes\): it can neither"):
        merged(base, adapter, tmp_path / "a")
    patch_json(base / "config.json", quantization_config=None)
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors has [\d,]+ bytes"):
        merged(base, adapter, tmp_path / "b")
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        merged(base, adapter, tmp_path / "c")


def test_merge_refuses_a_small_disk_before_writing(llama_folder, tmp_path, monkeypatch):
    adapter = lora_of(llama_folder, tmp_path / "adapter")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"no space for the merged model: .* 1 kB is free"):
        merged(llama_folder, adapter, tmp_path / "merged")
    assert list((tmp_path / "merged").iterdir()) == []


def test_a_killed_merge_leaves_nothing_that_loads_as_a_model(tmp_path):
    base = write_folder(tmp_path / "base", num_shards=2)
    adapter = lora_of(base, tmp_path / "adapter")
    folder = tmp_path / "merged"
    folder.mkdir()
    kill = "lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done > total * 0.7 else None"
    code = "import os, signal\nfrom pathlib import Path\nfrom fintune.export.merge.merge import merge_folders\n"
    code += f"merge_folders(Path({str(base)!r}), Path({str(adapter)!r}), Path({str(folder)!r}), progress={kill})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert (folder / "model-00001-of-00002.safetensors").is_file()
    with pytest.raises(ModelError, match=r"config\.json"):
        fetch(str(folder))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    peaks = []
    for num_layers in (2, 24):
        base = write_folder(tmp_path / f"base{num_layers}", num_layers=num_layers, hidden_size=512)
        adapter = lora_of(base, tmp_path / f"adapter{num_layers}")
        folder = tmp_path / f"merged{num_layers}"
        folder.mkdir()
        code = "from pathlib import Path\nfrom fintune.export.merge.merge import merge_folders\n"
        code += f"merge_folders(Path({str(base)!r}), Path({str(adapter)!r}), Path({str(folder)!r}))\n"
        # What getrusage says would count the parent's memory, which a child has until it loads another program.
        code += "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout) * 1024)
    grown = (tmp_path / "base24" / "model.safetensors").stat().st_size
    assert grown > 100_000_000
    assert peaks[1] - peaks[0] < grown / 5
    assert peaks[1] < 300_000_000
