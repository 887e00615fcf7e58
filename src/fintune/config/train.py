"""The base model, what of it is trained and how, and the regression check before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from fintune.config.base import Options, advanced, neutral

BETA = 0.1
ADAM_BETA2 = 0.999


class ModelOptions(Options):
    """The base model."""

    name: str = "builtin:smollm2-135m"
    """`builtin:smollm2-135m`, a local Hugging Face folder, or a hub id such as `Qwen/Qwen3-1.7B`. The built-in model
    was unpacked from 4-bit weights."""
    revision: str | None = None
    """Branch, tag or commit of a hub model (default: the newest)."""
    quantization: Literal["none", "nf4"] = "none"
    """How training stores the frozen base weights. `nf4` (4-bit NormalFloat with double quantization, arXiv 2305.14314)
    turns LoRA into QLoRA and DoRA into QDoRA. Merge, export and prediction use the original weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Enable it only if you trust its author."""


class AdapterOptions(Options):
    """What is trained: a low-rank adapter (LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353), or every weight."""

    kind: Literal["lora", "dora", "full"] = "lora"
    """`lora`; `dora` (LoRA with a trained magnitude); or `full`: no adapter, all weights are trained. With `full` the
    other options of this section are ignored, and `train.learning_rate` should be near 1e-5."""
    r: int = Field(16, ge=1)
    """Rank."""
    lora_alpha: int = Field(32, ge=1)
    """Scale: the update is multiplied by lora_alpha / r."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(r) instead, which keeps high ranks learning (arXiv 2312.03732)."""
    init_lora_weights: Literal["default", "pissa", "loftq"] = advanced("default")
    """How the adapter is initialized. `default`: the first step changes nothing. `pissa`: the largest singular
    directions of the 16-bit weights (arXiv 2404.02948). `loftq`: the quantization error of the 4-bit weights (arXiv
    2310.08659). Both are saved as a plain adapter of twice the rank for the unchanged base."""
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability of the adapter's input."""
    continue_from: Path | None = None
    """Folder of an adapter (PEFT format) to train further, on the base that it was trained on. It keeps its layers, and
    `kind`, `r`, `lora_alpha` and `use_rslora` have to be its own. `lora_dropout` may differ."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get an adapter. `all-linear`: every linear layer but the output head."""


