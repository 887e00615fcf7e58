"""One process of a training on several GPUs, started by torchrun's agent.

The command is ``python -m fintune.pipeline.train_worker JOB``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fintune.errors import FintuneError
from fintune.util.console import console
from fintune.util.system import configure_environment


def run_rank() -> None:
    """Join the other processes and train; write the error that stopped it for the process that started this one."""
    configure_environment()
    from fintune.pipeline.stages.train import train_as_rank
    from fintune.training import distributed

    job_file = Path(sys.argv[1])
    distributed.exit_with_parent()
    distributed.init_process_group()
    console.quiet = not distributed.is_main()
    config, prepare, folder = distributed.read_job(job_file)
    try:
        train_as_rank(config, prepare, folder)
    except FintuneError as error:
        distributed.write_error(job_file, distributed.process_rank(), error)
        sys.exit(2)
    distributed.destroy_process_group()


if __name__ == "__main__":
    run_rank()
