"""``fintune train``: train an adapter for the base model, or all its weights, on the tokens of ``prepare``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import Config
from fintune.errors import ArtifactError, ConfigError
from fintune.evaluation.questions import read_questions
from fintune.export.gguf.architectures import ARCHITECTURES
from fintune.inference.open_model import wrap_model
from fintune.inference.protocol import Decoding, sorted_by_prompt
from fintune.models import load as models
from fintune.models.adapter import check_base_name, load_adapter, merged_facts, read_merged_facts
from fintune.models.folder import FULL_MODEL_FOLDER, read_model_config
from fintune.publish import files as publication
from fintune.publish.push import EpochPushes
from fintune.training import callbacks, distributed, full, lora, optimizers, preference, sft, unsloth, verify
from fintune.training.checkpoints import BEST_FOLDER, count_saved_numbers
from fintune.training.combinations import check_combinations
from fintune.training.evaluate import Evaluation
from fintune.training.memory import planner
from fintune.training.metrics import training_facts
from fintune.util.console import say
from fintune.util.hub import require_token
from fintune.util.memory import advice_on_memory, release_memory
from fintune.util.sampling import draw_indices

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train(config: Config, inputs: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Train, resuming an interrupted attempt in ``folder``.

    Writes ``adapter/`` in PEFT's format (or ``model/`` if every weight is trained), ``metrics.jsonl`` and, during
    training, ``checkpoints/``.

    Raises:
        FintuneError: Loss or gradient is not finite.
        ModelError: The base model cannot be used.
        ConfigError: The model does not have a target layer.
        ResourceError: A package is missing, or there is not enough memory.
    """
    check_training(config)
    rows = _load_rows(inputs["prepare"] / "tokens" / "train")
    result = _result_folder(config, folder)
    # An earlier attempt may have been interrupted after the result was written and before the stage ended.
    if not result.exists():
        if config.train.gpus * config.train.machines > 1:
            distributed.launch(config, inputs["prepare"], folder)
        else:
            with _memory_advice(config, rows, folder):
                _train(config, inputs["prepare"], rows, folder, result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / BEST_FOLDER, ignore_errors=True)
    facts: dict[str, Any] = {"num_examples": len(rows), "precision": _precision(config).dtype}
    facts |= _origin(config) | preference.label_facts(config.train, rows)
    return facts | training_facts(config, folder, count_saved_numbers(result))


def _origin(config: Config) -> dict[str, Any]:
    """Return the adapter that was trained further, and the adapter that was merged into the base model."""
    origin: dict[str, Any] = {}
    if config.adapter.continue_from is not None:
        origin["continued_from"] = {"adapter": str(config.adapter.continue_from)} | merged_facts(
            config.adapter.continue_from
        )
    if merged := read_merged_facts(models.fetch_base(config).path):
        origin["base_merged_from"] = merged
    return origin


def train_as_rank(config: Config, prepare: Path, folder: Path) -> None:
    """Train as one process of several; arguments and errors as for :func:`train`."""
    rows = _load_rows(prepare / "tokens" / "train")
    with _memory_advice(config, rows, folder):
        _train(config, prepare, rows, folder, _result_folder(config, folder))


def check_training(config: Config) -> None:
    """Refuse what is sure to fail later: missing packages and GPUs, and unproven combinations. Loads no model.

    Raises:
        ResourceError: A package or GPU is missing.
        ConfigError: An optimizer or a combination of options that cannot be used.
    """
    check_combinations(config)
    distributed.require_gpus(config.train.gpus)
    callbacks.check_reporters(config.train.report_to)
    adapter = config.adapter.continue_from
    if adapter is not None:
        if adapter.resolve().is_relative_to(config.folder.resolve()):
            raise ConfigError(
                f"adapter.continue_from: {adapter} is a result of this run, which would replace it",
                hint="set another run.name",
                option="adapter.continue_from",
            )
        check_base_name(config.model.name, adapter)
        lora.check_continued(config.adapter)
    if config.publish.each_epoch:
        require_token()
    if config.train.backend == "unsloth":
        unsloth.check_environment(config)
    if config.train.optim != "adamw_torch":  # the other optimizers may need a GPU, and asking torch takes seconds
        import torch

        optimizers.check_optimizer(config.train.optim, cuda=torch.cuda.is_available())
    if config.model.quantization == "nf4":
        models.check_four_bit()


