"""The model card: the ``README.md`` of a model repository, with the YAML block that the hub reads.

:func:`card_of` collects a :class:`Card` from the manifests of a run; :func:`render_card` writes it as Markdown.
The code snippets name files that exist in the repository.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

from fintune import __version__
from fintune.config import Config, PublishOptions
from fintune.data import prepared
from fintune.data.hub import PREFIX
from fintune.data.licences import (
    NOT_STATED,
    combine_licences,
    hub_name,
    is_non_commercial,
    is_on_hub,
    licence_of,
)
from fintune.errors import ConfigError
from fintune.evaluation.metrics import Score
from fintune.evaluation.scoring import read_score
from fintune.evaluation.statistics import wilson
from fintune.finqa.prompt import build_messages
from fintune.manifest import Facts, Manifest
from fintune.publish.files import CARD, CardOrigin, Publication, gguf_file_names
from fintune.records import FinQAQuestion, FinQARecord, Message
from fintune.report.formatting import KIND_LABELS, fill_template, format_interval, format_invalid, format_percent
from fintune.report.sections.accuracy import decoding_sentence
from fintune.report.sections.training import training_method
from fintune.util.text import format_duration

_OWN_LICENCE = "Apache-2.0"
"""Licence of the pages that this package generates."""
_FINQA_ID = re.compile(r"[A-Z.]{1,6}/\d{4}/page_\d+\.pdf-\d+")


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    Attributes:
        repo: ``OWNER/NAME``; its characters have no meaning to a shell.
        licence: Licence of the model, as the hub writes it.
        used: A sentence about the examples that were used.
        is_program: Whether the model answers with programs of FinQA's language.
        method: Name and value of each option of the training method.
        training: Name and value of each figure of training.
        messages: A conversation for the code snippets.
        context_tokens: Maximum tokens of prompt and completion in training.
        scored: Sentences about the questions and the decoding of the scores.
        replay: Facts of the stage ``replay``: the agreement of each kind of model with the trained model.
        gguf: GGUF files, the smallest last.
        files: Name and bytes of each file.
        origin: Name and value of each fact about provenance.
        needs_remote_code: Whether the base model needs its own Python code.
    """

    repo: str
    options: PublishOptions
    licence: str
    base: CardOrigin
    sources: Sequence[CardOrigin]
    used: str
    is_program: bool
    method: Sequence[tuple[str, str]]
    training: Sequence[tuple[str, str]]
    messages: Sequence[Message]
    max_new_tokens: int
    context_tokens: int
    scores: Mapping[str, Score] = field(default_factory=dict)
    scored: str = ""
    replay: Facts = field(default_factory=dict)
    gguf: Sequence[str] = ()
    has_modelfile: bool = False
    files: Sequence[tuple[str, int]] = ()
    origin: Sequence[tuple[str, str]] = ()
    needs_remote_code: bool = False


def card_of(config: Config, repo: str, publication: Publication, inputs: Mapping[str, Path]) -> Card:
    """Collect the contents of the card of repository ``repo`` from the finished folders by step name.

    Raises:
        ArtifactError: A file of a finished stage cannot be read.
        ConfigError: ``publish.license`` allows commercial use, which the base model or a source forbids.
    """
    options, base, manifests = config.publish, publication.base, publication.manifests
    is_program = config.data.source != "chat"
    sources = list(_sources(config, inputs["prepare"], manifests["prepare"])) if "prepare" in inputs else []
    _check_licence(options.license, [base, *sources])
    binding = combine_licences(base.licence, [source.licence for source in sources])
    pushed = {upload.name for upload in publication.uploads}
    # A served model is left out, because it may be any other model.
    scored = {kind: inputs[f"score/{kind}"] for kind in KIND_LABELS if kind != "endpoint" and f"score/{kind}" in inputs}
    return Card(
        repo=repo,
        options=options,
        licence=hub_name(options.license) if options.license else binding,
        base=base,
        sources=sources,
        used=_used(inputs["prepare"]) if "prepare" in inputs else "",
        is_program=is_program,
        method=list(_method(manifests)),
        training=list(_training(manifests)),
        messages=_messages(config),
        max_new_tokens=config.predict.max_new_tokens if is_program else 256,
        context_tokens=config.prompt.max_length,
        scores={kind: read_score(folder / "score.json") for kind, folder in scored.items()},
        scored=_scored(config),
        replay=manifests["replay"].facts if "replay" in manifests else {},
        gguf=[name for name in gguf_file_names(config) if "gguf" in options.artifacts and name in pushed],
        has_modelfile="Modelfile" in pushed,
        files=[(upload.name, upload.num_bytes) for upload in publication.uploads if upload.name != CARD],
        origin=list(_origin(manifests)),
        needs_remote_code=config.model.trust_remote_code,
    )


