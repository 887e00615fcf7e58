"""One process of a training on several GPUs, started by torchrun's agent.

The command is ``python -m fintune.pipeline.train_worker ORDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fintune.errors import FintuneError
from fintune.util.console import console
from fintune.util.system import configure_environment


def main() -> None:
    """Join the others, train, leave what stopped it for the process that started it."""
    configure_environment()
    from fintune.pipeline.stages.train import train_as_rank
    from fintune.training import launch, ranks

    order = Path(sys.argv[1])
    launch.end_with_parent()
    ranks.join()
    console.quiet = not ranks.leads()
    config, prepare, folder = launch.read_order(order)
    try:
        train_as_rank(config, prepare, folder)
    except FintuneError as error:
        launch.write_error(order, ranks.number(), error)
        sys.exit(2)
    ranks.leave()


if __name__ == "__main__":
    main()
