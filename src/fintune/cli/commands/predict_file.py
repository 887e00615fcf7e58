"""Programs for the questions of a plain FinQA file from any model, without a run: one JSON file and its manifest.

``OUT`` is a list of ``{id, question, predicted, program, ...}``, which ``fintune score`` and FinQA's own script read.
``OUT`` with ``.manifest.json`` in place of ``.json``, or behind another name, says what it was made with. While it
grows, the predictions lie beside it (``.partial.jsonl``): the same command goes on from there, another model, prompt or
decoding refuses to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fintune.config import Config
from fintune.data.dataset import draw_records
from fintune.data.few_shot import ShotSelector
from fintune.data.finqa_json import read_finqa
from fintune.errors import ArtifactError, DataError
from fintune.finqa.program import tokenize
from fintune.finqa.prompt import TooLongError, build_messages, prompt_budget
from fintune.inference.generate import generate_all, is_correct_prediction, memory_hint, num_generated_tokens
from fintune.inference.open_model import LanguageModel, ModelSpec, open_model
from fintune.inference.prediction_log import PredictionLog
from fintune.inference.protocol import Decoding, PromptResult
from fintune.records import FinQARecord, Message, Prediction
from fintune.util.console import bar, track
from fintune.util.files import check_outputs, sha256_file, write_output
from fintune.util.memory import advice_on_memory
from fintune.util.system import checkout_commit, installed_versions


@dataclass(frozen=True)
class FileJob:
    """What is asked.

    Attributes:
        spec: The model.
        data: FinQA file whose questions are asked; programs and answers in it are read for the running accuracy alone.
        out: JSON file to write.
        train: FinQA file that shots are chosen from.
        num_shots: Shots of a prompt; 0 for none.
        max_questions: Ask at most so many of them, drawn with ``run.seed`` as a run draws them; all where None.
    """

    spec: ModelSpec
    data: Path
    out: Path
    train: Path | None = None
    num_shots: int = 0
    max_questions: int | None = None

    @property
    def manifest(self) -> Path:
        """Where it is written what ``out`` was made with."""
        return self._beside(".manifest.json")

    @property
    def partial(self) -> Path:
        """Where predictions lie while there are not all of them."""
        return self._beside(".partial.jsonl")

    def _beside(self, ending: str) -> Path:
        # with_suffix would give run.free and run.tight one and the same name.
        return self.out.with_name(self.out.name.removesuffix(".json") + ending)


@dataclass(frozen=True)
class FilePredictions:
    """What came of it.

    Attributes:
        facts: Counts and figures of the manifest.
        problems: A line for each record that was not asked.
    """

    facts: dict[str, Any]
    problems: list[str]


@dataclass
class _Prompts:
    """Conversations by id, in the order of the file, and what became of the pages."""

    records: list[FinQARecord]
    turns: dict[str, tuple[Message, ...]]
    num_cut: int
    dropped: dict[str, int]
    problems: list[str]
    shots: ShotSelector | None


def predict_file(job: FileJob, config: Config) -> FilePredictions:
    """Ask a model every question of a file.

    Args:
        job: Model and files.
        config: ``prompt`` and ``predict``.

    Raises:
        DataError: A file cannot be used, or none of its questions can be asked.
        ModelError: The model cannot be used.
        ResourceError: A package, the hub or a server is missing, or memory ran out.
        ArtifactError: An unfinished attempt was made with something else.
        FintuneError: A file cannot be written.
    """
    job.spec.engine_name  # noqa: B018 - refuses what does not go together, before the data are read
    read_too = [job.data, *([job.train] if job.train is not None else [])]
    check_outputs([job.out, job.manifest], read_too)
    read = read_finqa(job.data, needs_gold=False)
    shots = _shots(job, read.records)
    with _advice_on_memory(job, config), bar("load the model", 1, slow=True):
        model = open_model(job.spec)
        model.load()
    try:
        asked = draw_records(read.records, job.max_questions, config.run.seed)
        prompts = _prompts(asked, model, config, shots)
        prompts.dropped = {**read.dropped, **prompts.dropped}
        prompts.problems = [*read.problems, *prompts.problems]
        predictions = _resumed(job, config, model, prompts)
    finally:
        model.close()
    facts = _facts(predictions, prompts)
    _write(job, config, model, prompts, predictions, facts)
    return FilePredictions(facts, prompts.problems)


def _shots(job: FileJob, records: Sequence[FinQARecord]) -> ShotSelector | None:
    if job.num_shots == 0:
        return None
    if job.train is None:
        raise DataError("shots need training data", hint="name a FinQA file of training questions")
    return ShotSelector(read_finqa(job.train).records, [each.id for each in records], job.num_shots)


def _prompts(
    records: Sequence[FinQARecord], model: LanguageModel, config: Config, shots: ShotSelector | None
) -> _Prompts:
    budget = prompt_budget(config.prompt.max_length)
    made = _Prompts([], {}, 0, {}, [], shots)
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
            made.dropped["too long"] = made.dropped.get("too long", 0) + 1
            made.problems.append(str(DataError(error.message, record_id=record.id)))
            continue
        turns = built.messages
        if shots is not None:
            turns = shots.insert(record.id, record.qa.question, turns, budget=budget, count=model.count_tokens)
        made.records.append(record)
        made.turns[record.id] = turns
        made.num_cut += built.num_cut > 0
    if not made.records:
        raise DataError(
            f"no question fits {config.prompt.max_length} tokens; {made.problems[0]}", hint="raise prompt.max_length"
        )
    return made


def _resumed(job: FileJob, config: Config, model: LanguageModel, prompts: _Prompts) -> list[Prediction]:
    text = "\0".join(f"{turn.role}\n{turn.content}" for turns in prompts.turns.values() for turn in turns)
    key = {
        "model": f"{model.engine} {model.fingerprint}",
        "prompts": hashlib.sha256(text.encode("utf-8", errors="backslashreplace")).hexdigest(),
        "decoding": config.predict.model_dump_json(exclude={"models", "threads", "batch_size", "timeout_seconds"}),
    }

    def complete(ids: Sequence[str], decoding: Decoding, done: frozenset[int]) -> Iterator[PromptResult]:
        return model.complete([prompts.turns[each] for each in ids], decoding, done)

    try:
        log = PredictionLog(job.partial, key)
    except ArtifactError as error:
        raise ArtifactError(error.message, hint=f"remove {job.partial} to start again, or name another file") from None
    try:
        with _advice_on_memory(job, config):
            generate_all(f"predict {model.engine}", prompts.records, config.predict, log, complete)
    finally:
        log.close()
    return [log.done[each.id] for each in prompts.records]


def _advice_on_memory(job: FileJob, config: Config) -> AbstractContextManager[None]:
    hint = memory_hint(
        config.predict.batch_size,
        config.prompt.max_length,
        "add --load-in-4bit (older script: --load_in_4bit)" if job.spec.can_load_in_4bit else None,
    )
    return advice_on_memory(hint, during=f"asking {job.spec.name}")


def _facts(predictions: Sequence[Prediction], prompts: _Prompts) -> dict[str, Any]:
    by_id = {each.id: each for each in prompts.records}
    right = [is_correct_prediction(each, by_id[each.id]) for each in predictions]
    known = [each for each in right if each is not None]
    return {
        "num_predictions": len(predictions),
        "num_dropped": prompts.dropped,
        "num_cut_pages": prompts.num_cut,
        "num_cut_off": sum(each.finish_reason == "length" for each in predictions),
        "num_tokens": sum(map(num_generated_tokens, predictions)),
        "predict_seconds": round(sum(each.seconds for each in predictions), 3),
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
) -> None:
    questions = {each.id: each.qa.question for each in prompts.records}
    rows = [
        {
            "id": each.id,
            "question": questions[each.id],
            "predicted": tokenize(each.program),
            **each.model_dump(mode="json", exclude={"id", "token_ids", "margins"}),
        }
        for each in predictions
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
    write_output(job.out, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    write_output(job.manifest, json.dumps(manifest, ensure_ascii=False, indent=1) + "\n")
    job.partial.unlink(missing_ok=True)
    job.partial.with_suffix(".key.json").unlink(missing_ok=True)