def render_card(card: Card) -> str:
    """Render the card as Markdown."""
    options = card.options
    restricted = [origin for origin in (card.base, *card.sources) if origin.non_commercial]
    branch = "" if options.branch == "main" else options.branch
    has_adapter = "adapter" in options.artifacts
    return fill_template(
        "card.md.j2",
        card=card,
        title=card.repo.rpartition("/")[2],
        front=_front(card),
        restricted=[f"{escape_markdown(origin.name)} ({escape_markdown(origin.licence)})" for origin in restricted],
        scores=[score_row(kind, score) for kind, score in card.scores.items()],
        plain=escape_markdown,
        kinds={**KIND_LABELS, "trained": "trained weights"},
        conversation=_python(card.messages),
        smallest=shlex.quote(card.gguf[-1]) if card.gguf else "",
        has_adapter=has_adapter,
        has_merged="merged" in options.artifacts,
        at=f', revision="{branch}"' if branch else "",
        below=f', subfolder="{options.adapter_folder}"' if options.adapter_folder else "",
        flag=f" --revision {branch}" if branch else "",
        trust=", trust_remote_code=True" if card.needs_remote_code else "",
    )


def _front(card: Card) -> str:
    """Return the YAML block without its ``---`` lines."""
    from ruamel.yaml import YAML

    artifacts = card.options.artifacts
    block: dict[str, object] = {}
    if card.base.hub_id:
        relation = "adapter" if set(artifacts) == {"adapter"} else "finetune"
        block |= {"base_model": card.base.hub_id, "base_model_relation": relation}
    if datasets := [source.hub_id for source in card.sources if source.hub_id]:
        block["datasets"] = datasets
    block |= (
        {"license": card.licence} if is_on_hub(card.licence) else {"license": "other", "license_name": card.licence}
    )
    block["library_name"] = "transformers" if "merged" in artifacts else "peft" if "adapter" in artifacts else "gguf"
    block["pipeline_tag"] = "text-generation"
    tags = ["fintune", "finance", *(["finqa"] if card.is_program else []), *(["gguf"] if card.gguf else [])]
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


def unstated_licences(config: Config, card: Card) -> list[str]:
    """Return a line for the base model and for each source whose licence is not stated, with what to set."""
    if config.publish.license:
        return []
    entry = "" if card.is_program else "`license` of its entry in data.sources, or "
    origins = [(card.base, f"the base model {card.base.name}", "")]
    origins += [(source, source.name, entry) for source in card.sources]
    unstated = [(name, entry) for origin, name, entry in origins if NOT_STATED in origin.licence]
    return [f"license: {name} states none: set {entry}publish.license" for name, entry in unstated]


def _check_licence(stated: str | None, origins: Sequence[CardOrigin]) -> None:
    restricted = [f"{origin.name} ({origin.licence})" for origin in origins if origin.non_commercial]
    if stated and restricted and not is_non_commercial(stated) and stated.lower() != "other":
        raise ConfigError(
            f"publish.license: {stated} allows commercial use, which {', '.join(restricted)} forbids",
            hint="leave publish.license out; the card then names all licences that bind",
            option="publish.license",
        )


