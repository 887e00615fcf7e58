"""Finance data and a base model to a fine-tuned, merged and quantised one, by the guide's flags; see docs/finance.md.

python train_financial_model.py --model_name builtin:smollm2-135m --dataset_folder datasets/ --investopedia none
"""

from __future__ import annotations

from fintune.cli.legacy.finance import pipeline_command
from fintune.cli.main import main

if __name__ == "__main__":
    main(pipeline_command(), "train_financial_model.py")
