"""Tiny random models of many families, with the tests' tokenizer, and their losses in plain torch."""

from __future__ import annotations

from pathlib import Path

from support.tiny import make_tokenizer

DENSE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **NO_DROPOUT},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "gemma2": {**DENSE, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {**DENSE, "logit_scale": 0.25},
    "granite": {**DENSE, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "recurrent_gemma": {
        **DENSE, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "logits_soft_cap": 2.0,
    },
    "mamba2": {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "falcon_h1": {
        **DENSE, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
        "lm_head_multiplier": 0.5,
    },
    "mixtral": {**DENSE, "num_local_experts": 4, "router_aux_loss_coef": 0.5, "output_router_logits": True},
    "qwen3_moe": {
        **DENSE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.5,
        "output_router_logits": True,
    },
    "gpt_oss": {**DENSE, "num_local_experts": 4, "router_aux_loss_coef": 0.5, "output_router_logits": True},
}  # fmt: skip


def make_family(folder: Path, family: str) -> Path:
    """Saves a random model of a family with large logits, float32, the same at every call."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **FAMILIES[family], **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings().weight
        head.data.normal_(0, 0.3)  # a soft cap of 2 then changes the loss by far more than rounding
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def padded(rows, pad: int):
    """Rows of equal width as tensors: ids, attention mask, labels."""
    import torch

    width = -(-max(len(row["input_ids"]) for row in rows) // 32) * 32
    ids, mask, labels = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=int), None
    labels = torch.full((len(rows), width), -100)
    for at, row in enumerate(rows):
        tokens, trained = torch.tensor(row["input_ids"]), torch.tensor(row["completion_mask"]).bool()
        ids[at, : len(tokens)], mask[at, : len(tokens)] = tokens, 1
        labels[at, : len(tokens)][trained] = tokens[trained]
    return ids, mask, labels


def completion_loss(model, rows, pad: int):
    """The mean loss of all trained tokens by the model's own logits, and its own router loss of the batch if any."""
    import torch

    ids, mask, labels = padded(rows, pad)
    routed = getattr(model.config, "output_router_logits", False)
    out = model(input_ids=ids, attention_mask=mask, **({"output_router_logits": True} if routed else {}))
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return loss, out.aux_loss if routed else None
