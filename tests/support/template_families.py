"""Tokenizers with the chat templates of the model families that people train."""

from __future__ import annotations

import itertools
from pathlib import Path

from support.tiny import make_tokenizer

_OWN = Path(__file__).parent / "templates"
_ENDS = {
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "gemma3": "<end_of_turn>",
    "gptoss": "<|return|>",
    "mistral": "</s>",
}
_MARKS = [
    *(
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<start_of_turn>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
    ),
    *("<|channel|>", "<|call|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "<|im_sep|>", "<｜User｜>"),
    "<｜Assistant｜>",
]
FAMILIES = (
    *("qwen2_5", "qwen3", "qwen3_5_think", "qwen3_5_nothink", "llama3", "llama3_1", "llama3_2", "deepseek_r1_distill"),
    *("gemma3", "gptoss", "mistral", "phi4", "smollm3"),
)
"""TRL ships the templates of most; the others are test data after their form."""


def family_tokenizer(family: str):
    """A tiny tokenizer with a family's template and the special tokens that the template writes."""
    import trl

    path = Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja"
    template = (path if path.is_file() else _OWN / f"{family}.jinja").read_text(encoding="utf-8")
    tokenizer = make_tokenizer()
    end = _ENDS.get(family)
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [mark for mark in _MARKS if mark in template],
            **({"eos_token": end, "bos_token": "<s>"} if end else {}),
        }
    )
    tokenizer.chat_template = template
    return tokenizer


def trained_texts(tokenizer, row) -> list[str]:
    """The runs of trained tokens of a row, as text."""
    pairs = zip(row.completion_mask, row.input_ids, strict=True)
    runs = itertools.groupby(pairs, key=lambda pair: pair[0])
    return [tokenizer.decode([token for _, token in run]) for is_trained, run in runs if is_trained]
