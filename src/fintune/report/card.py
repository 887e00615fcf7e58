"""The model card: the ``README.md`` of a model repository, with the YAML block that the hub reads.

:func:`render_card` depends on :class:`Card` alone. The code snippets name files that exist in the repository.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fintune.evaluation.metrics import Score
from fintune.records import Message
from fintune.report.formatting import KIND_LABELS, fill_template, format_interval, format_invalid, format_percent


@dataclass(frozen=True)
class CardBase:
    """The base model.

    Attributes:
        name: Name for people.
        hub_id: ``OWNER/NAME``; empty if the model is not on the hub.
        licence: Its licence, or ``not stated``.
        note: A remark to print after the name.
        non_commercial: Whether its licence forbids commercial use.
        remote_code: Whether it needs its own Python code.
    """

    name: str
    hub_id: str
    licence: str
    note: str = ""
    non_commercial: bool = False
    remote_code: bool = False


@dataclass(frozen=True)
class CardSource:
    """A source of training data.

    Attributes:
        name: File name, or ``OWNER/NAME`` of a hub dataset.
        on_hub: Whether it is a hub dataset.
        licence: Its licence, or ``not stated``.
        non_commercial: Whether its licence forbids commercial use.
        num_train: Number of training examples.
        num_eval: Number of held-out examples.
    """

    name: str
    on_hub: bool
    licence: str
    non_commercial: bool
    num_train: int
    num_eval: int


@dataclass(frozen=True)
class CardReplay:
    """How close a form of the model is to base + adapter.

    Attributes:
        same: Share of the positions with the same most probable token.
        kl: Mean Kullback-Leibler divergence in nats.
        perplexity: Perplexity of the completions.
    """

    same: float
    kl: float
    perplexity: float


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    Attributes:
        repo: ``OWNER/NAME``; its characters have no meaning to a shell.
        branch: Branch of the repository.
        private: Whether readers must log in.
        licence: Licence of the model, as the hub writes it.
        licence_known: Whether the hub knows that licence.
        base: The base model.
        sources: Sources of the training data.
        used: A sentence about the examples that were used.
        program: Whether the model answers with programs of FinQA's language.
        method: Name and value of each option of the training method.
        training: Name and value of each figure of training.
        scores: Scores by kind of model.
        scored: Sentences about the questions and the decoding of the scores.
        replayed: Agreement with the trained model by kind of model.
        num_replayed: Number of positions that were compared.
        adapter: Folder of the adapter in the repository ("" for its root), or None without an adapter.
        merged: Whether the repository has the merged model.
        gguf: GGUF files, the smallest last.
        modelfile: Whether the repository has a Modelfile for Ollama.
        context_tokens: Maximum tokens of prompt and completion in training.
        messages: A conversation for the code snippets.
        max_new_tokens: Maximum tokens of an answer.
        files: Name and bytes of each file.
        origin: Name and value of each fact about provenance.
    """

    repo: str
    branch: str
    private: bool
    licence: str
    licence_known: bool
    base: CardBase
    sources: Sequence[CardSource]
    used: str
    program: bool
    method: Sequence[tuple[str, str]]
    training: Sequence[tuple[str, str]]
    messages: Sequence[Message]
    max_new_tokens: int
    context_tokens: int
    scores: Mapping[str, Score] = field(default_factory=dict)
    scored: str = ""
    replayed: Mapping[str, CardReplay] = field(default_factory=dict)
    num_replayed: int = 0
    adapter: str | None = None
    merged: bool = False
    gguf: Sequence[str] = ()
    modelfile: bool = False
    files: Sequence[tuple[str, int]] = ()
    origin: Sequence[tuple[str, str]] = ()

    @property
    def title(self) -> str:
        """The model's name."""
        return self.repo.rpartition("/")[2]


def render_card(card: Card) -> str:
    """Render the card as Markdown."""
    origins: list[CardBase | CardSource] = [card.base, *card.sources]
    return fill_template(
        "card.md.j2",
        card=card,
        front=_front(card),
        restricted=[f"{escape_markdown(o.name)} ({escape_markdown(o.licence)})" for o in origins if o.non_commercial],
        scores=[score_row(kind, score) for kind, score in card.scores.items()],
        plain=escape_markdown,
        kinds={**KIND_LABELS, "trained": "trained weights"},
        conversation=_python(card.messages),
        smallest=shlex.quote(card.gguf[-1]) if card.gguf else "",
        at="" if card.branch == "main" else f', revision="{card.branch}"',
        below=f', subfolder="{card.adapter}"' if card.adapter else "",
        flag="" if card.branch == "main" else f" --revision {card.branch}",
        trust=", trust_remote_code=True" if card.base.remote_code else "",
    )


def _front(card: Card) -> str:
    """Return the YAML block without its ``---`` lines."""
    from ruamel.yaml import YAML

    only_adapter = card.adapter is not None and not card.merged and not card.gguf
    block: dict[str, object] = {}
    if card.base.hub_id:
        block |= {"base_model": card.base.hub_id, "base_model_relation": "adapter" if only_adapter else "finetune"}
    if datasets := [source.name for source in card.sources if source.on_hub]:
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


def score_row(kind: str, score: Score) -> list[str]:
    """Return the cells of a row of the accuracy table."""
    return [
        KIND_LABELS[kind],
        f"{score.num_predictions:,}",
        format_percent(score.execution_accuracy),
        format_interval(score.execution_accuracy_interval),
        format_percent(score.program_accuracy),
        format_interval(score.program_accuracy_interval),
        format_invalid(score),
    ]


def escape_markdown(text: object) -> str:
    """Return text from outside as one line without Markdown or HTML markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _python(messages: Sequence[Message]) -> str:
    lines = [f'    {{"role": "{message.role}", "content": {message.content!r}}},' for message in messages]
    return "\n".join(["messages = [", *lines, "]"])
