"""``train_financial_model.py`` on a random model of the 14B Qwen2 shape, in 4 bits, for 20 steps, within 24 GiB.

::

    python bench/finance_14b.py --folder 14b --out bench/results/finance_14b.json    # one CUDA GPU, 35 GB of disk
    python bench/finance_14b.py --shape tiny --steps 2                               # a trial, on a CPU

The weights are random and of true shape, written in pieces; the conversations are generated and fill
``--max_seq_length`` tokens. The command is the guide's in 4 bits, with merge and export left out;
torch's allocator is held to what such a card leaves it, in every stage, and the planner is told as much. Recorded: what
tensors took at most, what the allocator held for them, what the whole process held on the GPU (nvidia-smi, every half
second), seconds a step, losses, the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from shapes import SIZES
from support.paths import ROOT

CARD_GIB = 24
CONTEXT_GIB = 0.7
"""Of a card, what the CUDA context and the libraries' kernels take beside the allocator."""


def main() -> None:
    """Make the model and the data, run the command, write what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("14b", "tiny"), default="14b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-seq-length", type=int, help="the guide's 4096; 256 for tiny")
    parser.add_argument("--folder", type=Path, help="for model, data and run; a temporary one where empty")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--make-model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--within", nargs=argparse.REMAINDER, metavar="GIB SCRIPT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.within:
        _run_within(float(options.within[0]), options.within[1:])
    elif options.make_model:
        _make_model(options.make_model, SIZES[options.shape])
    else:
        _measure(options)


def _measure(options: argparse.Namespace) -> None:
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="fintune-14b-"))).resolve()
    length = options.max_seq_length or (4096 if options.shape == "14b" else 256)
    model = folder / "model"
    if not (model / "model.safetensors.index.json").is_file():
        # In a process of its own: what a process once had of the GPU counts until it ends.
        words = (sys.executable, __file__, "--shape", options.shape, "--make-model", model)
        subprocess.run([str(word) for word in words], check=True)
    _conversations(folder / "datasets", 8 * min(options.steps, 20) + 16, length)
    command = _command(model, length, options.steps)
    print(" ".join(map(str, command)), flush=True)
    began = time.monotonic()
    with _Watch() as watch:
        subprocess.run([str(word) for word in command], cwd=folder, check=True)
    result = _result(folder, command, watch.peak_gib, time.monotonic() - began)
    print(json.dumps({key: value for key, value in result.items() if key not in ("losses", "versions")}, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _command(model: Path, length: int, steps: int) -> list[object]:
    from fintune.training.memory.model import GIB, RESERVE_BYTES

    limit = CARD_GIB - CONTEXT_GIB
    planned = round(limit - RESERVE_BYTES / GIB, 2)  # what is left for tensors on such a card
    return [
        *(sys.executable, Path(__file__).resolve(), "--within", limit),
        *(ROOT / "train_financial_model.py", "--model_name", model, "--investopedia", "none"),
        *("--training_quantization", "4bit", "--max_seq_length", length, "--skip_merge", "--skip_quantization"),
        *(f"train.max_steps={steps}", "train.logging_steps=1", f"train.max_memory_gib={planned}"),
    ]


def _run_within(limit_gib: float, words: list[str]) -> None:
    """Run a program as if the GPU had no more memory for tensors."""
    from fintune.util.system import configure_environment

    configure_environment()
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(limit_gib * 2**30 / total)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _make_model(folder: Path, shape: dict[str, int]) -> None:
    """A Qwen2 folder: configuration, tokenizer, random bfloat16 weights, a file a layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen2Config

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        **shape,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(0)
    pieces: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, weight in empty.state_dict().items():
        piece = name.split(".")[2] if ".layers." in name else "rest"
        pieces.setdefault(piece, {})[name] = tuple(weight.shape)
    places, total = {}, 0
    for number, names in enumerate(pieces.values(), 1):
        file = f"model-{number:05d}-of-{len(pieces):05d}.safetensors"
        made = {}
        for name, size in names.items():
            weight = torch.ones(size, dtype=torch.bfloat16, device=device)
            if "norm" not in name:
                weight.normal_(0, 0.02, generator=generator)
            made[name] = weight.cpu()
            total += weight.numel() * 2
        save_file(made, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(made, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _tokenizer():
    """Byte-level BPE with ChatML, small, since nobody asks this model anything."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[1],
        pad_token=special[0],
        eos_token=special[2],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


WORDS = (
    "the",
    "risk",
    "of",
    "this",
    "position",
    "is",
    "small",
    "while",
    "rates",
    "fall",
    "so",
    "hold",
    "with",
    "a",
    "stop",
)


def _conversations(folder: Path, number: int, length: int) -> None:
    """Each longer than fits: turns behind ``length`` tokens are left out, so that rows fill it."""
    draw = random.Random(0)  # noqa: S311 - words, no secret
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "trader_sft_data.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(number):
            turns = []
            for turn in range(length // 16):
                text = " ".join(draw.choices(WORDS, k=6))
                turns.append({"role": "assistant" if turn % 2 else "user", "content": text})
            if len(turns) % 2:
                turns.pop()
            file.write(json.dumps({"messages": turns}) + "\n")


class _Watch:
    """The most memory that the GPU's processes held, in GiB; None without one."""

    peak_gib: float | None = None

    def __enter__(self) -> _Watch:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._done.wait(0.5):
            try:
                told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
            except (OSError, subprocess.CalledProcessError):
                return
            self.peak_gib = round(max(self.peak_gib or 0.0, float(told) / 1024), 2)


def _result(folder: Path, command: list[object], watched: float | None, seconds: float) -> dict:
    manifest = json.loads((folder / "financial_lora" / "run" / "train" / "manifest.json").read_text())
    lines = (folder / "financial_lora" / "run" / "train" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    each = [later["seconds"] - earlier["seconds"] for earlier, later in itertools.pairwise(steps)]
    facts = manifest["facts"]
    told = command[command.index(ROOT / "train_financial_model.py") :]
    return {
        "command": " ".join(str(word).replace(str(folder), ".").replace(str(ROOT) + "/", "") for word in told),
        "machine": manifest["machine"],
        "processor": platform.processor(),
        "versions": manifest["versions"],
        "commit": manifest["commit"],
        "steps": facts["num_steps"],
        "tokens": facts["num_tokens"],
        "allocated_peak_gib": facts.get("peak_gib"),
        "held_peak_gib": facts.get("held_peak_gib"),
        "predicted_peak_gib": facts.get("predicted_peak_gib"),
        "recomputed_layers": facts.get("recomputed_layers"),
        "gpu_peak_gib": watched,
        "card_gib": CARD_GIB,
        "step_seconds_median": round(statistics.median(each), 3) if each else None,
        "tokens_per_second": facts["tokens_per_second"],
        "train_stage_seconds": manifest["seconds"],
        "command_seconds": round(seconds, 1),
        "losses": [round(line["loss"], 4) for line in steps],
    }


if __name__ == "__main__":
    main()
