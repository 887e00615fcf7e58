"""``fintune train``: an adapter for the base model, or all its weights, from the tokenised examples of ``prepare``."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import Config
from fintune.errors import ArtifactError
from fintune.evaluation.questions import read_questions
from fintune.inference.protocol import Decoding, in_order
from fintune.inference.transformers_engine import TransformersEngine
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.models.folder import read_model_config
from fintune.publish import files as publication
from fintune.publish.push import EpochPushes
from fintune.training import (
    adapter,
    advice,
    full,
    launch,
    optimizers,
    planned,
    preference_rows,
    ranks,
    reporters,
    sft,
    unsloth,
)
from fintune.training.evaluate import BEST, Evaluation
from fintune.training.facts import trained_facts
from fintune.util.console import say
from fintune.util.hub import require_token
from fintune.util.memory import advice_on_memory

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train(config: Config, inputs: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Train; goes on where an interrupted attempt in ``folder`` stopped.

    Args:
        config: The run.
        inputs: Needs ``prepare``.
        folder: Gets ``adapter/`` in PEFT's format (``model/``, where every weight is trained), ``metrics.jsonl`` and,
            while it works, ``checkpoints/``.

    Returns:
        Steps, tokens, mean loss of the first and of the last steps, seconds, tokens a second, trained parameters,
        precision, kept step.

    Raises:
        FintuneError: Loss or gradient is not finite.
        ModelError: The base model cannot be used.
        ConfigError: A target that the model does not have.
        ResourceError: A package is missing, or the memory does not suffice.
    """
    check(config)
    rows = _rows(inputs["prepare"] / "tokens" / "train")
    result = _result(config, folder)
    # An earlier attempt may have been interrupted between the result's appearance and the stage's end.
    if not result.exists():
        if config.train.gpus * config.train.machines > 1:
            launch.run(config, inputs["prepare"], folder)
        else:
            with _with_advice(config, rows, folder):
                _train(config, inputs["prepare"], rows, folder, result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / BEST, ignore_errors=True)
    counts = {"num_examples": len(rows), "precision": _precision(config).dtype}
    return counts | preference_rows.label_facts(config.train, rows) | trained_facts(config, folder, result)


def train_as_rank(config: Config, prepare: Path, folder: Path) -> None:
    """What each process of a training on several GPUs does; arguments and errors as for :func:`train`."""
    rows = _rows(prepare / "tokens" / "train")
    with _with_advice(config, rows, folder):
        _train(config, prepare, rows, folder, _result(config, folder))


def _result(config: Config, folder: Path) -> Path:
    return folder / (full.FOLDER if config.adapter.kind == "full" else "adapter")


def check(config: Config) -> None:
    """Refuse what is sure to fail later for want of a package, or is not proven on several GPUs; loads nothing.

    Raises:
        ResourceError: With the package's name, or fewer GPUs than asked for.
        ConfigError: An optimiser that this machine cannot run, or a combination that several GPUs cannot.
    """
    launch.check(config)
    launch.require_gpus(config.train.gpus)
    reporters.check(config.train.report_to)
    if config.publish.each_epoch:
        require_token()
    if config.train.backend == "unsloth":
        unsloth.check(config)
    if config.train.optim != "adamw_torch":  # the others ask torch about a GPU, which takes seconds
        import torch

        optimizers.check(config.train.optim, cuda=torch.cuda.is_available())
    if config.model.quantization == "nf4":
        models.check_four_bit()


def _train(config: Config, prepare: Path, rows: Dataset, folder: Path, result: Path) -> None:
    import torch
    from transformers import set_seed

    torch.set_num_threads(config.train.threads or ranks.threads())
    precision = _precision(config)
    four_bit = "; base weights in 4 bits (NF4)" if config.model.quantization == "nf4" else ""
    say(f"precision {precision.dtype}: {precision.reason}{four_bit}")
    ref = models.fetch_base(config)
    if config.train.backend == "unsloth":
        unsloth.train(config, model=ref.path, prepare=prepare, folder=folder, compute=precision.dtype)
        return
    tokenizer = models.load_tokenizer(ref, trust_remote_code=config.model.trust_remote_code)
    set_seed(config.run.seed)
    is_full = config.adapter.kind == "full"
    # On a processor the weights stay float32 and only products are taken in 16 bits, so that the residual stream is not
    # rounded at every layer: at 135M parameters that decides a seventh of the answers. A GPU's memory and bandwidth
    # want 16-bit weights; but weights that are trained themselves would round small updates away.
    stored = precision.dtype if torch.cuda.is_available() and not is_full else "float32"
    options, sharded = preference_rows.with_label_weights(config.train, rows), _is_sharded(config, ref, rows)
    if labels := preference_rows.label_facts(config.train, rows):
        say(preference_rows.told_labels(labels))
    if sharded:
        options = options.model_copy(update={"fused_layers": "never", "sharding": "full"})
    base = models.load_model(
        ref,
        dtype=stored,
        # A model in parts is divided layer by layer, so that no GPU ever holds it whole.
        device="cpu" if sharded else ranks.device(),
        quantization=config.model.quantization,
        compute=precision.dtype,
        trust_remote_code=config.model.trust_remote_code,
    )
    train_rows = partial(
        sft.train,
        tokenizer=tokenizer,
        rows=rows,
        options=options,
        compute=precision.dtype,
        seed=config.run.seed,
        folder=folder,
        evaluation=_evaluation(config, prepare, tokenizer),
        reporters=lambda done: (
            []
            if not ranks.leads()
            else reporters.make_callbacks(
                config.train.report_to,
                folder=folder,
                run_name=config.run.name,
                options=config.model_dump(mode="json", include={"model", "adapter", "train"}),
                done=done,
            )
        ),
    )
    if is_full:
        train_rows(full.prepare(base))
        full.save(base, tokenizer, ref.path, result)
        return
    model = adapter.attach(base, config.adapter)
    if config.adapter.init_lora_weights == "loftq":
        adapter.take_up_quantisation_error(model, ref.path)
    start = None
    if config.adapter.init_lora_weights != "default":
        start = folder / "checkpoints" / "start"
        adapter.save_start(model, start)
    pushes = _pushes(config, model, start, len(rows))
    train_rows(model, extra_callbacks=[pushes.callback()] if pushes else [])
    if ranks.leads():
        adapter.save(model, config.model.name, config.model.revision, result, start=start, base=ref.path)
    ranks.wait()
    if pushes:
        pushes.finish()


