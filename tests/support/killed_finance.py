"""train_financial_model.py, stopped in every stage and begun again, each time in a fork of this process.

python killed_finance.py STOPPED WHOLE CONVERTED FLAG...

In the folder STOPPED it is stopped everywhere, then runs to its end; in WHOLE it runs once, and a second time when a
line comes in. CONVERTED, in which a llama.cpp checkout lies, gets a copy of WHOLE, and there the checkout converts anew
and is stopped between its two tools. The libraries are imported once. Writes a line an attempt: where it was to stop,
by which signal, and its exit status. What the attempts say goes to log.txt in their folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path

from support.killed_at import stop_after

STOPS = (
    # The connection breaks in the middle of a file, and then the process ends.
    ("download", "fintune.data.hub:_reason", 1, "SIGKILL"),
    ("download", "fintune.data.dataset:load_sources", 1, "SIGINT"),
    ("prepare", "datasets:Dataset.save_to_disk", 1, "SIGKILL"),
    ("prepare", "fintune.data.prepared:write_prepared", 1, "SIGINT"),
    ("train", "fintune.training.checkpoints:mark_complete", 1, "SIGKILL"),
    ("train", "fintune.training.metrics:append", 1, "SIGINT"),
    ("merge", "fintune.pipeline.stages.merge:merge_folders", 1, "SIGKILL"),
    ("merge", "fintune.pipeline.stages.merge:write_special_tokens", 1, "SIGINT"),
    ("export", "fintune.export.gguf.writer:_Worker.__call__", 3, "SIGKILL"),
    ("export", "fintune.pipeline.stages.export:render_modelfile", 1, "SIGINT"),
    ("report", "fintune.pipeline.stages.report:render_run", 1, "SIGKILL"),
    ("files", "fintune.cli.legacy.outputs:_copy_or_link", 3, "SIGKILL"),
    ("files", "fintune.cli.legacy.outputs:Output.write", 1, "SIGINT"),
)
"""Where each attempt ends: stage, ``module:function``, right behind its so many-th call, by which signal."""


BETWEEN_TOOLS = ("checkout", "fintune.export.gguf.llama_cpp_checkout:convert_model", 2, "SIGKILL")
"""Likewise with a llama.cpp checkout, whose converter is tried on the vocabulary first."""


def attempt(stop: tuple[str, int, str] | None = None) -> int:
    """Exit status, or minus the signal, of the command in a fork of its own."""
    child = os.fork()
    if child == 0:
        with Path("log.txt").open("a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if stop is not None:
            where, number, name = stop
            stop_after(where, number, signal.Signals[name])
        from fintune.cli.legacy.finance import PIPELINE
        from fintune.cli.main import main

        status = 0
        try:
            main(PIPELINE, "train_financial_model.py")
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    _, ended = os.waitpid(child, 0)
    return -os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else os.waitstatus_to_exitcode(ended)


def tell(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()  # a fork would write it once more


def main() -> None:
    stopped, whole, converted, *flags = sys.argv[1:]
    sys.argv = ["train_financial_model.py", *flags]
    for heavy in ("bitsandbytes", "datasets", "peft", "transformers", "trl", "fintune.pipeline.stages.train", "gguf"):
        import_module(heavy)
    os.chdir(stopped)
    for stage, where, number, name in STOPS:
        tell(stage, name, attempt((where, number, name)))
    tell("last", "-", attempt())
    os.chdir(whole)
    tell("whole", "-", attempt())
    sys.stdin.readline()
    Path("log.txt").unlink()
    tell("again", "-", attempt())
    shutil.copytree(whole, converted, dirs_exist_ok=True)
    os.chdir(converted)
    sys.argv += ["--llama_cpp_path", "llama.cpp", "--redo", "export"]
    stage, where, number, name = BETWEEN_TOOLS
    tell(stage, name, attempt((where, number, name)))
    tell("converted", "-", attempt())


if __name__ == "__main__":
    main()
