"""The elementwise kernels of the fused layers in plain torch: what runs on a CPU, and the reference for the GPU's.

Every function computes in float32 and writes in the type of its output. ``tokens`` is the number of rows, one for each
token. An output that a matrix product reads next is written into the left part of an augmented buffer, whose right part
holds the low-rank activations (see :mod:`fintune.training.fused.lora_linear`). Such a view has its own row stride.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor


def kernels_for(tensor: Tensor) -> ModuleType:
    """Return the module with the kernels for a tensor's device: Triton's on a CUDA GPU, this one elsewhere."""
    if tensor.is_cuda:
        from fintune.training.fused import launch_triton

        return launch_triton
    return sys.modules[__name__]


def matmul_float32(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices (or batches of them) with a float32 result. A GPU does not round it to the inputs' type."""
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    if left.is_cuda and left.dtype != torch.float32:
        return multiply(left, right, out_dtype=torch.float32)
    return multiply(left, right).float()


@dataclass(frozen=True)
class HeadTransform:
    """How the projections of a layer become its queries, keys and values.

    Attributes:
        num_heads: Number of query heads.
        num_key_heads: Number of key heads, and of value heads.
        scale: DoRA's scale of the projections, float32 [out], or None for 1.
        bias: Bias of the projections, [out], added after the scale, or None.
        query_norm: Weight of the norm over each query head, [head_dim], or None.
        key_norm: Weight of the norm over each key head, [head_dim], or None.
        eps: Epsilon of these norms.
    """

    num_heads: int
    num_key_heads: int
    scale: Tensor | None
    bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    eps: float


@dataclass(frozen=True)
class MagnitudeSums:
    """DoRA's magnitudes of some features, and where their gradients go.

    With ``y = m / norm * u``, the gradient of ``m`` is the sum over the tokens of ``g u``, divided by ``m``, for the
    gradient ``g`` of the *unscaled* ``u``.

    Attributes:
        values: Magnitudes, float32 [features].
        blocks: float32 [blocks, features]. The sum of its rows is the gradient. See :func:`num_sums`.
    """

    values: Tensor
    blocks: Tensor


def add_norm(
    residual: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the root-mean-square norm of ``residual + scale * branch``.

    Args:
        residual: [tokens, hidden].
        branch: [tokens, hidden], or None to add nothing.
        scale: DoRA's scale of the branch, float32 [hidden], or None for 1.
        weight: Weight of the norm, [hidden].
        eps: Epsilon of the norm.
        out: [tokens, hidden]; gets the normalised rows.

    Returns:
        The sum in the residual's type (the residual itself if nothing is added), and 1 / root mean square, float32
        [tokens].
    """
    if branch is not None:
        residual = add(residual, branch, scale)
    rows = residual.float()
    inverse = torch.rsqrt(rows.pow(2).mean(-1) + eps)
    # Rounded to the type of the model before the weight is applied, as in transformers.
    out.copy_((rows * inverse[:, None]).to(residual.dtype).float() * weight.float())
    return residual, inverse


def add(residual: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """Compute ``residual + scale * branch`` in the type of the residual; shapes as in :func:`add_norm`."""
    added = branch.float() if scale is None else branch.float() * scale
    return (residual.float() + added).to(residual.dtype)


def norm_backward(grad: Tensor, residual: Tensor, inverse: Tensor, weight: Tensor, passing: Tensor) -> Tensor:
    """Compute the gradient of the sum that :func:`add_norm` normalised, [tokens, hidden] in the type of ``passing``.

    ``passing`` is the gradient that reaches the sum past the norm; other shapes as in :func:`add_norm`.
    """
    unit = residual.float() * inverse[:, None]
    inner = grad.float() * weight.float()
    own = (inner - unit * (inner * unit).mean(-1, keepdim=True)) * inverse[:, None]
    return (own + passing.float()).to(passing.dtype)


def split_heads(qkv: Tensor, transform: HeadTransform, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute queries, keys and values: scale, bias, norm of each head (Qwen3), rotary embedding.

    Args:
        qkv: Projections, [tokens, (num_heads + 2 * num_key_heads) * head_dim].
        transform: What is applied.
        cos: [tokens, head_dim]. The two halves of a head are paired, as in transformers.
        sin: [tokens, head_dim].

    Returns:
        Contiguous, [tokens, num_heads, head_dim] and twice [tokens, num_key_heads, head_dim].
    """
    queries, keys, values = _split(_scaled_heads(qkv, transform), transform)
    rotated = []
    for raw, norm in ((queries, transform.query_norm), (keys, transform.key_norm)):
        heads = raw if norm is None else _head_norm(raw, norm, transform.eps, qkv.dtype)
        turned = heads * cos[:, None].float() + _half_turn(heads) * sin[:, None].float()
        rotated.append(turned.to(qkv.dtype).contiguous())
    return rotated[0], rotated[1], values.to(qkv.dtype).contiguous()


def join_heads(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor | None,
    transform: HeadTransform,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    sums: MagnitudeSums | None = None,
) -> None:
    """Compute the gradient of the projections from those of queries, keys and values.

    Args:
        grads: Gradients with the shapes that :func:`split_heads` returns.
        qkv: The projections. They are needed if heads are normalised, and with ``sums``.
        transform: What :func:`split_heads` applied.
        cos: [tokens, head_dim].
        sin: [tokens, head_dim].
        out: [tokens, (num_heads + 2 * num_key_heads) * head_dim]; gets the gradient.
        sums: Where the gradients of DoRA's magnitudes go.
    """
    tokens = len(cos)
    norms = (transform.query_norm, transform.key_norm, None)
    raw = [None] * 3 if qkv is None else _split(_scaled_heads(qkv, transform), transform)
    joined = []
    for at, (grad, norm, before) in enumerate(zip(grads, norms, raw, strict=True)):
        rows = grad.float()
        if at < 2:
            rows = rows * cos[:, None].float() - _half_turn(rows * sin[:, None].float())
        if norm is not None:
            assert before is not None, "the norms of heads need the projections"
            inverse = torch.rsqrt(before.pow(2).mean(-1, keepdim=True) + transform.eps)
            unit, inner = before * inverse, rows * norm.float()
            rows = (inner - unit * (inner * unit).mean(-1, keepdim=True)) * inverse
        joined.append(rows.reshape(tokens, -1))
    grad_all = torch.cat(joined, 1)
    grad_all = grad_all if transform.scale is None else grad_all * transform.scale
    out.copy_(grad_all)
    if sums is not None:
        assert qkv is not None, "the sums need what the magnitudes scaled"
        _write_sums(grad_all, qkv, sums)


def gate(both: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """Write SwiGLU, ``silu(gate) * up``, into ``out`` [tokens, intermediate].

    ``both`` has gate and up side by side, [tokens, 2 * intermediate]; DoRA's scale is float32 [2 * intermediate].
    """
    gates, ups = (both.float() if scale is None else both.float() * scale).chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gates) * ups)


