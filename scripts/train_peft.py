"""Train a LoRA adapter on FinQA: as train_dora.py, with another default of --use_dora; see docs/guide_finqa.md."""

from __future__ import annotations

from fintune.cli.legacy.finqa import make_train_command
from fintune.cli.main import main

if __name__ == "__main__":
    main(make_train_command(use_dora=False), "train_peft.py")
