"""Fine-tune, merge and quantize a model on finance data, with the guide's flags; see docs/finance.md."""

from fintune.cli.legacy.finance import PIPELINE
from fintune.cli.main import main

if __name__ == "__main__":
    main(PIPELINE, "train_financial_model.py")
