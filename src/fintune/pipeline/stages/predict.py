"""``fintune predict``: programs for the evaluation questions from one kind of model."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fintune.config import Config, ModelKind
from fintune.data.few_shot import examples_with_shots
from fintune.errors import ArtifactError, ModelError
from fintune.finqa.parse import ParseError, parse
from fintune.finqa.program import tokenize
from fintune.inference.generate import PredictionLog, generate_all, memory_hint, num_generated_tokens
from fintune.inference.open_model import FOUR_BIT_SUFFIX, LanguageModel, ModelSpec, open_model
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.records import Example, FinQARecord, Prediction
from fintune.util.files import write_atomically
from fintune.util.memory import advice_on_memory
from fintune.util.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fintune.inference.protocol import Completion, Decoding, PromptResult


def predict(config: Config, inputs: Mapping[str, Path], folder: Path, *, kind: ModelKind) -> dict[str, Any]:
    """Complete every evaluation prompt. Resumes where an interrupted attempt in ``folder`` stopped.

    Writes ``predictions.jsonl`` and ``official.json``, both in the order of ``eval.jsonl``, and
    ``predictions.key.json``, which says what they are from. With few-shot prompts, ``shots.json`` has the ids of the
    shots of each question.

    Raises:
        ModelError: The model cannot be used, a prompt does not fit its context, or a GGUF file's tokenizer counts
            other tokens than the model's.
        ArtifactError: ``predictions.jsonl`` was started with another model, other prompts or another decoding, or
            ``gold.json`` lacks the page of an example.
        ResourceError: Memory ran out, or a server does not answer.
    """
    examples = _read_examples(inputs["prepare"] / "eval.jsonl")
    tokenizer = models.load_tokenizer(models.fetch_base(config), trust_remote_code=config.model.trust_remote_code)
    shots = None
    if config.predict.num_fewshot:
        examples, shots = examples_with_shots(
            config, inputs["prepare"], examples, lambda turns: len(chat.encode_prompt(tokenizer, turns))
        )
    prompts = {example.id: chat.render(tokenizer, example.messages) for example in examples}
    with closing(open_model(ModelSpec.from_config(config, kind, inputs))) as model:
        key = {
            "model": model.fingerprint,
            "prompts": hashlib.sha256("\0".join(prompts.values()).encode()).hexdigest(),
            "decoding": config.predict.model_dump_json(exclude={"models", "threads", "batch_size", "timeout_seconds"}),
        }
        with closing(PredictionLog(folder / "predictions.jsonl", key)) as log:
            if any(example.id not in log.done for example in examples):
                with advice_on_memory(lambda: _memory_hint(config, kind), during=f"asking the {kind} model"):
                    _generate(config, kind, model, tokenizer, _pages(inputs["prepare"], examples), examples, log)
    gc.collect()  # this model must not be in memory beside the next kind's
    facts = _write_results(folder, [log.done[example.id] for example in examples])
    if shots is not None:
        write_atomically(folder / "shots.json", json.dumps(shots.used, indent=1) + "\n")
        facts |= shots.facts()
    return facts


def _generate(
    config: Config,
    kind: ModelKind,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    pages: Sequence[FinQARecord],
    examples: Sequence[Example],
    log: PredictionLog,
) -> None:
    messages = {example.id: example.messages for example in examples}
    is_served = model.engine == "openai"

    def complete(ids: Sequence[str], decoding: Decoding, done: frozenset[int]) -> Iterator[PromptResult]:
        conversations = [messages[example_id] for example_id in ids]
        if is_served:
            return model.complete(conversations, decoding, done)
        # A GGUF file is asked with the prompts of training, too, not with those of its own template.
        return model.complete_rendered([chat.render(tokenizer, turns) for turns in conversations], decoding, done)

    def check(example_id: str, completion: Completion) -> None:
        num_expected = len(chat.encode_prompt(tokenizer, messages[example_id]))
        if completion.num_prompt_tokens != num_expected:
            raise ModelError(
                f"the {kind} model reads the prompt of {example_id} as {completion.num_prompt_tokens} tokens, "
                f"the tokenizer as {num_expected}",
                hint="its tokenizer differs from the one of training; export it again",
            )

    # A server has its own tokenizer and chat template, so its prompts have other lengths.
    generate_all(f"predict {kind}", pages, config.predict, log, complete, None if is_served else check)


def _memory_hint(config: Config, kind: ModelKind) -> str:
    can_load_in_4bit = kind == "merged" or (kind == "adapter" and config.adapter.kind != "full")
    four_bit = f"measure {kind}{FOUR_BIT_SUFFIX} instead of {kind} (predict.models)" if can_load_in_4bit else None
    return memory_hint(config.predict.batch_size, config.prompt.max_length, four_bit)


def _write_results(folder: Path, predictions: Sequence[Prediction]) -> dict[str, Any]:
    lines = "".join(prediction.model_dump_json() + "\n" for prediction in predictions)
    write_atomically(folder / "predictions.jsonl", lines)
    official = [{"id": prediction.id, "predicted": tokenize(prediction.program)} for prediction in predictions]
    write_atomically(folder / "official.json", json.dumps(official, ensure_ascii=False, indent=1) + "\n")
    seconds = sum(prediction.seconds for prediction in predictions)
    num_tokens = sum(map(num_generated_tokens, predictions))
    num_cut_off = sum(prediction.finish_reason == "length" for prediction in predictions)
    length_share = num_cut_off / max(len(predictions), 1)
    rate = num_tokens / max(seconds, 1e-9)
    confidences = [prediction.confidence for prediction in predictions if prediction.confidence is not None]
    return {
        "num_predictions": len(predictions),
        "predict_seconds": round(seconds, 3),
        "num_tokens": num_tokens,
        "tokens_per_second": round(rate, 1),
        "length_share": length_share,
        "num_unparsable": sum(not _is_parsable(prediction.program) for prediction in predictions),
        "mean_confidence": round(sum(confidences) / len(confidences), 4) if confidences else None,
        "summary": f"{len(predictions)} predictions, {rate:.0f} tok/s, {length_share:.0%} cut off",
    }


def _is_parsable(program: str) -> bool:
    try:
        parse(program)
    except ParseError:
        return False
    return True


def _read_examples(path: Path) -> list[Example]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [Example.model_validate_json(line) for line in lines]
    except (OSError, ValidationError) as error:
        raise ArtifactError(f"{path}: {first_line(error)}", hint="rerun fintune prepare") from None


def _pages(prepare: Path, examples: Sequence[Example]) -> list[FinQARecord]:
    """Return the records that the examples were made from."""
    path = prepare / "gold.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    records = {record.id: record for record in map(FinQARecord.model_validate, rows)}
    for example in examples:
        if example.id not in records:
            raise ArtifactError(f"{path} has no page {example.id}", hint="rerun fintune prepare")
    return [records[example.id] for example in examples]
