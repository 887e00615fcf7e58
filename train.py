"""Train an adapter on a folder of conversations, by the guide's flags; see docs/finance.md.

python train.py --model_name builtin:smollm2-135m --dataset_folder datasets/ --output_dir ./financial_lora
"""

from __future__ import annotations

from fintune.cli.legacy.finance import train_command
from fintune.cli.main import main

if __name__ == "__main__":
    main(train_command(), "train.py")
