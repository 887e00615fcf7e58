"""Train a DoRA adapter by the older flags (`--use_dora false`: LoRA; `--use_4bit true`: QDoRA, QLoRA).

python scripts/train_dora.py --base_model meta-llama/Llama-3.2-3B-Instruct --dataset_dir data/processed/train \
  --output_dir models/llama-3b-finqa-dora --epochs 3 --per_device_train_batch_size 4 --lr 1e-4
"""

from __future__ import annotations

from fintune.cli.legacy.finqa import command
from fintune.cli.main import main

if __name__ == "__main__":
    main(command(use_dora=True), "train_dora.py")
