"""How the model is trained, and the regression check before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fintune.config.base import Options, advanced, neutral

BETA = 0.1


class TrainOptions(Options):
    """Fine-tuning on completions, or on preferences between them."""

    objective: Literal["sft", "dpo", "orpo", "kto"] = Field(
        "sft",
        description="`sft`: learn the completions. The others learn from preference rows (`data.source: chat`; "
        "docs/preference.md). `dpo` (arXiv 2305.18290) and `kto` (arXiv 2402.01306) compare the answers with those of "
        "the model before training. `orpo` (arXiv 2403.07691) needs no reference and learns the chosen answer as well. "
        "`kto` also accepts single answers with a label (prompt, completion, label: true or false). All three need a "
        "much lower `train.learning_rate`: 5e-6 to 5e-5.",
    )
    beta: float = Field(
        BETA,
        gt=0,
        description="Strength of the penalty for leaving the reference model (`dpo`, `kto`), or weight of the odds "
        "ratio (`orpo`). A higher value stays closer. All three papers use 0.1.",
    )
    rpo_alpha: float = advanced(
        0.0,
        "Weight of the chosen answer's own loss, added with `train.objective: dpo`. It keeps the chosen answer from "
        "becoming less probable together with the rejected one (arXiv 2404.19733 uses 1).",
        ge=0,
    )
    desirable_weight: float | None = advanced(
        None,
        "Weight of the answers labelled true, with `train.objective: kto`. Default: chosen so that the desirable "
        "answers together weigh as much as the undesirable ones, or up to a third more (arXiv 2402.01306, section 4).",
        gt=0,
    )
    undesirable_weight: float | None = advanced(
        None,
        "Weight of the answers labelled false, with `train.objective: kto`. If both weights are unset, the rarer label "
        "gets the higher weight.",
        gt=0,
    )
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the training examples.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many optimizer steps; overrides `train.num_train_epochs`."
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="Learning-rate schedule after the warm-up."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Number of steps with a rising learning rate; overrides `train.warmup_ratio`."
    )
    optim: Literal[
        "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adafactor", "sgd"
    ] = Field(
        "adamw_torch",
        description="Optimizer. The `8bit` ones store their moments in 8 bits (bitsandbytes, GPU and CPU; arXiv "
        "2110.02861). The `paged` ones move them to main memory if a CUDA GPU runs short. `adafactor` (arXiv "
        "1804.04235) stores only sums of rows and columns.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    adam_beta2: float = Field(
        0.999, gt=0, lt=1, description="Decay of AdamW's second moment. 0.99 suits runs of a few hundred steps."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    backend: Literal["builtin", "unsloth"] = Field(
        "builtin",
        description="What trains the adapter: this package, or Unsloth in its own process (a CUDA GPU; same data, "
        "masks, order and options).",
    )
    backend_python: Path | None = neutral(
        None,
        "Python interpreter of an environment with Unsloth and fintune (default: the running one).",
        advanced=True,
    )
    per_device_train_batch_size: int = Field(8, ge=1, description="Examples per forward pass on each GPU.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Arithmetic of the frozen weights. `auto` is bfloat16 if the processor multiplies it natively.",
    )
    gpus: int = Field(
        1,
        ge=1,
        description="GPUs of this machine, one process each. A step then trains on gpus x "
        "`train.per_device_train_batch_size` x `train.gradient_accumulation_steps` examples.",
    )
    machines: int = advanced(
        1,
        "Machines with `train.gpus` GPUs each, which share the files. The command prints what to run on the others.",
        ge=1,
    )
    sharding: Literal["auto", "none", "full"] = Field(
        "auto",
        description="With several GPUs: `none` gives every GPU the whole base model, `full` divides its frozen weights "
        "among them (FSDP2), `auto` divides them if the whole model does not fit one GPU.",
    )
    gradient_checkpointing: bool | None = neutral(
        None,
        "Recompute the activations of every layer in the backward pass: less memory, a third slower. Default: on a "
        "GPU, the fused layers recompute as few layers as fit, and transformers' layers recompute all if they might "
        "not fit; a CPU recomputes none.",
    )
    max_memory_gib: float | None = neutral(
        None,
        "GPU memory in GiB that training may allocate (default: all that is free). With the fused layers, the memory "
        "plan follows it (`fintune plan`).",
        advanced=True,
        gt=0,
    )
    fused_layers: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Run the decoder layers of Llama, Mistral, Qwen2 and Qwen3 with this package's forward and "
        "backward pass (same mathematics, faster). `auto`: on a CUDA GPU, if the model and its adapter allow it.",
    )
    save_steps: int = Field(
        100, ge=1, description="Steps between checkpoints. An interrupted run resumes from the last one."
    )
    save_total_limit: int = neutral(2, "Number of complete checkpoints to keep, the newest ones.", ge=1)
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between evaluations on the evaluation split. The last step is evaluated, too. Default: no "
        "evaluations.",
    )
    max_eval_samples: int | None = Field(
        None, ge=1, description="Evaluate on at most this many examples, drawn with `run.seed` (default: all)."
    )
    eval_new_tokens: int = advanced(
        96, "Maximum tokens of a completion when an evaluation measures execution accuracy.", ge=1
    )
    select_checkpoint: Literal["last", "best_loss", "best_accuracy"] = Field(
        "last",
        description="Which weights become the result: those of the last step, of the evaluation with the lowest loss, "
        "or of the evaluation with the highest execution accuracy (measured by greedy decoding at every evaluation).",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many consecutive evaluations without an improvement, by the measure of "
        "`train.select_checkpoint` (the loss for `last`). Default: never.",
    )
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = neutral(
        (),
        "Where losses go besides metrics.jsonl. `tensorboard` writes train/tensorboard. `wandb` sends them to Weights "
        "& Biases (WANDB_MODE=offline keeps them in train/wandb).",
    )
    logging_steps: int = neutral(
        1,
        "Steps between lines of metrics.jsonl. There is also a line after each checkpoint, after the last step and, "
        "with `train.early_stopping_patience`, after each evaluation.",
        ge=1,
    )
    threads: int | None = neutral(None, "CPU threads (default: all cores).", advanced=True, ge=1)

    @model_validator(mode="after")
    def _check_evaluations(self) -> TrainOptions:
        if self.eval_steps is None:
            asked = []
            if self.select_checkpoint != "last":
                asked.append(f"train.select_checkpoint: {self.select_checkpoint}")
            if self.early_stopping_patience is not None:
                asked.append("train.early_stopping_patience")
            if asked:
                raise ValueError(f"{' and '.join(asked)} needs evaluations; set train.eval_steps")
        return self


class GuardOptions(Options):
    """Forgetting check: a fixed set of finance questions and FinQA pages, answered before and after training."""

    enabled: bool | None = neutral(
        None, "Whether to run the check (default: only with `data.source: chat`, whose runs measure no accuracy)."
    )
    threshold: float = advanced(
        0.1,
        "A prompt got worse if the loss of its reference answer rose by more than this, in nats per token.",
        gt=0,
    )
    max_rise: float | None = advanced(
        None,
        "Fail if the mean loss of a group rose by more than this, in nats per token (default: report it only).",
        ge=0,
    )
