"""Starts the Triton kernels on a CUDA GPU. Functions, shapes and meanings are those of ``kernels_torch``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fintune.training.fused import kernels_triton
from fintune.training.fused.kernels_torch import HeadTransform, MagnitudeSums

# Tokens that one program adds up. Few for small batches, so that there are enough programs for all processors.
_FEW_ROWS, _MANY_ROWS, _FEW_TOKENS = 32, 128, 8192
_STEP, _COLUMNS = 16, 128


def add_norm(
    residual: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``kernels_torch.add_norm``."""
    rows, columns = residual.shape
    inverse = torch.empty(rows, dtype=torch.float32, device=residual.device)
    total = residual if branch is None else torch.empty_like(residual)
    block = triton.next_power_of_2(columns)
    kernels_triton.add_norm_program[(rows,)](
        residual, branch, scale, weight, out, total, inverse, columns, out.stride(0), eps,
        HAS_BRANCH=branch is not None, HAS_SCALE=scale is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return total, inverse


def add(residual: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """See ``kernels_torch.add``."""
    rows, columns = residual.shape
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(columns)
    kernels_triton.add_program[(rows,)](
        residual, branch, scale, out, columns, HAS_SCALE=scale is not None, BLOCK=block, num_warps=_warps(block)
    )
    return out


def norm_backward(grad: Tensor, residual: Tensor, inverse: Tensor, weight: Tensor, passing: Tensor) -> Tensor:
    """See ``kernels_torch.norm_backward``."""
    rows, columns = residual.shape
    out = torch.empty_like(passing)
    block = triton.next_power_of_2(columns)
    kernels_triton.norm_backward_program[(rows,)](
        grad.contiguous(), residual, inverse, weight, passing.contiguous(), out, columns,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def split_heads(qkv: Tensor, transform: HeadTransform, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels_torch.split_heads``."""
    tokens, width = cos.shape
    counts = (transform.num_heads, transform.num_key_heads, transform.num_key_heads)
    outputs = [torch.empty(tokens, count, width, dtype=qkv.dtype, device=qkv.device) for count in counts]
    heads, blocks = _blocks(counts)
    kernels_triton.split_heads_program[(tokens, blocks)](
        qkv, transform.scale, transform.bias, transform.query_norm, transform.key_norm,
        cos.contiguous(), sin.contiguous(), *outputs,
        qkv.stride(0), transform.num_heads, transform.num_key_heads, transform.eps,
        HAS_SCALE=transform.scale is not None, HAS_BIAS=transform.bias is not None,
        HAS_NORM=transform.query_norm is not None,
        WIDTH=width, HALF=triton.next_power_of_2(width // 2), HEADS=heads, num_warps=4,
    )  # fmt: skip
    return outputs[0], outputs[1], outputs[2]


def _blocks(counts: tuple[int, int, int]) -> tuple[int, int]:
    """Return the heads of a program (as many as fit its registers), and the programs of a token."""
    heads = min(16, triton.next_power_of_2(min(counts)))
    return heads, sum(triton.cdiv(count, heads) for count in counts)


def join_heads(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor | None,
    transform: HeadTransform,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    sums: MagnitudeSums | None = None,
) -> None:
    """See ``kernels_torch.join_heads``."""
    tokens, width = cos.shape
    heads, blocks = _blocks((transform.num_heads, transform.num_key_heads, transform.num_key_heads))
    assert sums is None or qkv is not None, "the sums need what the magnitudes scaled"
    rows = 1 if sums is None else _rows_per_sum(tokens)
    qkv = out if qkv is None else qkv  # not read then, but a kernel cannot add to None
    kernels_triton.join_heads_program[(triton.cdiv(tokens, rows), blocks)](
        *(grad.contiguous() for grad in grads), qkv, transform.scale, transform.bias, sums and sums.values,
        transform.query_norm, transform.key_norm, cos.contiguous(), sin.contiguous(), out, sums and sums.blocks,
        tokens, qkv.stride(0), out.stride(0), 0 if sums is None else sums.blocks.stride(0),
        transform.num_heads, transform.num_key_heads, transform.eps,
        HAS_SCALE=transform.scale is not None, HAS_BIAS=transform.bias is not None,
        HAS_NORM=transform.query_norm is not None, HAS_SUMS=sums is not None,
        WIDTH=width, HALF=triton.next_power_of_2(width // 2), HEADS=heads, ROWS=rows, num_warps=4,
    )  # fmt: skip


def gate(both: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """See ``kernels_torch.gate``."""
    rows, columns = out.shape
    kernels_triton.gate_program[(rows, triton.cdiv(columns, 2048))](
        both, scale, out, columns, both.stride(0), out.stride(0),
        HAS_SCALE=scale is not None, BLOCK=2048, num_warps=8,
    )  # fmt: skip


def gate_backward(
    grad: Tensor, both: Tensor, scale: Tensor | None, out: Tensor, again: Tensor, sums: MagnitudeSums | None = None
) -> None:
    """See ``kernels_torch.gate_backward``."""
    rows, columns = grad.shape
    each, step, width = (1, 1, 2048) if sums is None else (_rows_per_sum(rows), _STEP, _COLUMNS)
    kernels_triton.gate_backward_program[(triton.cdiv(rows, each), triton.cdiv(columns, width))](
        grad, both, scale, sums and sums.values, out, again, sums and sums.blocks, rows, columns,
        grad.stride(0), both.stride(0), out.stride(0), again.stride(0), 0 if sums is None else sums.blocks.stride(0),
        HAS_SCALE=scale is not None, HAS_SUMS=sums is not None,
        ROWS=each, STEP=step, COLUMNS=width, num_warps=8 if sums is None else 4,
    )  # fmt: skip


def scale_grad(grad: Tensor, branch: Tensor, scale: Tensor, sums: MagnitudeSums) -> Tensor:
    """See ``kernels_torch.scale_grad``."""
    rows, columns = grad.shape
    own = torch.empty(rows, columns, dtype=grad.dtype, device=grad.device)
    kernels_triton.scale_grad_program[(num_sums(rows), triton.cdiv(columns, _COLUMNS))](
        grad, branch, scale, sums.values, own, sums.blocks, rows, columns,
        grad.stride(0), branch.stride(0), sums.blocks.stride(0),
        ROWS=_rows_per_sum(rows), STEP=_STEP, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return own


def num_sums(tokens: int) -> int:
    """See ``kernels_torch.num_sums``."""
    return -(-tokens // _rows_per_sum(tokens))


def _rows_per_sum(tokens: int) -> int:
    return _FEW_ROWS if tokens <= _FEW_TOKENS else _MANY_ROWS


def dora_scale(cross: Tensor, b: Tensor, gram: Tensor, squares: Tensor, magnitude: Tensor, factor: float) -> Tensor:
    """See ``kernels_torch.dora_scale``."""
    layers, rows, rank = b.shape
    out = torch.empty(layers, rows, dtype=torch.float32, device=b.device)
    kernels_triton.dora_scale_program[(triton.cdiv(rows, 16), layers)](
        cross, b, gram, squares, magnitude, out, rows, b.stride(0), b.stride(1), factor,
        ROWS=16, RANK=rank, BLOCK=triton.next_power_of_2(rank), num_warps=4,
    )  # fmt: skip
    return out


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """See ``kernels_torch.dropout``. The mask is a different one."""
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    kernels_triton.dropout_program[(rows, triton.cdiv(columns, 1024))](
        x, out, columns, x.stride(0), p, 1.0 / (1.0 - p), seed, BLOCK=1024, num_warps=4
    )
    return out


def unpack_nf4(
    packed: Tensor,
    codes: Tensor,
    steps: Tensor,
    outer: tuple[Tensor, Tensor, Tensor] | None,
    block_size: int,
    outer_size: int,
    out: Tensor,
) -> None:
    """Write 4-bit numbers of bitsandbytes row by row into a matrix, which may have its own row stride.

    Args:
        packed: Two numbers in a byte, uint8 [numbers / 2].
        codes: The 16 values, float32.
        steps: Factor of each block: float32, or uint8 if the factors are quantized as well.
        outer: For quantized factors: their 256 values, the factors of their blocks, their offset; all float32.
        block_size: Numbers that share a factor.
        outer_size: Factors that share an outer factor.
        out: [rows, columns]. A row holds whole blocks.
    """
    rows, columns = out.shape
    assert columns % block_size == 0, "a block of factors must not cross a row's end"
    blocks = columns // block_size
    outer_codes, outer_steps, offset = outer or (None, None, None)
    kernels_triton.unpack_program[(rows, triton.cdiv(blocks, 32))](
        packed, codes, steps, outer_codes, outer_steps, offset, out, blocks, out.stride(0),
        NESTED=outer is not None, BLOCK_SIZE=block_size, OUTER_SIZE=outer_size, BLOCKS=32, num_warps=4,
    )  # fmt: skip


def cross_entropy(logits: Tensor, targets: Tensor, grad_factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels_torch.cross_entropy``."""
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    hits = torch.empty(rows, dtype=torch.bool, device=logits.device)
    kernels_triton.cross_entropy_program[(rows,)](
        logits, targets, grad_factor, losses, hits, columns, logits.stride(0),
        HAS_FACTOR=grad_factor is not None, BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return losses, hits


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