def _pushes(config: Config, model: PeftModel, start: Path | None, num_rows: int) -> EpochPushes | None:
    """Where the adapter goes behind each epoch; None where it is not asked for."""
    if not config.publish.each_epoch or not ranks.leads():
        return None
    base, _ = publication.base_of(config)  # a path of this machine means nothing on the hub
    name, revision = base.hub_id or base.name, config.model.revision
    return EpochPushes(
        config.publish,
        lambda folder: adapter.save(model, name, revision, folder, start=start),
        -(
            -num_rows
            // (config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps * ranks.count())
        ),
    )


def _is_sharded(config: Config, ref: models.ModelFolder, rows: Dataset) -> bool:
    """Whether the base is divided among the GPUs; whole copies are faster, so only where they do not fit."""
    import torch

    if ranks.count() == 1 or config.train.sharding == "none" or config.model.quantization == "nf4":
        return False
    if config.train.sharding == "full" or not torch.cuda.is_available():
        return config.train.sharding == "full"
    limit = ranks.least(planned.limit_bytes(config.train.max_memory_gib, planned.free_bytes()))
    return not planned.fits_whole(config, read_model_config(ref.path), max(map(len, rows["input_ids"])), limit)


def _evaluation(config: Config, prepare: Path, tokenizer: PreTrainedTokenizerBase) -> Evaluation | None:
    options = config.train
    if options.eval_steps is None:
        return None
    rows = _rows(prepare / "tokens" / "eval", "evaluate")
    if options.max_eval_samples is not None and options.max_eval_samples < len(rows):
        drawn = random.Random(config.run.seed).sample(range(len(rows)), options.max_eval_samples)  # noqa: S311
        rows = rows.select(sorted(drawn))
    if options.select_checkpoint != "best_accuracy":
        return Evaluation(rows)
    asked = set(rows["id"])
    questions = read_questions(prepare, asked)
    if len(questions) != len(asked):
        raise ArtifactError(
            f"{prepare}: {len(asked) - len(questions)} evaluation examples have no gold program",
            hint="run prepare again, or set train.select_checkpoint to best_loss",
        )
    prompts = [chat.render(tokenizer, question.messages) for question in questions]

    def accuracy(model: PeftModel | PreTrainedModel) -> float:
        engine = TransformersEngine(model, tokenizer, config.predict.batch_size)
        own, asked = ranks.share(questions), ranks.share(prompts)
        answers = engine.generate(asked, Decoding(max_new_tokens=options.eval_new_tokens)) if asked else ()
        num_right = sum(
            question.is_correct(completion.text) for question, completion in zip(own, in_order(answers), strict=True)
        )
        return ranks.total([num_right])[0] / len(questions)

    return Evaluation(rows, accuracy)


def _with_advice(config: Config, rows: Dataset, folder: Path) -> AbstractContextManager[None]:
    """Out of memory becomes one line with the overrides to add."""
    return advice_on_memory(lambda: advice.less_memory(config, _room(config, rows, folder)))


def _room(config: Config, rows: Dataset, folder: Path) -> advice.Room | None:
    import torch

    if not torch.cuda.is_available():
        return None
    model_folder = models.fetch_config(config.model.name, revision=config.model.revision)
    return advice.Room(
        model_config=read_model_config(model_folder),
        longest=max(map(len, rows["input_ids"])),
        limit_bytes=planned.limit_bytes(config.train.max_memory_gib, planned.free_bytes()),
        followed_plan="predicted_peak_gib" in planned.read(folder),
    )


def _precision(config: Config) -> models.Precision:
    if config.train.dtype == "auto":
        return models.detect_precision()
    return models.Precision(config.train.dtype, "train.dtype says so")


def _rows(folder: Path, what: str = "train") -> Dataset:
    from datasets import load_from_disk

    if not folder.is_dir():
        raise ArtifactError(f"{folder} is missing, so there is nothing to {what} on", hint="run prepare again")
    rows = load_from_disk(str(folder))
    if len(rows) == 0:
        raise ArtifactError(f"{folder} holds no example to {what} on", hint="look at prepare/report.json for the drops")
    return rows
