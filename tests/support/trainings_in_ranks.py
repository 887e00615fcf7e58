"""Trainings one after the other in the processes that torchrun started: the libraries are imported once.

torchrun --nproc-per-node 2 trainings_in_ranks.py ORDERS_JSON   (a list of {"config", "prepare", "folder"})
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fintune.config import Config
from fintune.pipeline.stages.train import train_as_rank
from fintune.training import distributed
from fintune.util.console import console


def main() -> None:
    distributed.init_process_group()
    console.quiet = True
    for order in json.loads(Path(sys.argv[1]).read_text()):
        train_as_rank(Config.model_validate(order["config"]), Path(order["prepare"]), Path(order["folder"]))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
