"""Train an adapter on a folder of conversations, with the guide's flags; see docs/finance.md."""

from fintune.cli.legacy.finance import TRAIN
from fintune.cli.main import main

if __name__ == "__main__":
    main(TRAIN, "train.py")
