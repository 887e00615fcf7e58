"""Predict programs for the questions of a FinQA file with any model, without a run.

``OUT`` is a list of ``{id, question, predicted, program, ...}``. ``fintune score`` and FinQA's own script read it. The
manifest beside it (``OUT`` with ``.manifest.json`` instead of ``.json``) records its inputs and options. Until all
predictions are there, they are in ``.partial.jsonl``. The same command resumes from that file; a command with another
model, prompt or decoding refuses it.

A shard is a part of the file's pages. Its files have ``.I-of-N`` in their names, and :func:`merge_shards` joins them.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fintune.config import Config
from fintune.data.dataset import draw_records, group_by_page
from fintune.data.few_shot import ShotSelector
from fintune.data.finqa_json import read_finqa
from fintune.errors import ArtifactError, DataError
from fintune.finqa.program import tokenize
from fintune.finqa.prompt import TooLongError, build_messages, prompt_budget
from fintune.inference.generate import (
    PredictionLog,
    generate_all,
    is_correct_prediction,
    memory_hint,
    num_generated_tokens,
)
from fintune.inference.open_model import LanguageModel, ModelSpec, open_model
from fintune.inference.protocol import Decoding, PromptResult
from fintune.records import FinQARecord, Message, Prediction
from fintune.util.console import bar, track
from fintune.util.files import check_outputs, read_json, sha256_file, write_output
from fintune.util.memory import advice_on_memory
from fintune.util.system import checkout_commit, installed_versions

_SAME_IN_SHARDS = ("model", "data", "shots_from", "num_shots", "max_questions", "seed", "options")
_ONE_RUN = "predict all shards with the same command but for --shard"


@dataclass(frozen=True)
class FileJob:
    """What to predict.

    Attributes:
        spec: The model.
        data: FinQA file with the questions. Its programs and answers are read for the running accuracy only.
        out: JSON file to write.
        train: FinQA file for the few-shot examples.
        num_shots: Few-shot examples per prompt.
        max_questions: Maximum number of questions, drawn with ``run.seed`` as in a run (default: all).
        shard: Number of this shard, from 1, and of all shards; None asks all questions.
    """

    spec: ModelSpec
    data: Path
    out: Path
    train: Path | None = None
    num_shots: int = 0
    max_questions: int | None = None
    shard: tuple[int, int] | None = None

    @property
    def written(self) -> Path:
        """The file that this job writes: ``out``, or that of its shard."""
        return self.out if self.shard is None else _beside(self.out, f".{self.shard[0]}-of-{self.shard[1]}.json")

    @property
    def manifest(self) -> Path:
        """Path of the manifest of ``written``."""
        return _beside(self.written, ".manifest.json")

    @property
    def partial(self) -> Path:
        """Path of the predictions until all of them are there."""
        return _beside(self.written, ".partial.jsonl")


def _beside(path: Path, ending: str) -> Path:
    # with_suffix would give run.free and run.tight the same name.
    return path.with_name(path.name.removesuffix(".json") + ending)


@dataclass(frozen=True)
class FilePredictions:
    """The facts of the manifest, and one line per record that was not asked."""

    facts: dict[str, Any]
    problems: list[str]


@dataclass
class _Prompts:
    """The prompts by id, in the order of the file, and how many pages were cut or dropped."""

    records: list[FinQARecord]
    turns: dict[str, tuple[Message, ...]]
    num_cut: int
    dropped: dict[str, int]
    problems: list[str]
    shots: ShotSelector | None


def predict_file(job: FileJob, config: Config) -> FilePredictions:
    """Ask a model every question of a file and write the predictions.

    Raises:
        DataError: A file cannot be used, or no question fits the prompt.
        ModelError: The model cannot be used.
        ResourceError: A package, the hub or a server is missing, or memory ran out.
        ArtifactError: An unfinished attempt used another model, prompt or decoding.
        FintuneError: A file cannot be written.
    """
    job.spec.engine_name  # noqa: B018 - refuses what does not go together, before the data are read
    read_too = [job.data, *([job.train] if job.train is not None else [])]
    check_outputs([job.written, job.manifest], read_too)
    read = read_finqa(job.data, needs_gold=False)
    shots = _shots(job, read.records)
    asked = draw_records(read.records, job.max_questions, config.run.seed)
    positions = _shard_positions(job, asked)
    with _advice_on_memory(job, config), bar("load the model", 1, slow=True):
        model = open_model(job.spec)
        model.load()
    try:
        prompts = _prompts([asked[position] for position in positions], model, config, shots)
        if job.shard is None or job.shard[0] == 1:  # each record that cannot be read counts once
            prompts.dropped = {**read.dropped, **prompts.dropped}
            prompts.problems = [*read.problems, *prompts.problems]
        predictions = _resumed(job, config, model, prompts)
    finally:
        model.close()
    facts = _facts(predictions, prompts)
    position_of = {asked[position].id: position for position in positions}
    shard = None if job.shard is None else [*job.shard, [position_of[record.id] for record in prompts.records]]
    _write(job, config, model, prompts, predictions, facts, shard)
    return FilePredictions(facts, prompts.problems)


def _shard_positions(job: FileJob, records: Sequence[FinQARecord]) -> list[int]:
    """Return the indices of the job's questions. The questions about a page are in one shard."""
    if job.shard is None:
        return [*range(len(records))]
    number, num_shards = job.shard
    pages = [*group_by_page(records)]
    if len(pages) < num_shards:
        raise DataError(f"its questions are about {len(pages)} pages", path=job.data, hint="use fewer shards")
    return sorted(position for page in pages[number - 1 :: num_shards] for position in page)


