"""Files from outside whose content is impossible: each is one line that names the file, before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from fintune.errors import ModelError
from fintune.export.gguf.writer import write_gguf
from fintune.export.merge.adapter_reader import Adapter
from fintune.models import adapter as adapters
from fintune.models.load import fetch
from support.synthetic import lora_of, write_folder
from support.tiny import patch_json

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    base = write_folder(folder / "model", num_layers=2, hidden_size=64, num_shards=2)
    lora_of(base, folder / "adapter")
    return folder


@pytest.fixture
def model(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals / "model", tmp_path / "model"))


@pytest.fixture
def adapter(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals / "adapter", tmp_path / "adapter"))


def refuse(folder: Path, read, *, match: str = ".") -> None:
    with pytest.raises(ModelError, match=match) as raised:
        read(folder)
    text = str(raised.value)
    assert str(folder) in text and "\n" not in text and len(text) < 600


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0}, {"hidden_size": -64}, {"hidden_size": 10**12}, {"hidden_size": "big"}, {"hidden_size": 128},
        {"num_attention_heads": 7}, {"num_key_value_heads": 3}, {"head_dim": 7}, {"intermediate_size": 3},
        {"num_hidden_layers": 10**7}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"num_hidden_layers": True},
        {"vocab_size": 10**6}, {"rms_norm_eps": "x"}, {"rms_norm_eps": float("nan")}, {"rope_scaling": "x"},
        {"max_position_embeddings": "x"}, {"rope_parameters": {"rope_type": "yarn", "factor": float("inf")}},
        {"quantization_config": "x"}, {"tie_word_embeddings": "x"},
    ],
)  # fmt: skip
def test_fetch_refuses_impossible_config(model, change):
    patch_json(model / "config.json", **change)
    refuse(model, lambda folder: fetch(str(folder)))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [DEEP, "[1]", "{x", '{"a": ' + "9" * 5000 + "}", b"\xff\xfe"])
def test_fetch_refuses_unreadable_json(model, name, content):
    (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(model, lambda folder: fetch(str(folder)), match=name)


@pytest.mark.parametrize("shard", [5, ["x"], "x" * 100_000, "../../../etc/passwd", ""])
def test_fetch_refuses_index_with_odd_shards(model, shard):
    index = json.loads((model / "model.safetensors.index.json").read_text())
    patch_json(model / "model.safetensors.index.json", weight_map=index["weight_map"] | {"extra": shard})
    refuse(model, lambda folder: fetch(str(folder)), match=r"index\.json")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": [1]}, {"data_offsets": [0]}, {"data_offsets": [-8, -4]}, {"shape": "x"}, {"shape": [1]},
        {"shape": [10**18, 10**18]}, {"shape": [[1]]},
    ],
)  # fmt: skip
def test_fetch_refuses_odd_safetensors_headers(model, entry):
    path = model / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.embed_tokens.weight"] |= entry
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refuse(model, lambda folder: fetch(str(folder)), match=r"00001-of-00002")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("config.json", {"hidden_act": "gelu"}, "llama.cpp uses silu"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, r"is quantised \(gptq\)"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}}, "the vocabulary is empty"),
        ("tokenizer.json", {"added_tokens": 5}, r"tokenizer\.json"),
    ],
)
def test_write_gguf_refuses_what_it_would_get_wrong(model, tmp_path, name, change, match):
    patch_json(model / name, **change)
    refuse(model, lambda folder: write_gguf(folder, {"Q8_0": tmp_path / "m.gguf"}), match=match)


def test_write_gguf_refuses_unreadable_readme_and_nan(model, tmp_path):
    (model / "README.md").write_text("---\nlicense: [1\n---\n")
    refuse(model, lambda folder: write_gguf(folder, {"Q8_0": tmp_path / "m.gguf"}), match=r"README\.md")
    (model / "README.md").unlink()
    path = model / "model-00001-of-00002.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][0, 0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"embed_tokens\.weight holds values that are not finite"):
        write_gguf(model, {"Q8_0": tmp_path / "m.gguf"})


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": "x"}, {"lora_alpha": float("nan")}, {"lora_alpha": 10**400}, {"r": "x"}, {"r": 0}, {"r": 9},
        {"alpha_pattern": [1]}, {"alpha_pattern": {"q_proj(": 3}}, {"alpha_pattern": {"q_proj": "x"}},
        {"rank_pattern": {"q_proj": 2}}, {"target_modules": 5}, {"target_modules": "("}, {"bias": [1]},
        {"init_lora_weights": {"a": 1}}, {"peft_type": [1]}, {"peft_type": "NOPE"}, {"base_model_name_or_path": 5},
    ],
)  # fmt: skip
def test_adapter_refuses_impossible_configuration(adapter, change):
    patch_json(adapter / "adapter_config.json", **change)
    refuse(adapter, Adapter)


@pytest.mark.parametrize("content", [DEEP, b"\xff", "[1]"])
def test_adapter_refuses_unreadable_files(adapter, content):
    content = content if isinstance(content, bytes) else content.encode()
    (adapter / "adapter_config.json").write_bytes(content)
    refuse(adapter, Adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (adapter / "adapter_model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    refuse(adapter, Adapter)


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern", "target_modules"])
def test_adapter_patterns_are_matched_in_bounded_time(adapter, monkeypatch, key):
    monkeypatch.setattr(adapters, "_MATCH_SECONDS", 0.5)
    pattern = "(([a-z_.0-9]+)+)+!"
    patch_json(adapter / "adapter_config.json", **{key: pattern if key == "target_modules" else {pattern: 4}})
    refuse(adapter, Adapter, match="patterns of module names")


def test_adapter_patterns_follow_peft(adapter):
    patterns = {r"layers\.(0|2)\..*q_proj": 3.0, "(?:.*self_attn.q_)proj": 5.0}
    patch_json(adapter / "adapter_config.json", alpha_pattern=patterns)
    scales = {name: change.scale for name, change in Adapter(adapter).changes.items()}
    assert [scale * 4 for scale in scales.values()] == [3.0, 5.0]
