from __future__ import annotations

import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file, save_file

from fintune.errors import ModelError, ResourceError
from fintune.models.folder import model_fingerprint
from fintune.models.load import (
    ModelFolder,
    ModelName,
    Precision,
    detect_precision,
    ensure_pad,
    fetch,
    fetch_config,
    load_model,
    load_tokenizer,
    resolve,
)
from support.tiny import BOS, EOS, PAD, make_tokenizer, patch_json


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def drop_chars(path, num_bytes):
    path.write_bytes(path.read_bytes()[:-num_bytes])


def shard(folder):
    """Splits the weights into two files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- resolve


def test_a_local_folder_is_found_with_its_licence(folder):
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Model\nlicense: other\n")
    assert resolve(str(folder)) == ModelName(str(folder), "model", folder, "mit")


def test_a_hub_id_is_taken_without_a_download():
    assert resolve("owner/some-model", revision="v1") == ModelName("owner/some-model", "some-model", revision="v1")


def test_the_builtin_model_is_known_by_name_and_others_are_not():
    ref = resolve("builtin:smollm2-135m")
    assert (ref.local_path, ref.base_name, ref.licence) == (None, "smollm2-135m", "apache-2.0")
    with pytest.raises(ModelError, match="no built-in model is named builtin:smollm: there is builtin:smollm2-135m"):
        resolve("builtin:smollm")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "model.gguf", "", "a b"])
def test_a_path_that_is_not_there_is_named(name):
    with pytest.raises(ModelError, match="no folder"):
        resolve(name)


def test_a_built_in_model_without_its_mark_is_answered_with_it():
    with pytest.raises(ModelError, match=r"no folder SmolLM2-135M: did you mean builtin:smollm2-135m\?"):
        resolve("SmolLM2-135M")


def test_a_file_where_a_folder_belongs_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"m\.gguf is a file"):
        resolve(str(tmp_path / "m.gguf"))


# --- incomplete folders


def test_sharded_weights_resolve_and_a_missing_shard_is_named(folder):
    shard(folder)
    assert resolve(str(folder)).local_path == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of the 2 weight files .* model-00002-of-00002\.safetensors"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        (["config.json"], [], r"holds no config\.json"),
        (["model.safetensors"], [], r"holds no safetensors weights: only safetensors are read"),
        (["model.safetensors"], ["pytorch_model.bin"], r"no safetensors weights, only pytorch_model\.bin"),
        (["model.safetensors"], ["model-q4.gguf"], r"no safetensors weights, only model-q4\.gguf"),
        (["tokenizer.json"], [], r"holds no tokenizer \(tokenizer\.json\)"),
    ],
)
def test_a_folder_that_lacks_a_part_says_which(folder, remove, add, message):
    for name in remove:
        (folder / name).unlink()
    for name in add:
        (folder / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=message) as raised:
        resolve(str(folder))
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\x10", b"not a safetensors file", b"\x02" + bytes(7) + b"[]"])
def test_a_file_that_is_no_safetensors_is_seen(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable safetensors file"):
        resolve(str(folder))


def test_an_adapter_given_as_a_model_says_how_it_becomes_one(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(ModelError) as raised:
        resolve(str(folder))
    assert f"fintune merge --model owner/base --adapter {folder} --out DIR" in str(raised.value.hint)


def test_a_runs_folder_given_as_a_model_names_the_one_in_it(folder, tmp_path):
    run = tmp_path / "runs" / "mine"
    adapter = run / "train" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(
        ModelError, match=r"mine is a run's folder without a merged model: .*--adapter .*/train/adapter"
    ):
        resolve(str(run))
    folder.rename(run / "merge")
    with pytest.raises(ModelError, match=r"mine is a run's folder, not a model: its merged model is .*/mine/merge$"):
        resolve(str(run))


# --- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A loopback hub that answers every request with one status; `answer` sets it."""

    class Handler(BaseHTTPRequestHandler):
        status, code = 404, "RepoNotFound"

        def do_GET(self):
            self.send_response(self.status)
            self.send_header("X-Error-Code", self.code)
            self.send_header("X-Error-Message", "no")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self):
            self.do_GET()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def answer(status, code):
        Handler.status, Handler.code = status, code

    yield answer
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "no folder owner/model here and no model of that name on the hub"),
        (401, "RepoNotFound", "no folder owner/model here and no model of that name on the hub"),
        (403, "GatedRepo", "only to those who accepted its licence: .*hf auth login"),
        (404, "RevisionNotFound", "no revision v9 of owner/model"),
    ],
)
def test_the_hubs_refusals_are_told_apart(hub, status, code, message):
    hub(status, code)
    with pytest.raises(ModelError, match=message):
        fetch("owner/model", revision="v9")