def merge_shards(out: Path) -> dict[str, Any]:
    """Join the finished shards of ``out`` to the file that one process would write, and return its facts.

    Raises:
        ArtifactError: There are no shards, one is missing, or they are not of one run.
    """
    found: dict[tuple[int, int], tuple[dict[str, Any], Path]] = {}
    for path in sorted(out.parent.glob(f"{glob.escape(out.name.removesuffix('.json'))}.*-of-*.manifest.json")):
        manifest = read_json(path, ArtifactError)
        if "shard" in manifest:
            found[manifest["shard"][0], manifest["shard"][1]] = manifest, path
    if not found:
        raise ArtifactError(f"{out} has no finished shards", hint=f"predict them with --out {out} --shard I/N")
    num_shards = {total for _, total in found}
    if len(num_shards) > 1:
        numbers = " and of ".join(map(str, sorted(num_shards)))
        raise ArtifactError(f"{out} has shards of {numbers}", hint="remove those of another run")
    missing = [number for number in range(1, max(num_shards) + 1) if (number, max(num_shards)) not in found]
    if missing:
        shards = ", ".join(f"{number}/{max(num_shards)}" for number in missing)
        raise ArtifactError(f"{out} lacks shards: {shards}", hint="predict them with --shard")
    (first, first_path), *others = [found[key] for key in sorted(found)]
    for manifest, path in others:
        changed = [name for name in _SAME_IN_SHARDS if manifest[name] != first[name]]
        if changed:
            raise ArtifactError(f"{path.name} and {first_path.name} differ in {', '.join(changed)}", hint=_ONE_RUN)
    rows: dict[int, Any] = {}
    for manifest, path in found.values():
        positions, rows_path = manifest["shard"][2], path.with_name(path.name.replace(".manifest.json", ".json"))
        try:
            rows |= zip(positions, json.loads(rows_path.read_bytes()), strict=True)
        except (OSError, ValueError, TypeError):
            hint = "remove it and its manifest, and predict the shard again"
            raise ArtifactError(f"{rows_path} does not hold the predictions of its manifest", hint=hint) from None
    facts = _merge_facts([manifest["facts"] for manifest, _ in found.values()])
    shots = {name: shot for manifest, _ in found.values() for name, shot in manifest["shots"].items()}
    merged = {name: value for name, value in first.items() if name != "shard"}
    merged |= {"facts": facts, "shots": shots, "num_shards": len(found)}
    _write_json(out, [rows[position] for position in sorted(rows)])
    _write_json(_beside(out, ".manifest.json"), merged)
    return facts


