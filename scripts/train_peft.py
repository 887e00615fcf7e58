"""Train a LoRA adapter by the older flags: as train_dora.py, with LoRA where `--use_dora` is left out.

python scripts/train_peft.py --base_model meta-llama/Llama-3.2-3B-Instruct --dataset_dir data/processed/train \
  --output_dir models/llama-3b-finqa-lora --use_4bit true
"""

from __future__ import annotations

from fintune.cli.legacy.finqa import command
from fintune.cli.main import main

if __name__ == "__main__":
    main(command(use_dora=False), "train_peft.py")
