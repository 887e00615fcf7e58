"""Train a LoRA adapter on FinQA: as train_dora.py, with another default of --use_dora; see docs/guide_finqa.md."""

from fintune.cli.legacy.finqa import TRAIN_LORA
from fintune.cli.main import main

if __name__ == "__main__":
    main(TRAIN_LORA, "train_peft.py")