def _merge_facts(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add up the facts of shards."""
    merged = dict(facts[0])
    for name in merged:
        values = [each[name] for each in facts]
        if name == "num_dropped":
            merged[name] = dict(sum((Counter(value) for value in values), Counter()))
        elif name == "shot_ids":
            merged[name] = sorted({shot for value in values for shot in value})
        elif name not in ("num_excluded", "execution_accuracy"):
            merged[name] = sum(values)
    if merged["num_gold"]:
        right = sum(each["num_gold"] * (each["execution_accuracy"] or 0) for each in facts)
        merged["execution_accuracy"] = round(round(right) / merged["num_gold"], 6)
    return merged


def _shots(job: FileJob, records: Sequence[FinQARecord]) -> ShotSelector | None:
    if job.num_shots == 0:
        return None
    if job.train is None:
        raise DataError("few-shot examples need training data", hint="name a FinQA file of training questions")
    return ShotSelector(read_finqa(job.train).records, [record.id for record in records], job.num_shots)


def _prompts(
    records: Sequence[FinQARecord], model: LanguageModel, config: Config, shots: ShotSelector | None
) -> _Prompts:
    budget = prompt_budget(config.prompt.max_length)
    prompts = _Prompts([], {}, 0, {}, [], shots)
    for record in track(records, "prompts", len(records)):
        try:
            built = build_messages(
                record,
                system=config.prompt.system,
                budget=budget,
                count_tokens=model.count_text_tokens,
                count_prompt=model.count_tokens,
            )
        except TooLongError as error:
            prompts.dropped["too long"] = prompts.dropped.get("too long", 0) + 1
            prompts.problems.append(str(DataError(error.message, record_id=record.id)))
            continue
        turns = built.messages
        if shots is not None:
            turns = shots.insert(record.id, record.qa.question, turns, budget=budget, count=model.count_tokens)
        prompts.records.append(record)
        prompts.turns[record.id] = turns
        prompts.num_cut += built.num_cut > 0
    if not prompts.records:
        raise DataError(
            f"no question fits {config.prompt.max_length} tokens; {prompts.problems[0]}", hint="raise prompt.max_length"
        )
    return prompts


def _resumed(job: FileJob, config: Config, model: LanguageModel, prompts: _Prompts) -> list[Prediction]:
    text = "\0".join(f"{turn.role}\n{turn.content}" for turns in prompts.turns.values() for turn in turns)
    key = {
        "model": f"{model.engine} {model.fingerprint}",
        "prompts": hashlib.sha256(text.encode("utf-8", errors="backslashreplace")).hexdigest(),
        "decoding": config.predict.model_dump_json(exclude={"models", "threads", "batch_size", "timeout_seconds"}),
    }

    def complete(ids: Sequence[str], decoding: Decoding, done: frozenset[int]) -> Iterator[PromptResult]:
        return model.complete([prompts.turns[id_] for id_ in ids], decoding, done)

    try:
        log = PredictionLog(job.partial, key)
    except ArtifactError as error:
        raise ArtifactError(error.message, hint=f"remove {job.partial} to start again, or name another file") from None
    try:
        with _advice_on_memory(job, config):
            generate_all(f"predict {model.engine}", prompts.records, config.predict, log, complete)
    finally:
        log.close()
    return [log.done[record.id] for record in prompts.records]


def _advice_on_memory(job: FileJob, config: Config) -> AbstractContextManager[None]:
    hint = memory_hint(
        config.predict.batch_size,
        config.prompt.max_length,
        "add --load-in-4bit (older script: --load_in_4bit)" if job.spec.can_load_in_4bit else None,
    )
    return advice_on_memory(hint, during=f"asking {job.spec.name}")


def _facts(predictions: Sequence[Prediction], prompts: _Prompts) -> dict[str, Any]:
    by_id = {record.id: record for record in prompts.records}
    verdicts = [is_correct_prediction(prediction, by_id[prediction.id]) for prediction in predictions]
    known = [verdict for verdict in verdicts if verdict is not None]
    return {
        "num_predictions": len(predictions),
        "num_dropped": prompts.dropped,
        "num_cut_pages": prompts.num_cut,
        "num_cut_off": sum(prediction.finish_reason == "length" for prediction in predictions),
        "num_tokens": sum(map(num_generated_tokens, predictions)),
        "predict_seconds": round(sum(prediction.seconds for prediction in predictions), 3),
        "num_gold": len(known),
        "execution_accuracy": round(sum(known) / len(known), 6) if known else None,
        **({} if prompts.shots is None else {**prompts.shots.use.facts(), "num_excluded": prompts.shots.num_excluded}),
    }


def _write(
    job: FileJob,
    config: Config,
    model: LanguageModel,
    prompts: _Prompts,
    predictions: Sequence[Prediction],
    facts: Mapping[str, Any],
    shard: list[Any] | None,
) -> None:
    questions = {record.id: record.qa.question for record in prompts.records}
    rows = [
        {
            "id": prediction.id,
            "question": questions[prediction.id],
            "predicted": tokenize(prediction.program),
            **prediction.model_dump(mode="json", exclude={"id", "token_ids", "margins"}),
        }
        for prediction in predictions
    ]
    named = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(job.spec).items()}
    manifest = {
        "model": {**named, "engine": model.engine, "fingerprint": model.fingerprint},
        "data": {"path": str(job.data), "sha256": sha256_file(job.data)},
        "shots_from": None if job.train is None else {"path": str(job.train), "sha256": sha256_file(job.train)},
        "num_shots": job.num_shots,
        "max_questions": job.max_questions,
        "seed": config.run.seed,
        "options": {"prompt": config.prompt.model_dump(mode="json"), "predict": config.predict.model_dump(mode="json")},
        "facts": facts,
        "shots": {} if prompts.shots is None else prompts.shots.use.used,
        "versions": installed_versions(),
        "commit": checkout_commit(),
    }
    _write_json(job.written, rows)
    _write_json(job.manifest, manifest if shard is None else manifest | {"shard": shard})
    job.partial.unlink(missing_ok=True)
    job.partial.with_suffix(".key.json").unlink(missing_ok=True)


def _write_json(path: Path, content: Any) -> None:
    write_output(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