def test_an_unreachable_hub_is_not_an_unknown_model(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    told = "there is no folder owner/model here; taken for a hub id, owner/model cannot be fetched: the hub cannot be"
    with pytest.raises(ResourceError, match=told) as raised:
        fetch("owner/model")
    assert "builtin:smollm2-135m" in raised.value.hint
    assert "\n" not in str(raised.value)


def test_the_librarys_retries_are_not_told_beside_the_one_line(monkeypatch):
    import logging

    told: list[logging.LogRecord] = []
    library = logging.getLogger("huggingface_hub")
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", told.append)

    def retry(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("retrying in 1 s")
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", retry)
    library.addHandler(handler)
    try:
        with pytest.raises(ResourceError, match="the hub cannot be reached"):
            fetch_config("owner/model")
    finally:
        library.removeHandler(handler)
    assert told == []


# --- tokenizer and padding


def test_a_tokenizer_pads_with_something_that_ends_nothing(tiny_model):
    tokenizer = load_tokenizer(fetch(str(tiny_model)))
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, EOS)
    assert tokenizer.tokenize("12  345") == ["1", "2", "ĠĠ", "3", "4", "5"]


@pytest.mark.parametrize("pad", [EOS, BOS, None])
def test_an_unfit_pad_token_is_replaced_by_one_that_exists(pad):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad
    size = len(tokenizer)
    assert ensure_pad(tokenizer).pad_token == PAD
    assert len(tokenizer) == size


def test_a_reserved_token_pads_and_the_end_of_turn_never_does():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|reserved_special_token_7|>"]})
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.pad_token = EOS  # not the EOS token now, but still what ends a turn
    assert ensure_pad(tokenizer).pad_token == "<|reserved_special_token_7|>"


def test_ensure_pad_without_spare_token():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = PAD
    size = len(tokenizer)
    with pytest.raises(ModelError, match="no special token to pad with"):
        ensure_pad(tokenizer)
    assert len(tokenizer) == size


def test_a_tokenizer_larger_than_the_model_is_refused(folder):
    patch_json(folder / "config.json", vocab_size=300)
    with pytest.raises(ModelError, match="the tokenizer has 400 tokens, but the model only 300"):
        load_tokenizer(ModelFolder("m", folder, "m"))
    with pytest.raises(
        ModelError, match=r"embed_tokens\.weight has the shape \[400, 64\], config\.json says \[300, 64\]"
    ):
        fetch(str(folder))


def test_a_broken_tokenizer_is_one_line(folder):
    drop_chars(folder / "tokenizer.json", 100)
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read as JSON") as raised:
        load_tokenizer(fetch(str(folder)))
    assert "\n" not in str(raised.value)


# --- model


def test_load_model_uses_the_dtype_and_eval_mode(tiny_model):
    model = load_model(fetch(str(tiny_model)), dtype="float32", device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    stored = load_file(tiny_model / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
    assert load_model(fetch(str(tiny_model)), dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def test_auto_takes_the_detected_precision(tiny_model, monkeypatch):
    monkeypatch.setattr("fintune.models.load.detect_precision", lambda: Precision("float16", "because"))
    assert load_model(fetch(str(tiny_model)), device="cpu").dtype == torch.float16


def test_weights_that_would_start_at_random_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(fetch(str(folder)), dtype="float32", device="cpu")


def test_an_unknown_architecture_is_one_line(folder):
    patch_json(folder / "config.json", model_type="nosuch", architectures=["NoSuch"])
    with pytest.raises(ModelError, match=r"the model cannot be loaded .*nosuch") as raised:
        load_model(fetch(str(folder)), dtype="float32", device="cpu")
    assert "\n" not in str(raised.value)


def test_four_bit_without_bitsandbytes_says_what_to_install(tiny_model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="pip install bitsandbytes"):
        load_model(fetch(str(tiny_model)), quantization="nf4")


@pytest.mark.parametrize(
    ("capabilities", "system", "dtype"),
    [
        ({"avx512_bf16": True}, "Linux", "bfloat16"),
        ({"amx_bf16": True}, "Windows", "bfloat16"),
        ({"bf16": True}, "Linux", "bfloat16"),
        ({"bf16": True}, "Darwin", "float32"),
        ({"avx2": True, "avx512_bf16": False}, "Linux", "float32"),
    ],
)
def test_detect_precision_of_processor(monkeypatch, capabilities, system, dtype):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    monkeypatch.setattr("platform.system", lambda: system)
    found = detect_precision()
    assert found.dtype == dtype
    assert "bfloat16" in found.reason


@pytest.mark.parametrize(("supported", "dtype"), [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_computes_in_bfloat16_where_it_has_it(monkeypatch, supported, dtype):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "GPU X")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: supported)
    found = detect_precision()
    assert found.dtype == dtype
    assert found.reason.startswith("GPU X ")


# --- fingerprint


def test_the_fingerprint_is_of_content_and_not_of_time_or_place(folder, tiny_model):
    os.utime(folder / "config.json", (1, 1))
    (folder / "manifest.json").write_text("{}")
    assert model_fingerprint(folder) == model_fingerprint(tiny_model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_the_fingerprint_changes_with_each_file(folder, name):
    before = model_fingerprint(folder)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert model_fingerprint(folder) != before


def test_a_large_file_is_hashed_once_until_it_changes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FINTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fintune.models.folder._LARGE_BYTES", 1000)
    first = model_fingerprint(folder)
    # Another content under the same path, size and time can only come out equal if nothing was read again.
    weights = folder / "model.safetensors"
    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert model_fingerprint(folder) == first
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    assert model_fingerprint(folder) != first


def test_the_fingerprint_of_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="holds no model files"):
        model_fingerprint(tmp_path)
