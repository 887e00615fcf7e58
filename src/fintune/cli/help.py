"""The list of verbs that ``fintune --help`` prints, and what is said about a flag that there is not."""

from __future__ import annotations

from collections.abc import Sequence

import click

_SHORT = {
    "run": "Every stage, from data to a measured GGUF and one HTML page.",
    "demo": "The whole chain on the built-in model and pages, on a CPU.",
    "inspect": "Counts, drops by reason, and examples with the trained tokens.",
    "plan": "What training would do with a GPU's memory.",
    "prepare": "Data to examples and tokens.",
    "train": "Fine-tune an adapter, or go on with an interrupted run.",
    "guard": "A fixed set of questions: what training made worse.",
    "merge": "Fold the adapter into the base: a 16-bit Hugging Face folder.",
    "preflight": "Does llama.cpp split text as the model does?",
    "export": "The model to GGUF files for llama.cpp.",
    "replay": "Is each file the model that was trained?",
    "predict": "Answer the evaluation questions with each kind of model.",
    "score": "Official FinQA verdicts of a run, or of --predictions.",
    "report": "One HTML page of the run.",
    "ask": "Answer a question about a page, with the cells that it uses.",
    "serve": "Serve a GGUF file at an OpenAI-style address.",
    "publish": "Push the result to the Hugging Face hub, with a model card.",
    "audit": "What is odd about FinQA files and what they share.",
    "config": "Look at the options.",
}
"""Every verb in the order of work."""


class Verbs(click.Group):
    """Lists the verbs in the order of work, each with a sentence that fits 80 columns."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """As click does, with the short sentence."""
        cmd.short_help = _SHORT.get(name or cmd.name or "")
        super().add_command(cmd, name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in order."""
        return [*(name for name in _SHORT if name in self.commands), *sorted(set(self.commands) - set(_SHORT))]


def as_override(error: click.UsageError, words: Sequence[str]) -> str | None:
    """What to write for ``--learning_rate 1e-4``, as other programs have it; None where no option is meant.

    Args:
        error: Of click.
        words: The command line, for the value.
    """
    if not isinstance(error, click.NoSuchOption):
        return None
    option = _option(error.option_name, words)
    return f"no option {error.option_name}: write {option}" if option else None


def _option(flag: str, words: Sequence[str]) -> str | None:
    from fintune.config.load import fields
    from fintune.config.other_names import other_name

    name = flag.lstrip("-").replace("-", "_")
    known = [key for key, _ in fields()]
    same = [key for key in known if name in (key, key.rpartition(".")[2])]
    found = other_name(name) or (same[0] if len(same) == 1 else None)
    if found is None or "=" in found:
        return found
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.partition("=")[0] == flag:
            value = word.partition("=")[2] or ("" if following.startswith("-") else following)
            return f"{found}={value or 'VALUE'}"
    return f"{found}=VALUE"
