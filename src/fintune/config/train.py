"""How the model is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fintune.config.base import Options, neutral
from fintune.config.preference import BETA


class TrainOptions(Options):
    """Fine-tuning on completions, or on preferences between them."""

    objective: Literal["sft", "dpo", "orpo", "kto"] = Field(
        "sft",
        description="`sft`: the completion is learned. On preference rows (`data.source: chat`; docs/preference.md) "
        "`dpo` (arXiv 2305.18290) and `kto` (arXiv 2402.01306) learn to tell chosen from rejected answers, measured "
        "against the model before training; `orpo` (arXiv 2403.07691) learns the chosen answer at the same time and "
        "needs no reference. `kto` also learns from answers that stand alone with a label (prompt, completion, label: "
        "true or false). They want a far lower `train.learning_rate`: 5e-6 to 5e-5.",
    )
    beta: float = Field(
        BETA,
        gt=0,
        description="Of a preference `train.objective`: how dearly `dpo` and `kto` pay for leaving the reference "
        "(higher stays closer), and the weight of `orpo`'s odds ratio; 0.1 in all three papers.",
    )
    rpo_alpha: float = Field(
        0.0,
        ge=0,
        description="Of `train.objective: dpo`: adds so much of the chosen answers' own loss, which keeps their "
        "probability from falling with that of the rejected ones (arXiv 2404.19733 takes 1).",
    )
    desirable_weight: float | None = Field(
        None,
        gt=0,
        description="Of `train.objective: kto`: weight of the answers labelled true. Where empty it is chosen so that "
        "the desired answers together weigh as much as the undesired ones, or up to a third more (arXiv 2402.01306, "
        "section 4).",
    )
    undesirable_weight: float | None = Field(
        None, gt=0, description="Likewise of the answers labelled false; where both are empty, the fewer weigh more."
    )
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the training examples.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after so many optimiser steps; overrides `train.num_train_epochs`."
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="Learning-rate schedule after warm-up."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    warmup_steps: int | None = Field(
        None, ge=0, description="So many steps with a rising learning rate; overrides `train.warmup_ratio`."
    )
    optim: Literal[
        "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adafactor", "sgd"
    ] = Field(
        "adamw_torch",
        description="`8bit` ones keep their moments in 8 bits (bitsandbytes, GPU and CPU; arXiv 2110.02861), `paged` "
        "ones move them to main memory when a CUDA GPU runs short, `adafactor` (arXiv 1804.04235) keeps sums of rows "
        "and columns only.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the optimiser.")
    adam_beta2: float = Field(
        0.999, gt=0, lt=1, description="AdamW's memory of squared gradients; 0.99 suits runs of a few hundred steps."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    backend: Literal["builtin", "unsloth"] = Field(
        "builtin",
        description="What trains the adapter: this package, or Unsloth in a process of its own (a CUDA GPU; same data, "
        "masks, order and options).",
    )
    backend_python: Path | None = neutral(
        None, "Python of an environment that holds Unsloth and fintune; this one's where empty."
    )
    per_device_train_batch_size: int = Field(8, ge=1, description="Examples a forward pass and GPU.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes an optimiser step.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Arithmetic of the frozen weights; `auto` is bfloat16 where the processor multiplies it natively.",
    )
    gpus: int = Field(
        1,
        ge=1,
        description="GPUs of this machine, a process each; a step then trains on so many times "
        "`train.per_device_train_batch_size` x `train.gradient_accumulation_steps` examples.",
    )
    machines: int = Field(
        1,
        ge=1,
        description="Machines with `train.gpus` GPUs each, which see the same files; the command prints what to run on "
        "the others.",
    )
    sharding: Literal["auto", "none", "full"] = Field(
        "auto",
        description="With several GPUs: `none` gives each the whole base model, `full` divides its frozen weights "
        "among them (FSDP2), `auto` divides where the whole does not fit one.",
    )
    gradient_checkpointing: bool | None = neutral(
        None,
        "Recompute the activations of every layer in the backward pass: less memory, a third slower. Where empty, the "
        "fused layers recompute as many as the GPU's memory demands, and transformers' layers all where theirs are not "
        "sure to fit; nothing is recomputed on a CPU.",
    )
    max_memory_gib: float | None = neutral(
        None,
        "Memory that training may allocate on the GPU, in GiB; all that is free where empty. With the "
        "fused layers the planner chooses recomputed layers and passes by it (`fintune plan`).",
        gt=0,
    )
    fused_layers: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Run the decoder layers of Llama, Mistral, Qwen2 and Qwen3 through this package's forward and "
        "backward pass (same mathematics, faster); `auto`: on a CUDA GPU, where the model and its adapter allow it.",
    )
    save_steps: int = Field(100, ge=1, description="Steps between checkpoints, from which an interrupted run resumes.")
    save_total_limit: int = neutral(2, "Complete checkpoints that are kept, the newest.", ge=1)
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between evaluations on the evaluation split, one more behind the last; none where empty.",
    )
    max_eval_samples: int | None = Field(
        None, ge=1, description="Evaluate on at most so many examples, drawn with `run.seed`; all where empty."
    )
    eval_new_tokens: int = Field(
        96, ge=1, description="Tokens of a completion at most, where an evaluation measures execution accuracy."
    )
    select_checkpoint: Literal["last", "best_loss", "best_accuracy"] = Field(
        "last",
        description="Which weights become the result: those of the last step, of the evaluation with the lowest loss, "
        "or of that with the highest execution accuracy, which each evaluation then measures by greedy decoding.",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Stop after so many evaluations in a row without a better one, by what "
        "`train.select_checkpoint` goes by (the loss for `last`); never where empty.",
    )
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = neutral(
        (),
        "Where losses go besides metrics.jsonl: `tensorboard` writes train/tensorboard, `wandb` sends them to Weights "
        "& Biases (WANDB_MODE=offline keeps them in train/wandb).",
    )
    logging_steps: int = neutral(
        1,
        "Steps between lines of metrics.jsonl; a line more behind each checkpoint, the last step and, with "
        "`train.early_stopping_patience`, each evaluation.",
        ge=1,
    )
    threads: int | None = neutral(None, "CPU threads; all cores where empty.", ge=1)

    @model_validator(mode="after")
    def _choices_need_evaluations(self) -> TrainOptions:
        if self.eval_steps is None:
            asked = [f"train.select_checkpoint: {self.select_checkpoint}"] if self.select_checkpoint != "last" else []
            asked += ["train.early_stopping_patience"] if self.early_stopping_patience is not None else []
            if asked:
                raise ValueError(f"{' and '.join(asked)} needs evaluations; set train.eval_steps")
        return self
