"""``fintune predict``: programs for the evaluation questions from one kind of model."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fintune.config import Config, ModelKind
from fintune.data.few_shot import examples_with_shots
from fintune.errors import ArtifactError, ModelError
from fintune.finqa.parse import ParseError, parse
from fintune.finqa.program import tokenize
from fintune.inference.answering import answer_all, less_memory, num_tokens
from fintune.inference.journal import Journal
from fintune.models import adapter as adapters
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.records import Example, FinQARecord, Prediction
from fintune.training import full
from fintune.util.console import quiet_libraries
from fintune.util.memory import advice_on_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fintune.inference.openai import ChatEngine
    from fintune.inference.protocol import Answered, Completion, Decoding, Engine

FOUR_BIT = "_4bit"
"""Ending of the kinds whose weights are packed while they load."""


def predict(config: Config, inputs: Mapping[str, Path], folder: Path, *, kind: ModelKind) -> dict[str, Any]:
    """Decode every evaluation prompt; goes on where an interrupted attempt in ``folder`` stopped.

    Args:
        config: The run.
        inputs: Needs ``prepare``, and ``train``, ``merge`` or ``export`` according to the kind.
        folder: Gets ``predictions.jsonl`` and ``official.json``, both in the order of ``eval.jsonl``, and
            ``predictions.key.json``, which says what they are from; ``shots.json`` with the ids of the shots of each
            question where there are any.
        kind: The model before training, base + adapter, the merged folder (these two also in 4 bits), a GGUF file by
            its type, or what is served at ``predict.endpoint``.

    Returns:
        Predictions, seconds, generated tokens a second, share that was cut off at ``predict.max_new_tokens``, programs
        that the parser does not read, mean confidence.

    Raises:
        ModelError: The model cannot be used, a prompt does not fit its context, or a GGUF file's tokenizer counts
            otherwise than the model's.
        ArtifactError: ``predictions.jsonl`` was begun with another model, other prompts or another decoding, or the
            server answers otherwise by now; or ``gold.json`` lacks the page of an example.
        ResourceError: Memory ran out, or a server does not answer.
    """
    examples = _examples(inputs["prepare"] / "eval.jsonl")
    tokenizer = _tokenizer(config)
    shots = None
    if config.predict.num_fewshot:
        examples, shots = examples_with_shots(
            config, inputs["prepare"], examples, lambda turns: len(chat.encode_prompt(tokenizer, turns))
        )
    prompts = {each.id: chat.render(tokenizer, each.messages) for each in examples}
    with ExitStack() as opened:
        served = opened.enter_context(closing(_served(config, examples, prompts))) if kind == "endpoint" else None
        key = {
            "model": _fingerprint(config, inputs, kind) if served is None else served.fingerprint(),
            "prompts": hashlib.sha256("\0".join(prompts.values()).encode()).hexdigest(),
            "decoding": config.predict.model_dump_json(exclude={"models", "threads", "batch_size", "timeout_seconds"}),
        }
        journal = opened.enter_context(closing(Journal(folder / "predictions.jsonl", key)))
        if any(each.id not in journal.done for each in examples):
            with advice_on_memory(lambda: _less_memory(config, kind), during=f"asking the {kind} model"):
                _decode(config, inputs, kind, tokenizer, examples, prompts, journal, served)
            gc.collect()  # the next kind's model should not stand beside this one in memory
    facts = _finish(folder, [journal.done[each.id] for each in examples])
    if shots is not None:
        _write(folder / "shots.json", json.dumps(shots.used, indent=1) + "\n")
        facts |= shots.facts()
    return facts


def _decode(
    config: Config,
    inputs: Mapping[str, Path],
    kind: ModelKind,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    prompts: Mapping[str, str],
    journal: Journal,
    served: ChatEngine | None,
) -> None:
    pages = _pages(inputs["prepare"] / "gold.json", examples)
    by_id = {each.id: each for each in examples}
    engine = served or _open_engine(config, inputs, kind, tokenizer)

    def ask(ids: Sequence[str], decoding: Decoding, done: frozenset[int]) -> Iterator[Answered]:
        return engine.generate([prompts[each] for each in ids], decoding, done)

    def check(example_id: str, completion: Completion) -> None:
        _check_prompt(by_id[example_id], completion, tokenizer, kind)

    # A server has a tokenizer and a chat template of its own.
    check_prompts = check if served is None else None
    answer_all(f"predict {kind}", pages, config.predict, journal, ask, check_prompts, is_served=served is not None)
    engine.close()


def _less_memory(config: Config, kind: ModelKind) -> str:
    can_pack = kind == "merged" or (kind == "adapter" and config.adapter.kind != "full")
    four_bit = f"measure {kind}{FOUR_BIT} instead of {kind} (predict.models)" if can_pack else None
    return less_memory(config.predict.batch_size, config.prompt.max_length, four_bit)


def _check_prompt(example: Example, completion: Completion, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    expected = len(chat.encode_prompt(tokenizer, example.messages))
    if completion.num_prompt_tokens != expected:
        raise ModelError(
            f"the {kind} model reads the prompt of {example.id} as {completion.num_prompt_tokens} tokens, "
            f"the tokenizer as {expected}",
            hint="its tokenizer differs from the one of training; export it again",
        )


def _finish(folder: Path, predictions: Sequence[Prediction]) -> dict[str, Any]:
    lines = "".join(each.model_dump_json() + "\n" for each in predictions)
    _write(folder / "predictions.jsonl", lines)
    official = [{"id": each.id, "predicted": tokenize(each.program)} for each in predictions]
    _write(folder / "official.json", json.dumps(official, ensure_ascii=False, indent=1) + "\n")
    seconds = sum(each.seconds for each in predictions)
    total = sum(map(num_tokens, predictions))
    length_share = sum(each.finish_reason == "length" for each in predictions) / max(len(predictions), 1)
    rate = total / max(seconds, 1e-9)
    known = [each.confidence for each in predictions if each.confidence is not None]
    return {
        "num_predictions": len(predictions),
        "predict_seconds": round(seconds, 3),
        "num_tokens": total,
        "tokens_per_second": round(rate, 1),
        "length_share": length_share,
        "num_unparsable": sum(not _parses(each.program) for each in predictions),
        "mean_confidence": round(sum(known) / len(known), 4) if known else None,
        "summary": f"{len(predictions)} predictions, {rate:.0f} tok/s, {length_share:.0%} cut off",
    }


def _parses(program: str) -> bool:
    try:
        parse(program)
    except ParseError:
        return False
    return True


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _examples(path: Path) -> list[Example]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [Example.model_validate_json(line) for line in lines]
    except (OSError, ValidationError) as error:
        raise ArtifactError(f"{path}: {str(error).splitlines()[0]}", hint="run fintune prepare again") from None


def _tokenizer(config: Config) -> PreTrainedTokenizerBase:
    ref = models.fetch_base(config)
    return models.load_tokenizer(ref, trust_remote_code=config.model.trust_remote_code)


def _gguf(config: Config, inputs: Mapping[str, Path], kind: str) -> Path:
    return inputs["export"] / f"{config.run.name}-{kind}.gguf"


def _fingerprint(config: Config, inputs: Mapping[str, Path], kind: str) -> str:
    """What tells this model from others. `fintune.models` keeps the hashes of weights in the cache folder."""
    if kind.endswith(FOUR_BIT):
        return f"{_fingerprint(config, inputs, kind.removesuffix(FOUR_BIT))} 4bit"
    if kind in ("base", "adapter"):
        ref = models.fetch_base(config)
        base = models.model_fingerprint(ref.path)
        if kind == "base":
            return base
        return (
            f"{base} {models.model_fingerprint(full.full_model_folder(inputs['train']) or inputs['train'] / 'adapter')}"
        )
    if kind == "merged":
        return models.model_fingerprint(inputs["merge"])
    stat = _gguf(config, inputs, kind).stat()
    return f"{kind} {stat.st_size} {stat.st_mtime_ns}"


def _open_engine(config: Config, inputs: Mapping[str, Path], kind: str, tokenizer: PreTrainedTokenizerBase) -> Engine:
    threads = config.predict.threads or os.cpu_count() or 1
    four_bit, kind = kind.endswith(FOUR_BIT), kind.removesuffix(FOUR_BIT)
    if kind not in ("base", "adapter", "merged"):
        from fintune.inference.llama_cpp import LlamaCppEngine

        return LlamaCppEngine(
            _gguf(config, inputs, kind),
            context_tokens=config.prompt.max_length + config.predict.max_new_tokens,
            threads=threads,
        )

    name, revision = (str(inputs["merge"]), None) if kind == "merged" else (config.model.name, config.model.revision)
    whole = full.full_model_folder(inputs["train"]) if kind == "adapter" else None
    if whole is not None:
        name, revision = str(whole), None
    ref = models.fetch(name, revision=revision)
    adapter = inputs["train"] / "adapter" if kind == "adapter" and whole is None else None
    if config.predict.engine == "vllm":
        from fintune.inference.vllm_engine import VllmEngine

        return VllmEngine(
            ref.path,
            tokenizer,
            adapter=adapter,
            context_tokens=config.prompt.max_length + config.predict.max_new_tokens,
            dtype=config.predict.dtype,
            load_in_4bit=four_bit,
            trust_remote_code=config.model.trust_remote_code,
        )

    import torch

    from fintune.inference.transformers_engine import TransformersEngine

    torch.set_num_threads(threads)
    model = models.load_model(
        ref,
        dtype=config.predict.dtype,
        quantization="nf4" if four_bit else "none",
        trust_remote_code=config.model.trust_remote_code,
    )
    if adapter is not None:
        with quiet_libraries():
            model = adapters.load_adapter(model, adapter)
    return TransformersEngine(model.eval(), tokenizer, config.predict.batch_size)


def _served(config: Config, examples: Sequence[Example], prompts: Mapping[str, str]) -> ChatEngine:
    from fintune.inference.endpoint import parse
    from fintune.inference.openai import ChatEngine, OpenAIEngine

    assert config.predict.endpoint is not None, "the options ask for it"
    options = config.predict
    endpoint = parse(config.predict.endpoint)
    served = OpenAIEngine(endpoint, parallel=options.batch_size, timeout_seconds=options.timeout_seconds)
    return ChatEngine(served, {prompts[each.id]: each.messages for each in examples})


def _pages(path: Path, examples: Sequence[Example]) -> list[FinQARecord]:
    """The records that examples were made from.

    Raises:
        ArtifactError: One is missing.
    """
    raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    records = {record.id: record for record in map(FinQARecord.model_validate, raw)}
    for each in examples:
        if each.id not in records:
            raise ArtifactError(f"{path} has no page {each.id}", hint="run fintune prepare again")
    return [records[each.id] for each in examples]
