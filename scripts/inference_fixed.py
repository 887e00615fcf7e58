"""Programs for the questions of a FinQA file, by the older flags; `fintune predict --model` does the same and more.

python scripts/inference_fixed.py --model_path runs/finqa/merge --test_json test.json --out_json predictions.json
python scripts/inference_fixed.py --base_model OWNER/NAME --adapter_path runs/finqa/train/adapter \
    --test_json test.json --out_json predictions.json
"""

from __future__ import annotations

from pathlib import Path

import click

from fintune.cli.legacy.messages import told_in
from fintune.cli.legacy.pasted import PastedCommand
from fintune.cli.main import main
from fintune.cli.predict import predict_plain
from fintune.models.folder import adapter_base_name
from fintune.util.console import say

FILE = click.Path(path_type=Path)


def holds_adapter_alone(folder: Path) -> bool:
    """Whether a folder is an adapter, and no model beside it."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def switch(name: str, text: str):
    """`--name`, `--name true` or `--name false`."""
    return click.option(name, type=bool, is_flag=False, flag_value="true", default=False, help=text)


@click.command(cls=PastedCommand)
@click.option(
    "--model_path", metavar="MODEL", help="Base or merged model, or an adapter: folder, hub id, GGUF file or URL#NAME."
)
@click.option("--base_model", metavar="MODEL", help="The model that --adapter_path was trained on.")
@click.option("--adapter_path", type=FILE, metavar="DIR", help="PEFT adapter (LoRA or DoRA).")
@click.option("--test_json", type=FILE, required=True, help="Official FinQA JSON, plain or .gz.")
@click.option("--out_json", type=FILE, required=True, help="Predictions, written beside a manifest.")
@click.option("--max_new_tokens", type=click.IntRange(min=1), default=96, show_default=True)
@switch("--load_in_4bit", "Quantise the weights while they load (bitsandbytes).")
@switch("--do_sample", "Draw tokens instead of taking the most probable.")
@click.option("--temperature", type=float, default=0.7, show_default=True, help="Where tokens are drawn.")
@click.option("--top_p", type=float, default=1.0, show_default=True, help="Where tokens are drawn.")
@click.option(
    "--eg_k",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Candidates of execution-guided decoding: the first, best-scored, whose program runs is taken. 1 is greedy.",
)
@click.option("--num_shots", type=click.IntRange(min=0), default=0, show_default=True, help="Solved questions shown.")
@click.option("--train_json", type=FILE, help="Where shots come from; else the training file beside --test_json.")
@click.option("--seed", type=click.IntRange(min=0), default=17, show_default=True)
@click.option("--batch_size", type=click.IntRange(min=1), default=16, show_default=True, help="Completions together.")
def inference_fixed(
    model_path: str | None,
    base_model: str | None,
    adapter_path: Path | None,
    test_json: Path,
    out_json: Path,
    max_new_tokens: int,
    load_in_4bit: bool,
    do_sample: bool,
    temperature: float,
    top_p: float,
    eg_k: int,
    num_shots: int,
    train_json: Path | None,
    seed: int,
    batch_size: int,
) -> None:
    """Answer every question of a FinQA file with a program."""
    if (model_path is None) == (base_model is None):
        raise click.UsageError("give either --model_path, or --base_model with --adapter_path")
    if (base_model is None) != (adapter_path is None):
        raise click.UsageError("--base_model and --adapter_path go together; a model alone is --model_path")
    if model_path is not None and holds_adapter_alone(Path(model_path)):
        # What scripts/train_dora.py leaves in its --output_dir, which the guide then asks.
        adapter_path, base_model, model_path = Path(model_path), adapter_base_name(Path(model_path)), None
        say(f"{adapter_path} holds an adapter: base model {base_model}")
    strategy = "execution_guided" if eg_k > 1 else "sample" if do_sample else "greedy"
    overrides = {
        "max_new_tokens": max_new_tokens,
        "strategy": strategy,
        "num_candidates": eg_k,
        "temperature": temperature,
        "top_p": top_p,
        "num_fewshot": num_shots,
        "seed": seed,
        "batch_size": batch_size,
    }
    named = ("max_new_tokens", "temperature", "top_p", "seed")
    flags = {f"predict.{name}": f"--{name}" for name in named} | {
        "predict.num_candidates": "--eg_k",
        "predict.num_fewshot": "--num_shots",
    }
    out_json.parent.mkdir(parents=True, exist_ok=True)  # the guide's outputs/ is nobody's to make
    with told_in(flags):
        predict_plain(
            model_path or base_model or "",
            test_json,
            out_json,
            tuple(f"predict.{name}={value}" for name, value in overrides.items()),
            adapter=adapter_path,
            train=train_json,
            load_in_4bit=load_in_4bit,
        )


if __name__ == "__main__":
    main(inference_fixed, "inference_fixed.py")
