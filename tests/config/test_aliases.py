"""--extra_train_args: every name has the meaning that it has elsewhere, or is refused with the reason."""

from __future__ import annotations

import dataclasses

import pytest

from fintune.config import aliases as cli_extra_args
from fintune.config.aliases import ELSEWHERE, FIXED, OPTIMIZERS, RENAMED, overrides
from fintune.config.load import load
from fintune.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("train.weight_decay=0.01", ["train.weight_decay=0.01"]),
        ("--weight_decay 0.01", ["train.weight_decay=0.01"]),
        ("--weight-decay=0.01", ["train.weight_decay=0.01"]),
        ("--gradient_checkpointing", ["train.gradient_checkpointing=true"]),
        ("--use_gradient_checkpointing unsloth", ["train.gradient_checkpointing=true"]),
        ("--optim adamw_torch", ["train.optim=adamw_torch"]),
        ("--optim adamw_bnb_8bit", ["train.optim=adamw_8bit"]),
        ("--lr_scheduler_type constant_with_warmup", ["train.lr_scheduler_type=constant_with_warmup"]),
        ("--bf16", ["train.dtype=bfloat16"]),
        ("--bf16 False --fp16 True", ["train.dtype=float16"]),
        ("--bf16 False", ["train.dtype=float32"]),
        ("--report_to none", ["train.report_to=[]"]),
        ("--report_to all", ["train.report_to=[tensorboard, wandb]"]),
        ("--target_modules \"['q_proj', 'v_proj']\"", ["adapter.target_modules=[q_proj, v_proj]"]),
        ("--use_dora true --load_in_4bit false", ["adapter.kind=dora", "model.quantization=none"]),
        ("--eval_strategy steps --eval_steps 5", ["train.eval_steps=5"]),
        ("--eval_strategy no --eval_steps 5", ["train.eval_steps=5", "train.eval_steps="]),
        ("--load_best_model_at_end", ["train.select_checkpoint=best_loss"]),
        ("--save_strategy steps --save_total_limit 3 --packing False", ["train.save_total_limit=3"]),
        ("train.max_steps=3 --max_steps 9", ["train.max_steps=9", "train.max_steps=3"]),
    ],
)
def test_names_of_other_libraries_become_options(text, expected):
    assert overrides(text) == expected


def test_every_translation_is_an_option_with_an_allowed_value():
    samples = {"adapter.use_rslora": "true", "train.gradient_checkpointing": "true"}
    samples |= dict.fromkeys(
        ("train.learning_rate", "train.adam_beta2", "adapter.lora_dropout", "train.warmup_ratio"), "0.1"
    )
    samples |= {"prompt.max_length": "512"}
    for option in RENAMED.values():
        load(None, [f"{option}={samples.get(option, '1')}"])
    for optimizer in OPTIMIZERS.values():
        load(None, [f"train.optim={optimizer}"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("--lerning_rate 1", "unknown --lerning_rate: did you mean --learning_rate?"),
        ("--lr 3", "unknown --lr: did you mean train.learning_rate=3?"),
        ("--lora-rank=8", "unknown --lora_rank: did you mean adapter.r=8?"),
        ("--dataset 'my rows.csv'", "unknown --dataset: did you mean 'data.sources=my rows.csv'?"),
        ("--rank --bf16", "unknown --rank: did you mean adapter.r=VALUE?"),
        ("--qqq 1", "unknown --qqq: known are adam_beta1"),
        ("oops", "'oops' stands alone: write key=value"),
        ("'open", "No closing quotation"),
        ("--optim adam_mini", "--optim adam_mini is not known here: known are adamw"),
        ("--packing true", "--packing true cannot be set: rows are never packed"),
        ("--push_to_hub", "--push_to_hub is not set here: `fintune publish`"),
        ("--eval_strategy steps", "needs --eval_steps"),
        ("--eval_strategy epoch", "known are no, steps"),
        ("--bf16 maybe", "--bf16 maybe is not known here"),
        ("--report_to mlflow", "known are none, all"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_the_reason(text, told):
    with pytest.raises(ConfigError) as caught:
        overrides(text)
    assert told in str(caught.value)


def test_what_is_fixed_here_is_called_so_elsewhere():
    trl = pytest.importorskip("trl")
    names = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    older = {"group_by_length", "bias"}  # of transformers 4, of PEFT
    assert set(FIXED) - older <= names
    assert set(ELSEWHERE) <= names
    assert not (set(FIXED) | set(ELSEWHERE)) & (set(RENAMED) | set(cli_extra_args._CONVERTED))