def gate_backward(
    grad: Tensor,
    both: Tensor,
    scale: Tensor | None,
    out: Tensor,
    again: Tensor,
    sums: MagnitudeSums | None = None,
) -> None:
    """Write the gradient of ``both`` into ``out``, and the output of :func:`gate` again into ``again``.

    ``grad`` is the gradient of the output, [tokens, intermediate]; ``again`` may be the same tensor. ``sums`` gets the
    gradients of DoRA's magnitudes. Other shapes are as in :func:`gate`.
    """
    gates, ups = (both.float() if scale is None else both.float() * scale).chunk(2, -1)
    share = torch.sigmoid(gates)
    active = gates * share
    rows = grad.float()
    joined = torch.cat([rows * ups * (share + active * (1 - share)), rows * active], -1)
    again.copy_(active * ups)
    joined = joined if scale is None else joined * scale
    out.copy_(joined)
    if sums is not None:
        _write_sums(joined, both, sums)


def scale_grad(grad: Tensor, branch: Tensor, scale: Tensor, sums: MagnitudeSums) -> Tensor:
    """Return the gradient of ``branch`` in ``scale * branch`` with ``scale = magnitude / norm``.

    It has the type of ``grad``, [tokens, features], like ``branch``. The scale is float32 [features]; ``sums`` gets the
    gradients of the magnitudes.
    """
    own = (grad.float() * scale).to(grad.dtype)
    _write_sums(own, branch, sums)
    return own


def num_sums(tokens: int) -> int:
    """Return the number of rows of :attr:`MagnitudeSums.blocks` for a number of tokens."""
    return 1


def _write_sums(grad: Tensor, branch: Tensor, sums: MagnitudeSums) -> None:
    sums.blocks[0] = (grad.float() * branch.float()).sum(0) / sums.values.float()


def dora_scale(cross: Tensor, b: Tensor, gram: Tensor, squares: Tensor, magnitude: Tensor, factor: float) -> Tensor:
    """Compute DoRA's ``m / ||W + s B A||`` for each output, by expanding the square of the norm.

    Args:
        cross: ``W A^T``, float32 [layers, out, rank].
        b: [layers, out, rank].
        gram: ``A A^T``, float32 [layers, rank, rank].
        squares: Squared norm of each row of ``W``, float32 [layers, out].
        magnitude: ``m``, float32 [layers, out].
        factor: ``s``.

    Returns:
        float32 [layers, out].
    """
    scaled = b.float() * factor
    total = squares + 2 * (cross * scaled).sum(-1) + (scaled @ gram * scaled).sum(-1)
    return magnitude / total.clamp(min=0).sqrt()


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """Apply a mask that depends on the seed alone: zero, or ``x / (1 - p)``; [tokens, features], contiguous."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=generator)
    return kept.mul_(x).div_(1 - p)


def _scaled_heads(qkv: Tensor, transform: HeadTransform) -> Tensor:
    rows = qkv.float()
    if transform.scale is not None:
        rows = rows * transform.scale
    if transform.bias is not None:
        rows = rows + transform.bias.float()
    return rows.view(len(qkv), transform.num_heads + 2 * transform.num_key_heads, -1)


def _split(rows: Tensor, transform: HeadTransform) -> tuple[Tensor, ...]:
    return tuple(rows.split([transform.num_heads, transform.num_key_heads, transform.num_key_heads], 1))


def _head_norm(heads: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    inverse = torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + eps)
    return (heads * inverse).to(dtype).float() * weight.float()


def _half_turn(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2, -1)
    return torch.cat([-second, first], -1)


def cross_entropy(logits: Tensor, targets: Tensor, grad_factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the loss of each row. With a factor, the logits are replaced by their gradient.

    Args:
        logits: [rows, vocabulary]; overwritten with ``grad_factor * (softmax - one_hot)``.
        targets: [rows].
        grad_factor: A float32 scalar, or None to leave the logits unchanged.

    Returns:
        Loss of each row, float32 [rows], and whether the target has the largest logit, bool [rows].
    """
    rows = logits.float()
    chosen = rows.gather(1, targets[:, None])
    losses = rows.logsumexp(1) - chosen[:, 0]
    is_top1 = chosen[:, 0] >= rows.amax(1)
    if grad_factor is not None:
        grad = rows.softmax(1)
        grad.scatter_add_(1, targets[:, None], -torch.ones_like(chosen))
        logits.copy_(grad * grad_factor)
    return losses, is_top1
