r"""Every command of the two guides, as it stands there: what is run by a shell, and the lines of Python.

A command keeps its line breaks, since a comment behind a backslash decides what a shell makes of it.
"""

from __future__ import annotations

import re
import shlex

FINANCE = {
    "install": "pip install -r requirements.txt",
    "quick start": "python train_financial_model.py --llama_cpp_path ./llama.cpp",
    "places": """\
python train_financial_model.py \\
  --lora_output_dir ./outputs/lora \\
  --merged_model_dir ./outputs/merged_fp16 \\
  --gguf_q4_path ./outputs/finance_q4.gguf""",
    "hyperparameters": """\
python train_financial_model.py \\
  --learning_rate 8e-6 \\
  --num_train_epochs 5 \\
  --max_seq_length 6144 \\
  --gradient_accumulation_steps 12""",
    "resume": """\
python train.py \\
  --model_name DSR1/DSR1-Distill-Qwen-14B \\
  --dataset_folder datasets/ \\
  --output_dir ./financial_lora \\
  --resume_from_checkpoint ./financial_lora/checkpoint-latest""",
    "llama.cpp": """\
./llama.cpp/build/bin/llama-cli \\
  -m financial_model_q4_k_m.gguf \\
  -p "Explain risk parity to an intermediate investor." \\
  -n 128 --temp 0.7 -ngl 99""",
}

FINQA = {
    "environment": "python -m venv .venv && source .venv/bin/activate  # (Linux/Mac)",
    "upgrade": "pip install --upgrade pip",
    "torch": "pip install torch --index-url https://download.pytorch.org/whl/cu121   # pick your CUDA",
    "packages": "pip install transformers peft bitsandbytes datasets accelerate wandb huggingface_hub",
    "hub login": "huggingface-cli login",
    "wandb login": "wandb login",
    "preprocess": """\
python scripts/preprocess.py \\
  --input_json data/FinQA_train.json \\
  --output_dataset ./data/processed/train""",
    "train": """\
python scripts/train_dora.py \\
  --base_model meta-llama/Llama-3.2-3B-Instruct \\
  --dataset_dir ./data/processed/train \\
  --output_dir ./models/llama-3b-finqa-dora \\
  --epochs 3 --per_device_train_batch_size 4 \\
  --lr 1e-4 --weight_decay 0.0 \\
  --gradient_accumulation_steps 4 \\
  --use_bf16 true \\
  --use_4bit true \\               # QLoRA-style training (set false for standard DoRA/LoRA)
  --lora_r 16 --lora_alpha 32 --lora_dropout 0.05 \\
  --logging_steps 20 --save_strategy epoch \\
  --push_to_hub true \\
  --report_to wandb""",
    "predict, merged": """\
python scripts/inference_fixed.py \\
  --model_path ./models/llama-3b-finqa-dora \\
  --test_json data/FinQA_test.json \\
  --out_json outputs/predictions_merged.json \\
  --max_new_tokens 384 \\
  --eg_k 1""",
    "predict, adapter": """\
python scripts/inference_fixed.py \\
  --base_model meta-llama/Llama-3.2-3B-Instruct \\
  --adapter_path ./models/llama-3b-finqa-dora-adapter \\
  --test_json data/FinQA_test.json \\
  --out_json outputs/predictions_adapter.json \\
  --max_new_tokens 384 \\
  --eg_k 1 \\
  --load_in_4bit true         # optional: true 4-bit inference""",
    "score": """\
python scripts/score_finqa.py \\
  --pred_json outputs/predictions_adapter.json \\
  --gold_json data/FinQA_test.json \\
  --out_csv outputs/metrics.csv""",
}

PYTHON = (
    'model = PeftModel.from_pretrained(model, "./financial_lora")',
    'tokenizer = AutoTokenizer.from_pretrained("./merged_financial_fp16")',
    "from save_to_HF import PushToHubEachEpoch",
)
"""A line of each snippet of Python."""


def as_meant(command: str) -> list[str]:
    """The words of a command whose line breaks are all meant: comments behind a backslash left out."""
    return shlex.split(re.sub(r"\\[ \t]*(?:#[^\n]*)?\n", " ", command), comments=True)


def as_pasted(command: str) -> list[list[str]]:
    """The commands that a shell makes of the text, each in words."""
    return [shlex.split(line, comments=True) for line in command.replace("\\\n", "").splitlines()]


def found_in(guide: str) -> list[str]:
    """Every command in the code blocks of a guide, in white space alone, without comments."""
    found = []
    for block in re.findall(r"^```bash\r?\n(.*?)^```", guide, re.DOTALL | re.MULTILINE):
        whole = re.sub(r"\\[ \t]*(?:#[^\n]*)?\n", " ", block.replace("\r", ""))
        found += [" ".join(shlex.split(line, comments=True)) for line in whole.splitlines()]
    return [line for line in found if line]
