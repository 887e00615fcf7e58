"""The model card: ``README.md`` of what is pushed to the hub, with the YAML block that the hub reads.

:func:`render_card` is a function of :class:`Card` alone; the snippets name the files that are really there.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fintune.evaluation.metrics import Score
from fintune.records import Message
from fintune.report.run_page import KINDS, percent, span, told_invalid
from fintune.report.templating import fill


@dataclass(frozen=True)
class Base:
    """The base model.

    Attributes:
        name: For people.
        hub_id: ``OWNER/NAME``; empty where it is not on the hub.
        licence: Its licence, or ``not stated``.
        note: What else there is to say.
        non_commercial: Whether its licence forbids commercial use.
        remote_code: Whether it brings Python code of its own.
    """

    name: str
    hub_id: str
    licence: str
    note: str = ""
    non_commercial: bool = False
    remote_code: bool = False


@dataclass(frozen=True)
class Source:
    """Where training data come from.

    Attributes:
        name: File name, or ``OWNER/NAME`` of a hub dataset.
        on_hub: Whether it is the latter.
        licence: Its licence, or ``not stated``.
        non_commercial: Whether that forbids commercial use.
        num_train: Examples to train on.
        num_eval: Examples held out.
    """

    name: str
    on_hub: bool
    licence: str
    non_commercial: bool
    num_train: int
    num_eval: int


@dataclass(frozen=True)
class Replayed:
    """How near a form of the model is to base + adapter.

    Attributes:
        same: Share of positions with the same likeliest token.
        kl: Mean Kullback-Leibler divergence, in nats.
        perplexity: Of the completions.
    """

    same: float
    kl: float
    perplexity: float


@dataclass(frozen=True)
class Card:
    """All that the card says.

    Attributes:
        repo: ``OWNER/NAME``, whose letters mean nothing to a shell.
        branch: Where it lies there.
        private: Whether one must log in to read it.
        licence: Of the model, in the hub's form.
        licence_known: Whether the hub knows that name.
        base: The base model.
        sources: Of the training data.
        used: What became of the data, a sentence.
        program: Whether it answers with programs of FinQA's language.
        method: Name and value of each option worth telling.
        training: Name and value of each figure of training.
        scores: By kind of model.
        scored: What they were measured on, and how.
        replayed: By kind of model.
        num_replayed: Positions of the replay.
        adapter: Folder of the adapter in the repository ("" for its root), or None where it is not there.
        merged: Whether the merged model is there.
        gguf: GGUF files, the smallest last.
        modelfile: Whether there is one for Ollama.
        context_tokens: Tokens of prompt and completion in training.
        messages: A conversation to try.
        max_new_tokens: Tokens of an answer.
        files: Name and bytes of each file.
        origin: Name and value of each fact about how it was made.
    """

    repo: str
    branch: str
    private: bool
    licence: str
    licence_known: bool
    base: Base
    sources: Sequence[Source]
    used: str
    program: bool
    method: Sequence[tuple[str, str]]
    training: Sequence[tuple[str, str]]
    messages: Sequence[Message]
    max_new_tokens: int
    context_tokens: int
    scores: Mapping[str, Score] = field(default_factory=dict)
    scored: str = ""
    replayed: Mapping[str, Replayed] = field(default_factory=dict)
    num_replayed: int = 0
    adapter: str | None = None
    merged: bool = False
    gguf: Sequence[str] = ()
    modelfile: bool = False
    files: Sequence[tuple[str, int]] = ()
    origin: Sequence[tuple[str, str]] = ()

    @property
    def title(self) -> str:
        """Name of the model."""
        return self.repo.rpartition("/")[2]


def render_card(card: Card) -> str:
    """The card as Markdown."""
    origins: list[Base | Source] = [card.base, *card.sources]
    return fill(
        "card.md.j2",
        card=card,
        front=_front(card),
        restricted=[f"{plain(each.name)} ({plain(each.licence)})" for each in origins if each.non_commercial],
        scores=[_score(kind, score) for kind, score in card.scores.items()],
        plain=plain,
        kinds={**KINDS, "trained": "trained weights"},
        conversation=_python(card.messages),
        smallest=shlex.quote(card.gguf[-1]) if card.gguf else "",
        at="" if card.branch == "main" else f', revision="{card.branch}"',
        below=f', subfolder="{card.adapter}"' if card.adapter else "",
        flag="" if card.branch == "main" else f" --revision {card.branch}",
        trust=", trust_remote_code=True" if card.base.remote_code else "",
    )


def _front(card: Card) -> str:
    """The YAML block, without its rules."""
    from ruamel.yaml import YAML

    only_adapter = card.adapter is not None and not card.merged and not card.gguf
    block: dict[str, object] = {}
    if card.base.hub_id:
        block |= {"base_model": card.base.hub_id, "base_model_relation": "adapter" if only_adapter else "finetune"}
    if datasets := [each.name for each in card.sources if each.on_hub]:
        block["datasets"] = datasets
    block["license"] = card.licence if card.licence_known else "other"
    if not card.licence_known:
        block["license_name"] = card.licence
    block["library_name"] = "transformers" if card.merged else "gguf" if card.adapter is None else "peft"
    block["pipeline_tag"] = "text-generation"
    tags = ["fintune", "finance", *(["finqa"] if card.program else []), *(["gguf"] if card.gguf else [])]
    block["tags"] = tags
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.width = 1_000
    out = io.StringIO()
    yaml.dump(block, out)
    return out.getvalue().rstrip()


def _score(kind: str, score: Score) -> list[str]:
    return [
        KINDS[kind],
        f"{score.num_predictions:,}",
        percent(score.execution_accuracy),
        span(score.execution_accuracy_interval),
        percent(score.program_accuracy),
        span(score.program_accuracy_interval),
        told_invalid(score),
    ]


def plain(text: object) -> str:
    """Text that is not ours, as one line in which Markdown and HTML mean nothing."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _python(messages: Sequence[Message]) -> str:
    lines = [f'    {{"role": "{each.role}", "content": {each.content!r}}},' for each in messages]
    return "\n".join(["messages = [", *lines, "]"])