def _sources(config: Config, folder: Path, manifest: Manifest) -> Iterator[CardOrigin]:
    report = prepared.read_report(folder)
    num_train, num_eval = report.train.num_examples, report.eval.num_examples

    def note(train: int, held_out: int) -> str:
        return f"{train:,} examples to train on, {held_out:,} held out"

    if config.data.source == "builtin:statements":
        yield CardOrigin("report pages generated by fintune", "", _OWN_LICENCE, note=note(num_train, num_eval))
        return
    for source in report.sources:
        # Only the name, because a path of this machine must not be published.
        hub_id = source.path.removeprefix(PREFIX) if source.path.startswith(PREFIX) else ""
        name, licence = hub_id or Path(source.path).name, source.licence
        yield CardOrigin(name, hub_id, licence.name, licence.non_commercial, note(source.num_train, source.num_eval))
    if not report.sources:
        for option, train, held_out in (("data.train", num_train, 0), ("data.eval", 0, num_eval)):
            path = Path(str(manifest.key.options.get(option)))
            licence = licence_of("", path=path)
            name = licence.name if licence.origin or not _is_finqa(folder) else "MIT"
            yield CardOrigin(path.name, "", name, licence.non_commercial, note(train, held_out))


def _used(folder: Path) -> str:
    report = prepared.read_report(folder)
    lost = Counter(report.train.dropped) + Counter(report.eval.dropped)
    kinds = sum((Counter(source.dropped) for source in report.sources), lost)
    left_out = f"; left out: {', '.join(f'{number:,} {reason}' for reason, number in kinds.items())}" if kinds else ""
    text = f"{report.train.num_examples:,} examples were trained on, {report.eval.num_examples:,} held out{left_out}."
    is_partly_lost = report.sources and lost
    return f"{text} Of the examples above, {lost.total():,} could not be encoded." if is_partly_lost else text


def _is_finqa(folder: Path) -> bool:
    """Return whether the examples have FinQA's own ids, so that their licence is known."""
    with (folder / "train.jsonl").open(encoding="utf-8") as lines:
        ids = [str(json.loads(line).get("id")) for line in islice(lines, 100)]
    return bool(ids) and all(_FINQA_ID.fullmatch(example_id) for example_id in ids)


def _scored(config: Config) -> str:
    data, shots = config.data, config.predict.num_fewshot
    pages = "generated pages of companies that it was not trained on"
    on = pages if data.source == "builtin:statements" else f"questions of {data.eval.name if data.eval else 'a file'}"
    before = f"Every question had {shots} solved questions before it." if shots else ""
    return " ".join(filter(None, (f"FinQA's official verdicts on {on}.", before, decoding_sentence(config))))


def _method(manifests: Mapping[str, Manifest]) -> Iterator[tuple[str, str]]:
    """Yield the rows on the method, from the options of the training and not from the present ones."""
    if "train" not in manifests:
        return
    manifest = manifests["train"]
    options = {key: str(value) for key, value in manifest.key.options.items() if value is not None}
    kind, quantization = options["adapter.kind"], options.get("model.quantization", "none")
    if options.get("train.objective", "sft") != "sft":
        yield "objective", options["train.objective"].upper()
    yield "method", training_method(kind, quantization)
    if kind != "full":
        init = options.get("adapter.init_lora_weights", "default")
        start = "" if init == "default" else f", initialised by {init} and therefore stored with twice the rank"
        shape = ", ".join(options[f"adapter.{name}"] for name in ("r", "lora_alpha", "lora_dropout"))
        yield "rank, alpha, dropout", f"{shape}{start}"
        yield "adapted layers", ", ".join(manifest.key.options["adapter.target_modules"])
    yield "precision", str(manifest.facts.get("precision", options.get("train.dtype")))
    yield "learning rate", f"{float(options['train.learning_rate']):g}, {options['train.lr_scheduler_type']}"
    yield "passes, examples a step", _passes(manifest.key.options, manifest.facts)


