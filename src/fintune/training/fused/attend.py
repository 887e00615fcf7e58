"""Causal attention over a batch of sequences that lie behind each other, without padding and without a mask."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fintune.training.cpu_layers import cpu_attention

# cuDNN's kernel is 1.8 times as fast as FlashAttention-2 on an H100 (4,096 tokens, 40 heads).
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_FLASH_TYPES = (torch.bfloat16, torch.float16)
"""What FlashAttention multiplies, and with it the kernel for sequences of different lengths."""


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a batch begin and end.

    Attributes:
        lengths: Tokens of each.
        offsets: Their borders on the device, int32 [sequences + 1].
    """

    lengths: tuple[int, ...]
    offsets: Tensor

    @property
    def even(self) -> bool:
        """Whether all have one length."""
        return len(set(self.lengths)) == 1


def attend(queries: Tensor, keys: Tensor, values: Tensor, sequences: Sequences, scaling: float) -> Tensor:
    """Each token attends to those before it in its sequence.

    Args:
        queries: [tokens, heads, width].
        keys: [tokens, key heads, width].
        values: As keys.
        sequences: Borders of the sequences.
        scaling: Factor of the scores.

    Returns:
        [tokens, heads * width].
    """
    if sequences.even:
        count, length = len(sequences.lengths), sequences.lengths[0]
        q, k, v = (each.view(count, length, *each.shape[1:]).transpose(1, 2) for each in (queries, keys, values))
        return _even(q, k, v, scaling).transpose(1, 2).reshape(len(queries), -1)
    if queries.is_cuda and queries.dtype in _FLASH_TYPES:
        from torch.nn.attention.varlen import varlen_attn

        longest, borders = max(sequences.lengths), sequences.offsets
        # torch 2.11 groups the heads by itself and knows no such argument; later versions want to be told.
        grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
        mixed = varlen_attn(
            queries, keys, values, borders, borders, longest, longest, scale=scaling, window_size=(-1, 0), **grouped
        )
        return mixed.flatten(1)
    parts = zip(*(each.split(sequences.lengths) for each in (queries, keys, values)), strict=True)
    mixed_parts = []
    for part in parts:
        q, k, v = (each[None].transpose(1, 2) for each in part)
        mixed_parts.append(_even(q, k, v, scaling).transpose(1, 2)[0])
    return torch.cat(mixed_parts).flatten(1)


def _even(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    if not queries.is_cuda and queries.dtype == torch.bfloat16:
        return cpu_attention(queries, keys, values, scaling)
    grouped = keys.shape[1] != queries.shape[1]
    if not queries.is_cuda:
        return torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    if grouped and queries.dtype not in _FLASH_TYPES:
        # The one kernel that takes float32 and holds no scores wants keys for every head.
        keys, values = (each.repeat_interleave(queries.shape[1] // each.shape[1], dim=1) for each in (keys, values))
        grouped = False
    with sdpa_kernel(_BACKENDS, set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scaling, enable_gqa=grouped
        )
