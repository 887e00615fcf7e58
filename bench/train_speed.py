"""Training speed of this package and of its peers on one CUDA GPU, in turn, in one run.

::

    python bench/train_speed.py --out bench/results/train_speed_h100.json

Models have the true shapes and random weights; every token is trained; every variant goes through TRL's SFTTrainer, the
peers as their users start them. A variant is a process of its own: all of them import first, then each is let through
alone. A step is a whole iteration of the trainer, from end to end of a step, with the GPU waited for; the median of
the timed ones counts. Peers that need packages of their own find them through ``--peer-path unsloth=FOLDER``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from shapes import SIZES, settings
from support.paths import ROOT

WARM_UP, TIMED = 4, 10
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SHAPES = {
    "14B QLoRA r=32, 1 x 4096": {"model": "14b", "four_bit": True, "rank": 32, "batch": 1, "length": 4096},
    "3B LoRA r=16, 16 x 1024": {"model": "3b", "rank": 16, "batch": 16, "length": 1024},
    "3B LoRA r=16, 4 x 1024": {"model": "3b", "rank": 16, "batch": 4, "length": 1024},
    "3B LoRA r=16, 4 x 900 +- 130": {"model": "3b", "rank": 16, "batch": 4, "length": 4096, "report_lengths": True},
    "tiny": {"model": "tiny", "rank": 4, "batch": 2, "length": 64},
}

A, B, C, D = (name for name in SHAPES if name != "tiny")
VARIANTS = [
    {"shape": A, "who": "fintune"},
    {"shape": A, "who": "unsloth", "checkpointing": False},
    {"shape": A, "who": "trl", "compile": True, "checkpointing": False},
    {"shape": A, "who": "fintune", "limit_gib": 14},
    {"shape": A, "who": "unsloth", "checkpointing": True},
    {"shape": A, "who": "trl", "compile": True, "checkpointing": True},
    {"shape": A, "who": "fintune", "dora": True},
    {"shape": B, "who": "fintune"},
    {"shape": B, "who": "unsloth", "checkpointing": False},
    {"shape": B, "who": "fintune", "limit_gib": 14},
    {"shape": B, "who": "trl", "compile": True, "checkpointing": True},
    {"shape": B, "who": "unsloth", "checkpointing": True},
    {"shape": B, "who": "fintune", "dora": True},
    {"shape": C, "who": "fintune"},
    {"shape": C, "who": "fintune", "dora": True},
    {"shape": C, "who": "trl", "compile": True, "checkpointing": True},
    {"shape": D, "who": "fintune"},
    {"shape": D, "who": "unsloth", "checkpointing": True, "padding_free": True},
    {"shape": D, "who": "trl", "checkpointing": True},
    {"shape": B, "who": "trl", "checkpointing": True},
    {"shape": A, "who": "trl", "checkpointing": True},
]


def _name_of(variant: dict) -> str:
    words = [variant["who"]]
    words += ["layer compile"] if variant.get("compile") else []
    if variant["who"] == "fintune":
        words += [f"within {variant['limit_gib']} GiB"] if variant.get("limit_gib") else []
    else:
        words += ["checkpointing" if variant.get("checkpointing") else "no checkpointing"]
    words += ["padding-free"] if variant.get("padding_free") else []
    words += ["DoRA"] if variant.get("dora") else []
    return ", ".join(words)


# -- one variant, in a process of its own


def _worker(variant: dict) -> None:
    """Import, say so, wait for the word, run, print one line."""
    if variant["who"] == "unsloth":
        import unsloth  # noqa: F401 - must come before the libraries that it changes
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    import trl  # noqa: F401

    print("READY", flush=True)
    sys.stdin.readline()
    try:
        result = {"ok": True, **_run(variant)}
    except Exception as error:
        result = {
            "ok": False,
            "error": f"{type(error).__name__}: {str(error)[:500]}",
            "trace": traceback.format_exc()[-2000:],
        }
    print("RESULT " + json.dumps(result), flush=True)


def _run(variant: dict) -> dict:
    import torch
    from transformers import PrinterCallback

    shape = SHAPES[variant["shape"]]
    cuda = torch.cuda.is_available()
    folder = _tokenizer_folder(shape["model"])
    model, tokenizer = (_unsloth_model if variant["who"] == "unsloth" else _plain_model)(variant, shape, folder)
    _tidy()
    rows = _make_rows(shape)
    clock = _make_clock()
    trainer, extra = (_own_trainer if variant["who"] == "fintune" else _peer_trainer)(
        variant, shape, model, tokenizer, rows, clock
    )
    trainer.remove_callback(PrinterCallback)
    if variant.get("compile"):
        for layer in trainer.model.get_base_model().model.layers:
            layer.compile()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    steps = [later - earlier for earlier, later in itertools.pairwise(clock.ends[WARM_UP - 1 :])]
    tokens = [sum(len(ids) for ids in rows[at : at + shape["batch"]]) for at in range(0, len(rows), shape["batch"])]
    tokens = tokens[WARM_UP:]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "step_ms": round(1e3 * statistics.median(steps), 1),
        "step_ms_all": [round(1e3 * step, 1) for step in steps],
        # The mean, since the lengths differ from step to step.
        "tokens_per_second": round(sum(tokens) / sum(steps), 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "last_loss": round(losses[-1], 4),
        **extra,
    }


def _tidy() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _make_rows(shape: dict) -> list[list[int]]:
    draw = random.Random(0)  # noqa: S311 - token ids, no secret
    vocabulary = SIZES[shape["model"]]["vocab_size"]

    def length() -> int:
        if not shape.get("report_lengths"):
            return shape["length"]
        return max(300, min(shape["length"], round(draw.gauss(900, 130))))

    count = (WARM_UP + TIMED) * shape["batch"]
    return [[draw.randrange(4, vocabulary) for _ in range(length())] for _ in range(count)]


def _make_clock():
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends = []

        def on_step_end(self, *_args, **_kwargs) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    return Clock()


def _configuration(model: str):
    from transformers import AutoConfig

    given = settings(model)
    kind = given.pop("model_type")
    classes = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    return AutoConfig.for_model(
        kind,
        **given,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        architectures=[classes[kind]],
        dtype="bfloat16",
    )


def _tokenizer_folder(model: str) -> str:
    """A folder with a configuration and a tokenizer that nobody asks anything, but that trainers want."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = Path(tempfile.gettempdir()) / f"fintune-bench-{model}-{os.getpid()}"
    words = {word: at for at, word in enumerate(["<pad>", "<s>", "</s>", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106 - a token of the vocabulary
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": word for word, name in zip(words, ("pad", "bos", "eos", "unk"), strict=True)},
    ).save_pretrained(folder)
    _configuration(model).save_pretrained(folder)
    return str(folder)


def _random_weights(config) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(0)
    made = {}
    for name, weight in empty.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        made[name] = torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
        if "norm" in name:
            made[name].fill_(1.0)
        else:
            made[name].normal_(0, 0.02, generator=generator)
    return made


def _from_random(config, **options):
    import torch
    import transformers

    kind = getattr(transformers, config.architectures[0])
    weights = _random_weights(config)
    if torch.cuda.is_available():
        options.setdefault("device_map", {"": 0})
    model = kind.from_pretrained(None, config=config, state_dict=weights, **options)
    weights.clear()
    return model


def _plain_model(variant: dict, shape: dict, folder: str):
    import torch
    from transformers import AutoTokenizer, BitsAndBytesConfig

    options = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    if shape.get("four_bit"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return _from_random(_configuration(shape["model"]), **options), AutoTokenizer.from_pretrained(folder)


def _unsloth_model(variant: dict, shape: dict, folder: str):
    """Unsloth's own loader on the folder; where it asks transformers for the weights, it is handed random ones."""
    import torch
    import unsloth.models.llama as loader
    from transformers import AutoConfig
    from unsloth import FastLanguageModel

    def load(name, *_args, config=None, **options):
        for unknown in ("token", "trust_remote_code", "revision", "local_files_only", "cache_dir"):
            options.pop(unknown, None)
        positions = options.pop("max_position_embeddings", None)
        config = config or AutoConfig.from_pretrained(name)
        if positions:
            config.max_position_embeddings = positions
        return _from_random(config, **options)

    theirs = loader.AutoModelForCausalLM.from_pretrained
    loader.AutoModelForCausalLM.from_pretrained = staticmethod(load)
    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=folder,
            max_seq_length=shape["length"],
            dtype=torch.bfloat16,
            load_in_4bit=bool(shape.get("four_bit")),
            use_exact_model_name=True,
            local_files_only=True,
        )
    finally:
        loader.AutoModelForCausalLM.from_pretrained = theirs
    model = FastLanguageModel.get_peft_model(
        model,
        r=shape["rank"],
        lora_lora_alpha=2 * shape["rank"],
        lora_dropout=0.0,
        bias="none",
        target_modules=LINEAR,
        use_gradient_checkpointing="unsloth" if variant["checkpointing"] else False,
        random_state=3407,
    )
    return model, tokenizer


def _arguments(shape: dict, **options):
    import torch
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(Path(tempfile.gettempdir()) / f"fintune-bench-out-{os.getpid()}"),
        per_device_train_batch_size=options.pop("batch", shape["batch"]),
        gradient_accumulation_steps=options.pop("accumulation", 1),
        max_steps=WARM_UP + TIMED,
        learning_rate=1e-4,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=cuda,
        use_cpu=not cuda,
        max_length=shape["length"],
        dataloader_num_workers=0,
        disable_tqdm=True,
        **options,
    )


def _peer_trainer(variant: dict, shape: dict, model, tokenizer, rows, clock):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTTrainer

    options = {"gradient_checkpointing": variant.get("checkpointing", False)}
    if variant.get("padding_free"):
        options["padding_free"] = True
    more = {}
    if variant["who"] == "trl":
        more["peft_config"] = LoraConfig(
            r=shape["rank"],
            lora_lora_alpha=2 * shape["rank"],
            target_modules=LINEAR,
            use_dora=variant.get("dora", False),
            task_type="CAUSAL_LM",
        )
    trainer = SFTTrainer(
        model=model,
        args=_arguments(shape, **options),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        callbacks=[clock],
        **more,
    )
    return trainer, {}


def _own_trainer(variant: dict, shape: dict, model, tokenizer, rows, clock):
    """What ``fintune train`` does, with the planner's choice."""
    import torch
    from datasets import Dataset

    from fintune.config import AdapterOptions
    from fintune.training.fused.batch import PackedCollator
    from fintune.training.fused.trainer import FusedTrainer
    from fintune.training.lora import attach_adapter
    from fintune.training.memory.model import GIB, RESERVE_BYTES, AdapterMethod, DecoderShape, choose_plan

    kind = "dora" if variant.get("dora") else "lora"
    model = attach_adapter(model, AdapterOptions(kind=kind, r=shape["rank"], lora_alpha=2 * shape["rank"]))
    cuda = torch.cuda.is_available()
    limit = torch.cuda.get_device_properties(0).total_memory - RESERVE_BYTES if cuda else 8 * GIB
    if variant.get("limit_gib"):
        limit = variant["limit_gib"] * GIB
    longest = max(map(len, rows))
    plan = choose_plan(
        DecoderShape.from_config(model.get_base_model().config.to_dict()),
        AdapterMethod(shape["rank"], dora=kind == "dora", four_bit=bool(shape.get("four_bit"))),
        batch_size=shape["batch"],
        accumulation=1,
        longest=longest,
        limit_bytes=limit,
    )
    trainer = FusedTrainer(
        options={
            "dtype": torch.bfloat16 if cuda else torch.float32,
            "hold": plan.setting.unpacked,
            "num_checkpointed": plan.setting.num_checkpointed,
        },
        model=model,
        args=_arguments(
            shape,
            batch=plan.batch_size,
            accumulation=plan.accumulation,
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        data_collator=PackedCollator(),
        train_dataset=Dataset.from_dict(
            {"input_ids": rows, "completion_mask": [[0] + [1] * (len(row) - 1) for row in rows]}
        ),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    return trainer, {
        "plan": {
            "checkpointed_layers": plan.setting.num_checkpointed,
            "unpacked": plan.setting.unpacked,
            "batch": plan.batch_size,
            "accumulation": plan.accumulation,
            "predicted_gib": round(plan.predicted_bytes / GIB, 2),
            "reasons": plan.reasons,
        }
    }


# -- all variants


def _start(variant: dict, paths: dict[str, str]) -> subprocess.Popen:
    path = paths.get(variant["who"], os.environ.get("PYTHONPATH", ""))
    source = str(ROOT / "src")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([source, path]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp(prefix="unsloth-compiled-"),
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(variant)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, bufsize=1
    )


def _read_until(process: subprocess.Popen, word: str) -> str | None:
    for line in process.stdout:
        if line.startswith(word):
            return line
        LOG.append(line)
    return None


LOG: list[str] = []


def main() -> None:
    """Run the variants that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results; kept up to date after every variant")
    parser.add_argument("--only", default="", help="numbers of variants, with commas; all where empty")
    parser.add_argument("--shape", help="only this shape")
    parser.add_argument("--seconds", type=float, default=3000, help="start no variant after so many")
    parser.add_argument("--peer-path", action="append", default=[], metavar="WHO=PYTHONPATH")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _worker(json.loads(options.worker))
        return
    chosen = [dict(each) for each in VARIANTS if options.shape in (None, each["shape"])]
    if options.shape == "tiny":
        chosen = [{"shape": "tiny", "who": "fintune"}, {"shape": "tiny", "who": "trl", "checkpointing": False}]
    if options.only:
        chosen = [VARIANTS[int(number)] for number in options.only.split(",")]
    began = time.monotonic()
    paths = dict(each.split("=", 1) for each in options.peer_path)
    processes = [_start(variant, paths) for variant in chosen]
    for process in processes:
        _read_until(process, "READY")
    print(f"{len(processes)} processes have imported, {time.monotonic() - began:.0f} s", flush=True)
    results = []
    for variant, process in zip(chosen, processes, strict=True):
        if time.monotonic() - began > options.seconds:
            process.kill()
            continue
        LOG.clear()
        process.stdin.write("go\n")
        line = _read_until(process, "RESULT ")
        process.wait()
        result = json.loads(line[7:]) if line else {"ok": False, "error": "".join(LOG[-15:])}
        results.append({"shape": variant["shape"], "variant": _name_of(variant), **result})
        _show(results[-1])
        if options.out:
            options.out.write_text(json.dumps(_report(results), indent=1) + "\n")


def _show(result: dict) -> None:
    what = f"{result['shape']:30} {result['variant']:42}"
    if not result["ok"]:
        print(f"{what} FAILED {result['error']}", flush=True)
        return
    plan = result.get("plan")
    planned = f"  plan {plan['predicted_gib']} GiB, {plan['checkpointed_layers']} recomputed" if plan else ""
    print(
        f"{what} {result['step_ms']:8.1f} ms {result['tokens_per_second']:9.0f} tok/s "
        f"{result['peak_gib'] or 0:6.2f} GiB  loss {result['last_loss']:.3f}{planned}",
        flush=True,
    )


def _report(results: list[dict]) -> dict:
    from importlib import metadata

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "absent"

    import torch

    names = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "triton", "unsloth", "datasets")
    return {
        "machine": torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor(),
        "versions": {name: version(name) for name in names},
        "steps": {"warm_up": WARM_UP, "timed": TIMED},
        "results": results,
    }


if __name__ == "__main__":
    main()