def _passes(options: Mapping[str, Any], facts: Facts) -> str:
    """Return passes and examples a step. Training may end before all epochs: by max_steps or early stopping."""
    factors = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps", "train.gpus", "train.machines")
    examples = prod(int(options.get(name) or 1) for name in factors)
    epochs, rows = float(options["train.num_train_epochs"]), facts.get("num_examples")
    passes = int(facts["num_steps"]) * examples / rows if rows else epochs
    # The last step of a complete training may hold fewer examples.
    passes = passes if options.get("train.max_steps") else min(passes, epochs)
    return f"{passes:.2g}, {examples:,}" if passes < 1 else f"{round(passes, 2):g}, {examples:,}"


def _training(manifests: Mapping[str, Manifest]) -> Iterator[tuple[str, str]]:
    if "train" not in manifests:
        return
    manifest = manifests["train"]
    facts = manifest.facts
    yield "steps", f"{facts['num_steps']:,}"
    yield "tokens", f"{facts['num_tokens']:,}"
    yield "trained parameters", f"{facts['num_trainable']:,}"
    if "eval_loss" in facts:
        yield "loss on held-out examples", f"{facts['eval_loss']:.3f} at step {facts['kept_step']:,}"
    if "mean_first_loss" in facts:  # older manifests have only losses of single steps
        ends = f"{facts['mean_first_loss']:.3f} to {facts['mean_last_loss']:.3f}"
        yield "training loss, first to last steps", f"{ends}, means of {facts['num_mean_losses']:,}"
    if "guard" in manifests:
        guarded = manifests["guard"].facts
        yield "fixed prompts, before and after", str(guarded.get("summary", ""))
        for group in guarded.get("groups", ()):
            if group["right_before"] is not None:  # with intervals, because twelve prompts are few
                n, rights = group["num_prompts"], (group["right_before"], group["right_after"])
                shares = ", ".join(f"{right} of {n} ({format_interval(wilson(right, n))} %)" for right in rights)
                yield f"{group['name']} right, before and after, 95 % intervals", shares
    speed = f"{format_duration(facts['train_seconds'])}, {facts['tokens_per_second']:,.0f} tokens a second"
    machine = manifest.machine
    device = machine.get("gpu") or f"{machine.get('cores')} cores of {machine.get('processor')}"
    yield "time", f"{speed}, on {device}"


def _origin(manifests: Mapping[str, Manifest]) -> Iterator[tuple[str, str]]:
    yield "made with", f"fintune {__version__}"
    last = manifests.get("train") or next(iter(manifests.values()))
    if commits := dict.fromkeys(manifest.commit for manifest in manifests.values() if manifest.commit):
        text = ", ".join(commits)
        yield "commit", text + (" (+: files were changed)" if "+" in text else "")
    yield "seed", str(last.seed)
    yield "finished", last.finished[:10]
    names = ("torch", "transformers", "peft", "trl")
    yield "versions", ", ".join(f"{name} {last.versions[name]}" for name in names if name in last.versions)
    for step in ("prepare", "train"):
        if step in manifests:
            yield f"fingerprint of {step}", manifests[step].fingerprint[:16]


def _messages(config: Config) -> list[Message]:
    """Return a conversation in the format of the training data."""
    if config.data.source == "chat":
        question = Message(role="user", content="What does a bond's price do when interest rates rise, and why?")
        return [*([Message(role="system", content=config.data.system)] if config.data.system else []), question]
    record = FinQARecord(
        id="example",
        pre_text=("net sales increased in 2016 .",),
        post_text=(),
        table=(("( in millions )", "2016", "2015"), ("net sales", "$ 5829", "$ 5735")),
        qa=FinQAQuestion(
            question="what was the percentage change in net sales from 2015 to 2016?", program="", exe_ans=0.0
        ),
    )
    return list(build_messages(record, system=config.prompt.system, budget=10_000, count_tokens=len).messages)
