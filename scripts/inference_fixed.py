"""Answer every question of a FinQA file with a program, with the guide's flags, as `fintune predict --model` does."""

from pathlib import Path
from typing import Any

import click

from fintune.cli.legacy.flags import PATH, TRUE_OR_FALSE, Flag, as_overrides, make_command
from fintune.cli.main import main
from fintune.cli.predict import predict_plain
from fintune.models.folder import adapter_base_name
from fintune.util.console import say

FLAGS = (
    Flag("model_path", str, "Base or merged model, or an adapter: folder, hub id, GGUF file or URL#NAME."),
    Flag("base_model", str, "The model that --adapter_path was trained on."),
    Flag("adapter_path", PATH, "PEFT adapter (LoRA or DoRA)."),
    Flag("test_json", PATH, "Official FinQA JSON, plain or .gz.", is_required=True),
    Flag("out_json", PATH, "File for the predictions.", is_required=True),
    Flag("max_new_tokens", 96, "Longest answer in tokens.", "predict.max_new_tokens"),
    Flag("load_in_4bit", TRUE_OR_FALSE, "Quantize the weights while they load (bitsandbytes)."),
    Flag("do_sample", TRUE_OR_FALSE, "Sample tokens instead of taking the most probable."),
    Flag("temperature", 0.7, "Temperature of sampling.", "predict.temperature"),
    Flag("top_p", 1.0, "Nucleus of sampling.", "predict.top_p"),
    Flag("eg_k", 1, "Candidates of execution-guided decoding; 1 is greedy.", "predict.num_candidates"),
    Flag("num_shots", 0, "Solved questions before each question.", "predict.num_fewshot"),
    Flag("train_json", PATH, "File of the solved questions. Default: the training file beside --test_json."),
    Flag("seed", 17, "Seed of sampling.", "predict.seed"),
    Flag("batch_size", 16, "Answers decoded together.", "predict.batch_size"),
)


def predict(flags: dict[str, Any], overrides: list[str]) -> None:
    """Answer every question of a FinQA file with a program."""
    model, base, adapter = flags["model_path"], flags["base_model"], flags["adapter_path"]
    if (model is None) == (base is None) or (base is None) != (adapter is None):
        raise click.UsageError("give either --model_path alone, or --base_model with --adapter_path")
    if model and (Path(model) / "adapter_config.json").is_file() and not (Path(model) / "config.json").is_file():
        adapter, model = Path(model), adapter_base_name(Path(model))
        say(f"{adapter} holds an adapter of {model}")  # the guide names the output of train_dora.py here
    strategy = "execution_guided" if flags["eg_k"] > 1 else "sample" if flags["do_sample"] else "greedy"
    flags["out_json"].parent.mkdir(parents=True, exist_ok=True)
    predict_plain(
        *(model or base, flags["test_json"], flags["out_json"]),
        (*as_overrides(FLAGS, flags), f"predict.strategy={strategy}", *overrides),
        adapter=adapter,
        train=flags["train_json"],
        load_in_4bit=bool(flags["load_in_4bit"]),
    )


inference_fixed = make_command(predict, FLAGS, "Answer every question of a FinQA file with a program.")

if __name__ == "__main__":
    main(inference_fixed, "inference_fixed.py")
