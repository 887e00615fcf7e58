from __future__ import annotations

import json
import shutil

import pytest

from fintune.cli.plan import memory_plan_lines
from fintune.config.load import load
from fintune.errors import ConfigError, ModelError, ResourceError
from fintune.training.memory.model import GIB, format_distinct, format_usage
from support.hub_server import HubServer
from support.model_shapes import LLAMA_3B

WEIGHTS = "model.safetensors"


@pytest.fixture
def lines(tmp_path, tiny_model):
    """Lines of the plan for a folder whose configuration is a large model's; its weights are never read."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)

    def run(gib, *overrides, model=LLAMA_3B, **options):
        config = json.loads((tiny_model / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "head_dim": 128, **model}))
        path = tmp_path / "run.yaml"
        path.write_text(
            f"model: {{name: {folder}}}\ntrain: {{per_device_train_batch_size: 16}}\nprompt: {{max_length: 1024}}\n"
        )
        return memory_plan_lines(load(path, overrides).config, gib=gib, **options)

    return run


def test_plan_large_gpu_recomputes_nothing(lines):
    said = lines(80)
    assert said[1] == "fits: 39.1 GiB predicted of 78.8 (80.0 less 1.25 for the context and the allocator)"
    assert said[2:] == [
        "a step: one pass over a batch of 16",
        "- no layer recomputed: all activations fit 78.8 GiB",
        "- 4 bits are not needed: the 16-bit model fits",
    ]


def test_plan_small_gpu_recomputes(lines):
    said = lines(24, "train.max_memory_gib=9")
    assert "of 9.0" in said[1]
    assert "- 28 of 28 layers recomputed" in "\n".join(said) or "do not fit 9.0 GiB" in "\n".join(said)


def test_plan_several_gpus_shard_if_needed(lines):
    said = lines(80, "train.gpus=4")
    assert "64 examples a step" in said[0]
    assert said[2] == "a step: one pass over a batch of 16 on each of 4 GPUs, which hold the whole model"
    small = ("train.gpus=8", "train.per_device_train_batch_size=1")
    assert said[1].startswith("fits: 39.1 GiB")
    for asked in ((), ("train.gradient_checkpointing=true",)):
        divided = lines(5, *small, *asked)[1]
        assert divided.endswith("on each of 8 GPUs, the frozen weights divided (FSDP2), all layers recomputed")
    kept = lines(10, *small, "train.sharding=full")[1]
    assert kept.endswith("of 8.8 on each of 8 GPUs, the frozen weights divided (FSDP2)")
    with pytest.raises(ResourceError, match=r"on each of 2 GPUs, .*: use a smaller train\.per_device_train_batch_size"):
        lines(6, "train.gpus=2")
    with pytest.raises(ConfigError, match=r"adapter\.init_lora_weights: pissa is not proven on several GPUs"):
        lines(80, "train.gpus=2", "adapter.init_lora_weights=pissa")


def test_plan_transformers_layers(lines):
    fused, modules = (
        lines(40, "train.per_device_train_batch_size=4")[1:],
        lines(40, "train.per_device_train_batch_size=4", "train.fused_layers=never")[1:],
    )
    assert len(modules) == 1
    assert modules[0].endswith("of 38.8 with the layers of transformers")
    assert fused[0].split()[1] != modules[0].split()[2]
    assert lines(16, "train.fused_layers=never")[1].endswith(
        "of 14.8 with the layers of transformers, all layers recomputed"
    )
    with pytest.raises(
        ResourceError,
        match=r"layers recomputed, but only 7\.8 GiB may be used: use a smaller train.per",
    ):
        lines(9, "train.fused_layers=never")


def test_plan_names_the_origin_of_the_limit(lines):
    assert lines(24, "train.max_memory_gib=14")[1].endswith("of 14.0 (train.max_memory_gib)")
    with pytest.raises(ResourceError, match=r"only 0 MiB may be used"):
        lines(1)


def test_plan_formats_small_and_close_sizes(lines):
    with pytest.raises(ResourceError, match=r"needs .* GiB for .*, but only 512 MiB may be used"):
        lines(24, "train.max_memory_gib=0.5")
    assert format_distinct(600 * 2**20, 512 * 2**20) == ("600 MiB", "512 MiB")
    assert format_distinct(int(7.84 * GIB), int(7.81 * GIB)) == ("7.84 GiB", "7.81 GiB")
    assert format_distinct(2**20 + 1, 2**20) == ("1,048,577 bytes", "1,048,576 bytes")
    assert format_usage(2**29, 8 * GIB, " predicted") == "512 MiB predicted of 8.0 GiB"
    assert format_usage(2**29, 2**29 + 2**20) == "512 MiB of 513"


def test_plan_that_does_not_fit_names_what_would(lines):
    with pytest.raises(
        ResourceError, match=r"needs .* GiB for one example of 1024 tokens .*: use model.quantization=nf4"
    ):
        lines(6)


def test_plan_refuses_unsupported_models_and_methods(lines):
    with pytest.raises(ConfigError, match="supports llama, mistral, qwen2, qwen3, not gemma3"):
        lines(24, model={**LLAMA_3B, "model_type": "gemma3"})
    with pytest.raises(ConfigError, match=r"not adapter\.kind: full"):
        lines(24, "adapter.kind=full")
    with pytest.raises(ConfigError, match=r"supports train\.backend: builtin, not unsloth"):
        lines(24, "train.backend=unsloth")
    with pytest.raises(ConfigError, match=r"supports adapters of q_proj, .*, not of nonsense"):
        lines(24, "adapter.target_modules=[nonsense]")
    with pytest.raises(ConfigError, match=r"supports train\.objective: sft, not dpo"):
        lines(24, "data.source=chat", "data.sources=[pairs.jsonl]", "train.objective=dpo")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that serves one model's configuration and weights; counts what is asked of it."""
    server = HubServer(
        "owner/model",
        {"config.json": json.dumps({"max_position_embeddings": 131072, **LLAMA_3B}).encode(), WEIGHTS: b"0" * 99},
        kind="models",
    )
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    pattern = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", pattern)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.close()


