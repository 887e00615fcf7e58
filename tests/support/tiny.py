"""A real but tiny model for tests: random Llama weights and a tokenizer trained here, in Hugging Face form."""

from __future__ import annotations

import json
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD, BOS, EOS = SPECIAL_TOKENS

_CORPUS = (
    "You answer questions about a report page with a program.",
    "the company reported net revenue of $ 5829 million in 2019 compared with $ 5735 million in 2018 .",
    "what was the percentage change in operating income from 2018 to 2019?",
    "what is the average of total assets, net income, interest expense and cash for the years?",
    "subtract(5829, 5735), divide(#0, 5735) add(1, 2), multiply(#1, const_100) greater(#0, #1) exp(2, const_3)",
    "table_average(total assets, none) table_sum(net income, none) table_max(cash, none) table_min(cash, none)",
    "| year ended december 31 , | 2019 | 2018 |\n| net income | 12.5 % | -32 ( 32 ) |",
    # White space before numbers, where losing the digit splitting shows.
    "in thousands  2019  2018  2017  2016  2015",
)


def make_tokenizer(vocab_size: int = 400):
    """A byte-level BPE tokenizer with single digits and ChatML; `<|endoftext|>` pads, `<|im_end|>` ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def make_tiny_model(
    folder: Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    vocab_size: int = 400,
    tie_word_embeddings: bool = True,
    seed: int = 0,
) -> Path:
    """Saves a random Llama model and its tokenizer into `folder`, float32, the same for the same seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 2,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # What transformers 5 writes here, 4.57 would misread.
    patch_json(folder / "config.json", rope_theta=config.rope_parameters["rope_theta"])
    patch_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return folder


def patch_json(path: Path, **changes: object) -> None:
    """Sets keys of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not None or key not in changes}
    path.write_text(json.dumps(kept, indent=2), encoding="utf-8")
