"""The elementwise passes on a CUDA GPU; functions, shapes and meanings are those of ``plain_kernels``.

Sums over tokens, which DoRA's magnitudes need, are taken in blocks of tokens and added up by torch, so that results
repeat.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fintune.training.fused import triton_dora
from fintune.training.fused import triton_programs as programs
from fintune.training.fused.plain_kernels import HeadParts, Magnitudes

# Tokens that one program adds up: few while there are few, so that there are programs enough for all processors.
_FEW_ROWS, _MANY_ROWS, _FEW_TOKENS = 32, 128, 8192
_STEP, _COLUMNS = 16, 128


def add_norm(
    residual: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``plain_kernels.add_norm``."""
    rows, columns = residual.shape
    inverse = torch.empty(rows, dtype=torch.float32, device=residual.device)
    total = residual if branch is None else torch.empty_like(residual)
    block = triton.next_power_of_2(columns)
    programs.add_norm_program[(rows,)](
        residual, branch, scale, weight, out, total, inverse, columns, out.stride(0), eps,
        HAS_BRANCH=branch is not None, HAS_SCALE=scale is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return total, inverse


def add(residual: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """See ``plain_kernels.add``."""
    rows, columns = residual.shape
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(columns)
    programs.add_program[(rows,)](
        residual, branch, scale, out, columns, HAS_SCALE=scale is not None, BLOCK=block, num_warps=_warps(block)
    )
    return out


def norm_backward(grad: Tensor, residual: Tensor, inverse: Tensor, weight: Tensor, passing: Tensor) -> Tensor:
    """See ``plain_kernels.norm_backward``."""
    rows, columns = residual.shape
    out = torch.empty_like(passing)
    block = triton.next_power_of_2(columns)
    programs.norm_backward_program[(rows,)](
        grad.contiguous(), residual, inverse, weight, passing.contiguous(), out, columns,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def split_heads(qkv: Tensor, parts: HeadParts, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``plain_kernels.split_heads``."""
    tokens, width = cos.shape
    counts = (parts.num_heads, parts.num_key_heads, parts.num_key_heads)
    made = [torch.empty(tokens, count, width, dtype=qkv.dtype, device=qkv.device) for count in counts]
    heads, blocks = _blocks(counts)
    programs.split_heads_program[(tokens, blocks)](
        qkv, parts.scale, parts.bias, parts.query_norm, parts.key_norm, cos.contiguous(), sin.contiguous(), *made,
        qkv.stride(0), parts.num_heads, parts.num_key_heads, parts.eps,
        HAS_SCALE=parts.scale is not None, HAS_BIAS=parts.bias is not None, HAS_NORM=parts.query_norm is not None,
        WIDTH=width, HALF=triton.next_power_of_2(width // 2), HEADS=heads, num_warps=4,
    )  # fmt: skip
    return made[0], made[1], made[2]


def _blocks(counts: tuple[int, int, int]) -> tuple[int, int]:
    """Heads a program (no more than a tile of registers takes), and programs a token."""
    heads = min(16, triton.next_power_of_2(min(counts)))
    return heads, sum(triton.cdiv(count, heads) for count in counts)


def join_heads(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor | None,
    parts: HeadParts,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    magnitudes: Magnitudes | None = None,
) -> None:
    """See ``plain_kernels.join_heads``."""
    tokens, width = cos.shape
    heads, blocks = _blocks((parts.num_heads, parts.num_key_heads, parts.num_key_heads))
    if magnitudes is not None:
        assert qkv is not None, "magnitudes need what they scaled"
        triton_dora.join_heads_dora_program[(num_sums(tokens), blocks)](
            *(grad.contiguous() for grad in grads), qkv, parts.scale, parts.bias, magnitudes.values,
            parts.query_norm, parts.key_norm, cos.contiguous(), sin.contiguous(), out, magnitudes.sums,
            tokens, qkv.stride(0), out.stride(0), magnitudes.sums.stride(0),
            parts.num_heads, parts.num_key_heads, parts.eps,
            HAS_BIAS=parts.bias is not None, HAS_NORM=parts.query_norm is not None, WIDTH=width,
            HALF=triton.next_power_of_2(width // 2), HEADS=heads, ROWS=_rows_per_sum(tokens), num_warps=4,
        )  # fmt: skip
        return
    programs.join_heads_program[(tokens, blocks)](
        *(grad.contiguous() for grad in grads), qkv, parts.scale, parts.bias, parts.query_norm, parts.key_norm,
        cos.contiguous(), sin.contiguous(), out, 0 if qkv is None else qkv.stride(0), out.stride(0),
        parts.num_heads, parts.num_key_heads, parts.eps,
        HAS_SCALE=parts.scale is not None, HAS_BIAS=parts.bias is not None, HAS_NORM=parts.query_norm is not None,
        WIDTH=width, HALF=triton.next_power_of_2(width // 2), HEADS=heads, num_warps=4,
    )  # fmt: skip


def gate(both: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """See ``plain_kernels.gate``."""
    rows, columns = out.shape
    programs.gate_program[(rows, triton.cdiv(columns, 2048))](
        both, scale, out, columns, both.stride(0), out.stride(0),
        HAS_SCALE=scale is not None, BLOCK=2048, num_warps=8,
    )  # fmt: skip


def gate_backward(
    grad: Tensor,
    both: Tensor,
    scale: Tensor | None,
    out: Tensor,
    again: Tensor,
    magnitudes: Magnitudes | None = None,
) -> None:
    """See ``plain_kernels.gate_backward``."""
    rows, columns = grad.shape
    if magnitudes is not None:
        triton_dora.gate_backward_dora_program[(num_sums(rows), triton.cdiv(columns, _COLUMNS))](
            grad, both, scale, magnitudes.values, out, again, magnitudes.sums, rows, columns,
            grad.stride(0), both.stride(0), out.stride(0), again.stride(0), magnitudes.sums.stride(0),
            ROWS=_rows_per_sum(rows), STEP=_STEP, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
        return
    programs.gate_backward_program[(rows, triton.cdiv(columns, 2048))](
        grad, both, scale, out, again, columns, grad.stride(0), both.stride(0), out.stride(0), again.stride(0),
        HAS_SCALE=scale is not None, BLOCK=2048, num_warps=8,
    )  # fmt: skip


def scale_grad(grad: Tensor, branch: Tensor, scale: Tensor, magnitudes: Magnitudes) -> Tensor:
    """See ``plain_kernels.scale_grad``."""
    rows, columns = grad.shape
    own = torch.empty(rows, columns, dtype=grad.dtype, device=grad.device)
    triton_dora.scale_grad_program[(num_sums(rows), triton.cdiv(columns, _COLUMNS))](
        grad, branch, scale, magnitudes.values, own, magnitudes.sums, rows, columns,
        grad.stride(0), branch.stride(0), magnitudes.sums.stride(0),
        ROWS=_rows_per_sum(rows), STEP=_STEP, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return own


def num_sums(tokens: int) -> int:
    """See ``plain_kernels.num_sums``."""
    return -(-tokens // _rows_per_sum(tokens))


def _rows_per_sum(tokens: int) -> int:
    return _FEW_ROWS if tokens <= _FEW_TOKENS else _MANY_ROWS


def dora_scale(cross: Tensor, b: Tensor, gram: Tensor, squares: Tensor, magnitude: Tensor, factor: float) -> Tensor:
    """See ``plain_kernels.dora_scale``."""
    layers, rows, rank = b.shape
    out = torch.empty(layers, rows, dtype=torch.float32, device=b.device)
    triton_dora.dora_scale_program[(triton.cdiv(rows, 16), layers)](
        cross, b, gram, squares, magnitude, out, rows, b.stride(0), b.stride(1), factor,
        ROWS=16, RANK=rank, BLOCK=triton.next_power_of_2(rank), num_warps=4,
    )  # fmt: skip
    return out


def drop(x: Tensor, share: float, seed: int) -> Tensor:
    """See ``plain_kernels.drop``; the mask is another one."""
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    programs.drop_program[(rows, triton.cdiv(columns, 1024))](
        x, out, columns, x.stride(0), share, 1.0 / (1.0 - share), seed, BLOCK=1024, num_warps=4
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
    """4-bit numbers of bitsandbytes, written row by row into a matrix with a row stride of its own.

    Args:
        packed: Two numbers a byte, uint8 [numbers / 2].
        codes: The 16 values, float32.
        steps: Factor of each block: float32, or uint8 where the factors are quantised as well.
        outer: For quantised factors: their 256 values, the factors of their blocks, their offset; all float32.
        block_size: Numbers a factor.
        outer_size: Factors an outer factor.
        out: [rows, columns], with whole blocks of factors in a row.
    """
    rows, columns = out.shape
    assert columns % block_size == 0, "a block of factors must not cross a row's end"
    blocks = columns // block_size
    outer_codes, outer_steps, offset = outer or (None, None, None)
    programs.unpack_program[(rows, triton.cdiv(blocks, 32))](
        packed, codes, steps, outer_codes, outer_steps, offset, out, blocks, out.stride(0),
        NESTED=outer is not None, BLOCK_SIZE=block_size, OUTER_SIZE=outer_size, BLOCKS=32, num_warps=4,
    )  # fmt: skip


def cross_entropy(logits: Tensor, targets: Tensor, grad_factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``plain_kernels.cross_entropy``."""
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    hits = torch.empty(rows, dtype=torch.bool, device=logits.device)
    programs.cross_entropy_program[(rows,)](
        logits, targets, grad_factor, losses, hits, columns, logits.stride(0),
        HAS_FACTOR=grad_factor is not None, BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return losses, hits


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