def test_plan_fetches_only_the_configuration(hub, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: owner/model}\nprompt: {max_length: 1024}\n")
    said = memory_plan_lines(load(path, ()).config, gib=80)
    assert said[0].startswith("owner/model, lora r=16 on 16-bit weights")
    fetched = [request for request in hub.asked if "/resolve/" in request]
    assert "GET /owner/model/resolve/main/config.json" in fetched
    assert all(request.endswith("/config.json") for request in fetched)
    assert not any(WEIGHTS in request or "/tree/" in request for request in hub.asked)


def test_plan_hub_model_without_configuration(hub, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: owner/model}\n")
    del hub.files["config.json"]
    with pytest.raises(ModelError, match=r"owner/model on the hub has no config\.json"):
        memory_plan_lines(load(path, ()).config, gib=80)
    path.write_text("model: {name: owner/other}\n")
    with pytest.raises(ModelError, match="no folder owner/other here and no model of that name on the hub"):
        memory_plan_lines(load(path, ()).config, gib=80)


def test_plan_folder_without_weights(tiny_model, tmp_path):
    folder = tmp_path / "q14"
    folder.mkdir()
    config = json.loads((tiny_model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 128, **LLAMA_3B}))
    said = memory_plan_lines(load(None, [f"model.name={folder}", "train.per_device_train_batch_size=1"]).config, gib=24)
    assert said[0].startswith(f"{folder}, lora r=16 on 16-bit weights, 1 example a step")
    assert said[1].startswith("fits: ")


def test_plan_without_gpu_asks_for_gib(lines):
    with pytest.raises(ResourceError, match=r"no CUDA GPU to plan for: .*--gib 24"):
        lines(None)