class TrainOptions(Options):
    """Fine-tuning on completions, or on preferences between them."""

    objective: Literal["sft", "dpo", "orpo", "kto"] = "sft"
    """`sft`: learn the completions. The others learn from preference rows (`data.source: chat`; docs/preference.md).
    `dpo` (arXiv 2305.18290) and `kto` (arXiv 2402.01306) compare the answers with those of the model before training.
    `orpo` (arXiv 2403.07691) needs no reference and learns the chosen answer as well. `kto` also accepts single answers
    with a label (prompt, completion, label: true or false). All three need a much lower `train.learning_rate`: 5e-6 to
    5e-5."""
    beta: float = Field(BETA, gt=0)
    """Strength of the penalty for leaving the reference model (`dpo`, `kto`), or weight of the odds ratio (`orpo`). A
    higher value stays closer. All three papers use 0.1."""
    rpo_alpha: float = advanced(0.0, ge=0)
    """Weight of the chosen answer's own loss, added with `train.objective: dpo`. It keeps the chosen answer from
    becoming less probable together with the rejected one (arXiv 2404.19733 uses 1)."""
    desirable_weight: float | None = advanced(None, gt=0)
    """Weight of the answers labelled true, with `train.objective: kto`. Default: chosen so that the desirable answers
    together weigh as much as the undesirable ones, or up to a third more (arXiv 2402.01306, section 4)."""
    undesirable_weight: float | None = advanced(None, gt=0)
    """Weight of the answers labelled false, with `train.objective: kto`. If both weights are unset, the rarer label
    gets the higher weight."""
    num_train_epochs: float = Field(3.0, gt=0)
    """Passes over the training examples."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps; overrides `train.num_train_epochs`."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps with a rising learning rate."""
    warmup_steps: int | None = Field(None, ge=0)
    """Number of steps with a rising learning rate; overrides `train.warmup_ratio`."""
    optim: Literal[
        "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adafactor", "sgd"
    ] = "adamw_torch"
    """Optimizer. The `8bit` ones store their moments in 8 bits (bitsandbytes, GPU and CPU; arXiv 2110.02861). The
    `paged` ones move them to main memory if a CUDA GPU runs short. `adafactor` (arXiv 1804.04235) stores only sums of
    rows and columns."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay: a step also takes this share times the learning rate off each weight, with every optimizer."""
    adam_beta2: float = Field(ADAM_BETA2, gt=0, lt=1)
    """Decay of AdamW's second moment. 0.99 suits runs of a few hundred steps. Other optimizers do not read it."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    backend: Literal["builtin", "unsloth"] = "builtin"
    """What trains the adapter: this package, or Unsloth in its own process (a CUDA GPU; same data, masks, order and
    options)."""
    backend_python: Path | None = neutral(None, advanced=True)
    """Python interpreter of an environment with Unsloth and fintune (default: the running one)."""
    per_device_train_batch_size: int = Field(8, ge=1)
    """Examples per forward pass on each GPU."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Forward passes per optimizer step."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Arithmetic of the frozen weights. `auto` is bfloat16 if the processor multiplies it natively."""
    gpus: int = Field(1, ge=1)
    """GPUs of this machine, one process each. A step then trains on gpus x `train.per_device_train_batch_size` x
    `train.gradient_accumulation_steps` examples."""
    machines: int = advanced(1, ge=1)
    """Machines with `train.gpus` GPUs each, which share the files. The command prints what to run on the others."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """With several GPUs: `none` gives every GPU the whole base model, `full` divides its frozen weights among them
    (FSDP2), `auto` divides them if the whole model does not fit one GPU."""
    gradient_checkpointing: bool | None = neutral(None)
    """Recompute the activations of every layer in the backward pass: less memory, a third slower. Default: on a GPU,
    the fused layers recompute as few layers as fit, and transformers' layers recompute all if they might not fit; a CPU
    recomputes none."""
    max_memory_gib: float | None = neutral(None, advanced=True, gt=0)
    """GPU memory in GiB that training may allocate (default: all that is free). With the fused layers, the memory plan
    follows it (`fintune plan`)."""
    fused_layers: Literal["auto", "always", "never"] = "auto"
    """Run the decoder layers of Llama, Mistral, Qwen2 and Qwen3 with this package's forward and backward pass (same
    mathematics, faster). `auto`: on a CUDA GPU, if the model and its adapter allow it."""
    save_strategy: Literal["steps", "epoch"] = "steps"
    """`steps`: write a checkpoint every `train.save_steps`. `epoch`: after the step that completes each pass over the
    training examples. An interrupted run resumes from the last checkpoint."""
    save_steps: int = Field(100, ge=1)
    """Steps between checkpoints."""
    save_total_limit: int = neutral(2, ge=1)
    """Number of complete checkpoints to keep, the newest ones."""
    eval_strategy: Literal["steps", "epoch"] = "steps"
    """`steps`: evaluate every `train.eval_steps`. `epoch`: after the step that completes each pass over the training
    examples; metrics.jsonl has the number of the pass."""
    eval_steps: int | None = Field(None, ge=1)
    """Steps between evaluations on the evaluation split. The last step is evaluated, too. Default: no evaluations."""
    max_eval_samples: int | None = Field(None, ge=1)
    """Evaluate on at most this many examples, drawn with `run.seed` (default: all)."""
    eval_new_tokens: int = advanced(96, ge=1)
    """Maximum tokens of a completion when an evaluation measures execution accuracy."""
    select_checkpoint: Literal["last", "best_loss", "best_accuracy"] = "last"
    """Which weights become the result: those of the last step, of the evaluation with the lowest loss, or of the
    evaluation with the highest execution accuracy (measured by greedy decoding at every evaluation)."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many consecutive evaluations without an improvement, by the measure of `train.select_checkpoint`
    (the loss for `last`). Default: never."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = neutral(())
    """Where losses go besides metrics.jsonl. `tensorboard` writes train/tensorboard. `wandb` sends them to Weights &
    Biases (WANDB_MODE=offline keeps them in train/wandb)."""
    logging_steps: int = neutral(1, ge=1)
    """Steps between lines of metrics.jsonl. There is also a line after each checkpoint, after the last step and, with
    `train.early_stopping_patience`, after each evaluation."""
    threads: int | None = neutral(None, advanced=True, ge=1)
    """CPU threads (default: all cores)."""

    @property
    def has_evaluations(self) -> bool:
        """Whether the evaluation split is evaluated during training."""
        return self.eval_steps is not None or self.eval_strategy == "epoch"


class GuardOptions(Options):
    """Forgetting check: a fixed set of finance questions and FinQA pages, answered before and after training."""

    enabled: bool | None = neutral(None)
    """Whether to run the check (default: only with `data.source: chat`, whose runs measure no accuracy)."""
    threshold: float = advanced(0.1, gt=0)
    """A prompt got worse if the loss of its reference answer rose by more than this, in nats per token."""
    max_rise: float | None = advanced(None, ge=0)
    """Fail if the mean loss of a group rose by more than this, in nats per token (default: report it only)."""
