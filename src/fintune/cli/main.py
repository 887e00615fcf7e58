"""The command line: its list of verbs, and how an error becomes one line.

Each verb is a module of its own, imported only when that verb runs. Heavy imports stay inside the functions that need
them, so that help, scoring and inspection work without torch.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

import click

from fintune import __version__
from fintune.errors import FintuneError, ResourceError
from fintune.util.signals import Terminated, sigterm_as_interrupt
from fintune.util.system import configure_environment
from fintune.util.text import abridge_line, escape_control_chars

USER_ERROR = 2
INTERRUPTED, TERMINATED = 130, 143

VERBS: Mapping[str, tuple[str, str]] = {
    "run": ("stages.run_command", "Run every stage, from data to measured GGUF files."),
    "demo": ("stages.demo_command", "Run every stage on the built-in model and pages, on a CPU."),
    "init": ("config.init_command", "Write a configuration file to start from."),
    "inspect": ("inspect.inspect_command", "Show counts, dropped rows, and examples with the trained tokens."),
    "plan": ("plan.plan_command", "Estimate the GPU memory that training needs."),
    "prepare": ("stages.prepare_command", "Read the data and tokenize it."),
    "train": ("stages.train_command", "Fine-tune the adapter, or resume an interrupted run."),
    "guard": ("stages.guard_command", "Check what the model forgot: fixed prompts before and after."),
    "merge": ("stages.merge_command", "Merge the adapter into a 16-bit Hugging Face folder."),
    "preflight": ("stages.preflight_command", "Check that llama.cpp tokenizes like the model."),
    "export": ("stages.export_command", "Export the model to GGUF files for llama.cpp."),
    "replay": ("stages.replay_command", "Verify that every export matches the trained model."),
    "predict": ("predict.predict_command", "Answer the evaluation questions with each kind of model."),
    "score": ("score.score_command", "Score predictions with the official FinQA verdicts."),
    "report": ("stages.report_command", "Write the HTML page of the run."),
    "page": ("ask.page_command", "Show how report pages are read."),
    "ask": ("ask.ask_command", "Answer a question about a page, with the cells that it uses."),
    "serve": ("serve.serve_command", "Serve a GGUF file at an OpenAI-compatible address."),
    "publish": ("publish.publish_command", "Push the results to the Hugging Face hub, with a model card."),
    "audit": ("audit.audit_command", "Report data problems and overlap between FinQA files."),
    "config": ("config.config_group", "Show the options."),
}
"""Module and command of each verb, with its line in ``fintune --help``, in the order of work."""

_OUTSIDE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
}
"""File system errors that the user can fix. Any other is a bug of this package and keeps its traceback."""

_TRAIN = (
    "accelerate bitsandbytes datasets huggingface_hub llguidance numpy pandas peft pyarrow safetensors tensorboard "
    "tokenizers torch tqdm transformers trl"
)
_GGUF = "gguf libggml threadpoolctl xllamacpp"
EXTRAS: Mapping[str, str] = {
    **dict.fromkeys(_TRAIN.split(), "train"),
    **dict.fromkeys(_GGUF.split(), "gguf"),
    "vllm": "vllm",
    "wandb": "wandb",
}
"""Extra of this package by the import name of a library. A library of several extras is listed with the larger one."""


class _Verbs(click.Group):
    """A group that imports a verb's module only when the verb runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, attribute = VERBS[cmd_name][0].partition(".")
        command = getattr(importlib.import_module(f"fintune.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in VERBS and not name.startswith("-"):
            near = difflib.get_close_matches(name, VERBS, n=1)
            ctx.fail(f"No such command {name!r}.{f' Did you mean {near[0]!r}?' if near else ''}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="fintune", message="fintune %(version)s")
def app() -> None:
    """Fine-tune, evaluate and export language models for finance.

    CONFIG is a YAML file (`fintune init` writes one). KEY=VALUE overrides an option, such as train.learning_rate=1e-4.
    """


def main(command: click.Command | None = None, name: str = "fintune") -> None:
    """Run a command (default: ``fintune`` itself). A user's error becomes one line, with exit status 2."""
    configure_environment()
    try:
        with sigterm_as_interrupt():
            (command or app)(prog_name=name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(USER_ERROR)
    except click.UsageError as error:
        if command is None and (hint := _override_hint(error, sys.argv[1:])):
            _stop(hint, USER_ERROR)
        verb = error.ctx.command_path if error.ctx is not None else "fintune"
        _stop(f"{error.format_message().rstrip('.')}; see {verb} --help", USER_ERROR)
    except (FintuneError, click.ClickException) as error:
        _stop(str(error), USER_ERROR)
    except (KeyboardInterrupt, click.Abort) as error:
        # The cause of click's exception carries the message.
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        status = TERMINATED if isinstance(cause, Terminated) else INTERRUPTED
        _stop(str(cause or "") or "interrupted", status)
    except ModuleNotFoundError as error:
        if (missing := missing_extra(error)) is None:
            raise
        _stop(str(missing), USER_ERROR)
    except BrokenPipeError:
        # The reader closed the pipe (`fintune ... | head`). Python would complain when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in _OUTSIDE:
            raise
        path = f"{error.filename}: " if error.filename else ""
        _stop(f"{path}{os.strerror(error.errno).lower()}", USER_ERROR)


def missing_extra(error: ModuleNotFoundError) -> ResourceError | None:
    """Return an error that says what to install, or None if the missing module is not an optional library."""
    library = (error.name or "").partition(".")[0]
    if library not in EXTRAS:
        return None
    return ResourceError(
        f"{library} is not installed, and this command needs it", hint=f'pip install "fintune[{EXTRAS[library]}]"'
    )


def _stop(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"fintune: {abridge_line(escape_control_chars(' '.join(message.split())))}\n")
    sys.exit(status)


def _override_hint(error: click.UsageError, words: Sequence[str]) -> str | None:
    """Return what to write instead of a flag such as ``--learning_rate 1e-4``, or None if it is not an option."""
    if not isinstance(error, click.NoSuchOption):
        return None
    from fintune.config.load import fields
    from fintune.config.other_names import other_name

    flag = error.option_name
    name = flag.lstrip("-").replace("-", "_")
    same = [key for key, _ in fields() if name in (key, key.rpartition(".")[2])]
    option = other_name(name) or (same[0] if len(same) == 1 else None)
    if option is None:
        return None
    if "=" not in option:
        index = next((index for index, word in enumerate(words) if word.partition("=")[0] == flag), len(words))
        after = next((word for word in words[index + 1 : index + 2] if not word.startswith("-")), "")
        value = "".join(words[index : index + 1]).partition("=")[2] or after or "VALUE"
        option = f"{option}={value}"
    return f"no option {flag}: write {option}"


if __name__ == "__main__":
    main()
