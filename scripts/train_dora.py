"""Train a DoRA adapter on FinQA, with the guide's flags; see docs/guide_finqa.md."""

from fintune.cli.legacy.finqa import TRAIN_DORA
from fintune.cli.main import main

if __name__ == "__main__":
    main(TRAIN_DORA, "train_dora.py")