def _train(config: Config, prepare: Path, rows: Dataset, folder: Path, result: Path) -> None:
    import torch
    from transformers import set_seed

    torch.set_num_threads(config.train.threads or distributed.local_threads())
    precision = _precision(config)
    four_bit = "; base weights in 4 bits (NF4)" if config.model.quantization == "nf4" else ""
    say(f"precision {precision.dtype}: {precision.reason}{four_bit}")
    base_folder = models.fetch_base(config)
    _say_unexportable(config, base_folder)
    if config.train.backend == "unsloth":
        unsloth.train_with_unsloth(
            config, model=base_folder.path, prepare=prepare, folder=folder, compute=precision.dtype
        )
        return
    tokenizer = models.load_tokenizer(base_folder, trust_remote_code=config.model.trust_remote_code)
    set_seed(config.run.seed)
    options, is_sharded = preference.with_label_weights(config.train, rows), _is_sharded(config, base_folder, rows)
    if labels := preference.label_facts(config.train, rows):
        say(preference.format_label_facts(labels))
    if is_sharded:
        options = options.model_copy(update={"fused_layers": "never", "sharding": "full"})
    base = _load_base(config, base_folder, precision, is_sharded=is_sharded)
    unchecked, ids = result.with_name(f"{result.name}.unchecked"), verify.probe_tokens(rows)
    run = partial(
        sft.train_model,
        tokenizer=tokenizer,
        rows=rows,
        options=options,
        compute=precision.dtype,
        seed=config.run.seed,
        folder=folder,
        evaluation=_evaluation(config, prepare, tokenizer),
        reporters=partial(_reporters, config, folder),
    )
    if config.adapter.kind == "full":
        run(full.train_all_weights(base))
        full.save_full_model(base, tokenizer, base_folder.path, unchecked)
        expected = verify.own_logits(base, ids, compute=precision.dtype)
        del base, run
        _check_saved(config, models.fetch(str(unchecked)), unchecked, ids, expected, precision)
        unchecked.replace(result)
        return
    attach = lora.attach_adapter if config.adapter.continue_from is None else lora.continue_adapter
    model = attach(base, config.adapter)
    lora.say_unmergeable(model, base_folder.path)
    if config.adapter.init_lora_weights == "loftq":
        lora.init_from_quantization_error(model, base_folder.path)
    first_logits = start = None
    if config.adapter.init_lora_weights != "default":
        first_logits, start = verify.own_logits(model, ids, compute=precision.dtype), folder / "checkpoints" / "start"
        lora.save_adapter_start(model, start)
    pushes = _epoch_pushes(config, model, start)
    run(model, after_epoch=pushes.push_epoch if pushes else None)
    if distributed.is_main():
        name, revision = config.model.name, config.model.revision
        lora.save_adapter(model, name, revision, unchecked, start=start, base=base_folder.path)
        if pushes:
            pushes.finish()
        if not is_sharded:
            expected = verify.own_logits(model, ids, compute=precision.dtype)
            del base, model, run, pushes
            _check_saved(config, base_folder, unchecked, ids, expected, precision, first_logits)
        unchecked.replace(result)
    distributed.barrier()


def _say_unexportable(config: Config, base: models.ModelFolder) -> None:
    family = read_model_config(base.path).get("model_type")
    if family not in ARCHITECTURES and config.export.llama_cpp_path is None and distributed.is_main():
        say(f"export: GGUF files of {family} need a llama.cpp checkout (export.llama_cpp_path)")


def _load_base(
    config: Config, folder: models.ModelFolder, precision: models.Precision, *, is_sharded: bool
) -> PreTrainedModel:
    import torch

    # On a CPU, the weights stay float32 and only products are computed in 16 bits. The residual stream is then not
    # rounded at every layer, which decides a seventh of the answers at 135M parameters. A GPU's memory and bandwidth
    # call for 16-bit weights. But 16 bits would round small updates away from weights that are trained themselves.
    is_full = config.adapter.kind == "full"
    return models.load_model(
        folder,
        dtype=precision.dtype if torch.cuda.is_available() and not is_full else "float32",
        # Sharded weights are divided layer by layer, so that no GPU ever holds the whole model.
        device="cpu" if is_sharded else distributed.local_device(),
        quantization=config.model.quantization,
        compute=precision.dtype,
        trust_remote_code=config.model.trust_remote_code,
    )


def _check_saved(
    config: Config,
    base: models.ModelFolder,
    saved: Path,
    ids: Sequence[int],
    expected: torch.Tensor,
    precision: models.Precision,
    first_logits: torch.Tensor | None = None,
) -> None:
    """Compare what was saved, on the base as it is stored, with the logits of the trained model."""
    release_memory()
    if first_logits is not None:  # PiSSA, which needs 16 bits, or LoftQ, which trains on 4-bit weights for 16-bit ones
        config = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "none"})})

    def load() -> PreTrainedModel | PeftModel:
        model = _load_base(config, base, precision, is_sharded=False)
        return model if config.adapter.kind == "full" else load_adapter(model, saved)

    verify.check_saved(saved, expected, ids, load, compute=precision.dtype, start=first_logits)


def _reporters(config: Config, folder: Path, done: int) -> Sequence[object]:
    if not distributed.is_main():
        return []
    return callbacks.make_reporters(
        config.train.report_to,
        folder=folder,
        run_name=config.run.name,
        options=config.model_dump(mode="json", include={"model", "adapter", "train"}),
        done=done,
    )


def _epoch_pushes(config: Config, model: PeftModel, start: Path | None) -> EpochPushes | None:
    """Return the pushes of the adapter after each epoch; None if they are off."""
    if not config.publish.each_epoch or not distributed.is_main():
        return None
    base, _ = publication.base_of(config)  # a path of this machine means nothing on the hub
    name, revision = base.hub_id or base.name, config.model.revision
    return EpochPushes(config.publish, lambda folder: lora.save_adapter(model, name, revision, folder, start=start))


def _is_sharded(config: Config, folder: models.ModelFolder, rows: Dataset) -> bool:
    """Whether the base is divided among the GPUs. Whole copies are faster, so it is divided only if they do not fit."""
    import torch

    if distributed.world_size() == 1 or config.train.sharding == "none" or config.model.quantization == "nf4":
        return False
    if config.train.sharding == "full" or not torch.cuda.is_available():
        return config.train.sharding == "full"
    limit = distributed.all_reduce_min(planner.usable_bytes(config.train.max_memory_gib, planner.free_bytes()))
    longest = max(map(len, rows["input_ids"]))
    return not planner.fits_one_gpu(config, read_model_config(folder.path), longest, limit)


def _evaluation(config: Config, prepare: Path, tokenizer: PreTrainedTokenizerBase) -> Evaluation | None:
    options = config.train
    if not options.has_evaluations:
        return None
    rows = _load_rows(prepare / "tokens" / "eval", "evaluate")
    rows = rows.select(draw_indices(len(rows), options.max_eval_samples, config.run.seed))
    if options.select_checkpoint != "best_accuracy":
        return Evaluation(rows)
    ids = set(rows["id"])
    questions = read_questions(prepare, ids)
    if len(questions) != len(ids):
        raise ArtifactError(
            f"{prepare}: {len(ids) - len(questions)} evaluation examples have no gold program",
            hint="rerun prepare, or set train.select_checkpoint to best_loss",
        )

    def accuracy(model: PeftModel | PreTrainedModel) -> float:
        language_model = wrap_model(model, tokenizer, batch_size=config.predict.batch_size)
        own_questions = distributed.rank_share(questions)
        decoding = Decoding(max_new_tokens=options.eval_new_tokens)
        conversations = [question.messages for question in own_questions]
        answers = sorted_by_prompt(language_model.complete(conversations, decoding) if conversations else ())
        num_correct = sum(
            question.is_correct(answer.text) for question, answer in zip(own_questions, answers, strict=True)
        )
        return distributed.all_reduce_sum([num_correct])[0] / len(questions)

    return Evaluation(rows, accuracy)


def _memory_advice(config: Config, rows: Dataset, folder: Path) -> AbstractContextManager[None]:
    """Turn running out of memory into one line with the overrides to add."""

    def advice() -> str:
        import torch

        model_config, limit = None, 0
        if torch.cuda.is_available():
            model_config = read_model_config(models.fetch_config(config.model.name, revision=config.model.revision))
            limit = planner.usable_bytes(config.train.max_memory_gib, planner.free_bytes())
        return planner.advise_less_memory(
            config,
            model_config,
            longest=max(map(len, rows["input_ids"])),
            limit=limit,
            followed_plan="predicted_peak_gib" in planner.read_plan(folder),
        )

    return advice_on_memory(advice)


def _precision(config: Config) -> models.Precision:
    if config.train.dtype == "auto":
        return models.detect_precision()
    return models.Precision(config.train.dtype, "train.dtype says so")


def _result_folder(config: Config, folder: Path) -> Path:
    return folder / (FULL_MODEL_FOLDER if config.adapter.kind == "full" else "adapter")


def _load_rows(folder: Path, verb: str = "train") -> Dataset:
    from datasets import load_from_disk

    if not folder.is_dir():
        raise ArtifactError(f"{folder} is missing, so there is no data to {verb} on", hint="rerun prepare")
    rows = load_from_disk(str(folder))
    if len(rows) == 0:
        raise ArtifactError(
            f"{folder} has no example to {verb} on", hint="look in prepare/report.json for why rows were dropped"
        )
    return rows
