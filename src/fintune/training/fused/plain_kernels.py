"""The elementwise passes of a decoder layer in plain torch: what runs on a CPU, and what the GPU's kernels must equal.

Every function computes in float32 and writes in the type of its output. Shapes: ``tokens`` rows, one a token. Outputs
that a matrix product reads next are written into the left part of a wider buffer, whose right part holds the adapter's
activations (see :mod:`fintune.training.fused.bordered`); such a view has a row stride of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadParts:
    """What turns the projections of a layer into its queries, keys and values.

    Attributes:
        num_heads: Query heads.
        num_key_heads: Key heads, as many as value heads.
        scale: DoRA's factors of the projections, float32, or None for one.
        bias: Of the projections, added after the scale.
        query_norm: Weight of the norm over each query head, [width], or None.
        key_norm: Likewise of each key head.
        eps: Of these norms.
    """

    num_heads: int
    num_key_heads: int
    scale: Tensor | None
    bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    eps: float


@dataclass(frozen=True)
class Magnitudes:
    """DoRA's magnitudes of some features, and where their gradients go.

    With ``y = m / norm * u``, the gradient of ``m`` is the sum over the tokens of ``g u``, divided by ``m``, for the
    gradient ``g`` of the *unscaled* ``u``.

    Attributes:
        values: float32 [features].
        sums: float32 [rows, features]; the sum of its rows is the gradient. See :func:`num_sums`.
    """

    values: Tensor
    sums: Tensor


def add_norm(
    residual: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm of ``residual + scale * branch``.

    Args:
        residual: [tokens, hidden].
        branch: [tokens, hidden], or None for nothing to add.
        scale: DoRA's factor of the branch, float32 [hidden], or None for one.
        weight: Of the norm, [hidden].
        eps: Of the norm.
        out: [tokens, hidden], gets the normalised rows.

    Returns:
        The sum in the residual's type (the residual itself where nothing is added), and 1 / root mean square, float32
        [tokens].
    """
    if branch is not None:
        residual = add(residual, branch, scale)
    rows = residual.float()
    inverse = torch.rsqrt(rows.pow(2).mean(-1) + eps)
    # Rounded to the type of the model before the weight is applied, as transformers does.
    out.copy_((rows * inverse[:, None]).to(residual.dtype).float() * weight.float())
    return residual, inverse


def add(residual: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """``residual + scale * branch`` in the type of the residual; shapes as in :func:`add_norm`."""
    added = branch.float() if scale is None else branch.float() * scale
    return (residual.float() + added).to(residual.dtype)


def norm_backward(grad: Tensor, residual: Tensor, inverse: Tensor, weight: Tensor, passing: Tensor) -> Tensor:
    """Gradient of the sum that :func:`add_norm` normalised.

    Args:
        grad: Of the normalised rows, [tokens, hidden].
        residual: The sum.
        inverse: 1 / root mean square.
        weight: Of the norm.
        passing: Gradient that reaches the sum past the norm, [tokens, hidden].

    Returns:
        [tokens, hidden] in the type of ``passing``.
    """
    unit = residual.float() * inverse[:, None]
    inner = grad.float() * weight.float()
    own = (inner - unit * (inner * unit).mean(-1, keepdim=True)) * inverse[:, None]
    return (own + passing.float()).to(passing.dtype)


def split_heads(qkv: Tensor, parts: HeadParts, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from the projections: scale, bias, norm of each head (Qwen3), rotary embedding.

    Args:
        qkv: [tokens, (num_heads + 2 * num_key_heads) * width].
        parts: What is applied.
        cos: [tokens, width]; halves are paired, as in transformers.
        sin: [tokens, width].

    Returns:
        Contiguous, [tokens, num_heads, width] and twice [tokens, num_key_heads, width].
    """
    queries, keys, values = _split(_scaled_heads(qkv, parts), parts)
    rotated = []
    for raw, norm in ((queries, parts.query_norm), (keys, parts.key_norm)):
        heads = raw if norm is None else _head_norm(raw, norm, parts.eps, qkv.dtype)
        turned = heads * cos[:, None].float() + _half_turn(heads) * sin[:, None].float()
        rotated.append(turned.to(qkv.dtype).contiguous())
    return rotated[0], rotated[1], values.to(qkv.dtype).contiguous()


def join_heads(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor | None,
    parts: HeadParts,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    magnitudes: Magnitudes | None = None,
) -> None:
    """Gradient of the projections from those of queries, keys and values.

    Args:
        grads: Shapes as :func:`split_heads` returns.
        qkv: What it was given; needed where heads are normed, and with ``magnitudes``.
        parts: As there.
        cos: As there.
        sin: As there.
        out: [tokens, (num_heads + 2 * num_key_heads) * width].
        magnitudes: DoRA's, whose gradients are taken along.
    """
    tokens = len(cos)
    norms = (parts.query_norm, parts.key_norm, None)
    raw = [None] * 3 if qkv is None else _split(_scaled_heads(qkv, parts), parts)
    joined = []
    for at, (grad, norm, before) in enumerate(zip(grads, norms, raw, strict=True)):
        rows = grad.float()
        if at < 2:
            rows = rows * cos[:, None].float() - _half_turn(rows * sin[:, None].float())
        if norm is not None:
            assert before is not None, "norms of heads need what they were applied to"
            inverse = torch.rsqrt(before.pow(2).mean(-1, keepdim=True) + parts.eps)
            unit, inner = before * inverse, rows * norm.float()
            rows = (inner - unit * (inner * unit).mean(-1, keepdim=True)) * inverse
        joined.append(rows.reshape(tokens, -1))
    grad_all = torch.cat(joined, 1)
    grad_all = grad_all if parts.scale is None else grad_all * parts.scale
    out.copy_(grad_all)
    if magnitudes is not None:
        assert qkv is not None, "magnitudes need what they scaled"
        _take_sums(grad_all, qkv, magnitudes)


def gate(both: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """SwiGLU: ``silu(gate) * up``.

    Args:
        both: Gate and up beside each other, [tokens, 2 * intermediate].
        scale: DoRA's factors, float32 [2 * intermediate].
        out: [tokens, intermediate].
    """
    gates, ups = (both.float() if scale is None else both.float() * scale).chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gates) * ups)


def gate_backward(
    grad: Tensor,
    both: Tensor,
    scale: Tensor | None,
    out: Tensor,
    again: Tensor,
    magnitudes: Magnitudes | None = None,
) -> None:
    """Gradients of gate and up, and SwiGLU's output once more.

    Args:
        grad: Of the output, [tokens, intermediate].
        both: What :func:`gate` was given.
        scale: As in :func:`gate`.
        out: [tokens, 2 * intermediate], gets the gradient of ``both``.
        again: [tokens, intermediate], gets the output; may be ``grad`` itself.
        magnitudes: DoRA's, whose gradients are taken along.
    """
    gates, ups = (both.float() if scale is None else both.float() * scale).chunk(2, -1)
    share = torch.sigmoid(gates)
    active = gates * share
    rows = grad.float()
    joined = torch.cat([rows * ups * (share + active * (1 - share)), rows * active], -1)
    again.copy_(active * ups)
    joined = joined if scale is None else joined * scale
    out.copy_(joined)
    if magnitudes is not None:
        _take_sums(joined, both, magnitudes)


def scale_grad(grad: Tensor, branch: Tensor, scale: Tensor, magnitudes: Magnitudes) -> Tensor:
    """Backward of ``scale * branch`` where ``scale = magnitude / norm``.

    Args:
        grad: [tokens, features].
        branch: [tokens, features].
        scale: float32 [features].
        magnitudes: Their gradients are taken along.

    Returns:
        Gradient of the branch in the type of ``grad``.
    """
    own = (grad.float() * scale).to(grad.dtype)
    _take_sums(own, branch, magnitudes)
    return own


def num_sums(tokens: int) -> int:
    """Rows of :attr:`Magnitudes.sums` for so many tokens."""
    return 1


def _take_sums(grad: Tensor, branch: Tensor, magnitudes: Magnitudes) -> None:
    magnitudes.sums[0] = (grad.float() * branch.float()).sum(0) / magnitudes.values.float()


def dora_scale(cross: Tensor, b: Tensor, gram: Tensor, squares: Tensor, magnitude: Tensor, factor: float) -> Tensor:
    """DoRA's ``m / ||W + s B A||`` of each output, by expanding the square of the norm.

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


def drop(x: Tensor, share: float, seed: int) -> Tensor:
    """Dropout by a mask that its seed alone decides: zero, or ``x / (1 - share)``; [tokens, features], contiguous."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - share, generator=generator)
    return kept.mul_(x).div_(1 - share)


def _scaled_heads(qkv: Tensor, parts: HeadParts) -> Tensor:
    rows = qkv.float()
    if parts.scale is not None:
        rows = rows * parts.scale
    if parts.bias is not None:
        rows = rows + parts.bias.float()
    return rows.view(len(qkv), parts.num_heads + 2 * parts.num_key_heads, -1)


def _split(rows: Tensor, parts: HeadParts) -> tuple[Tensor, ...]:
    return tuple(rows.split([parts.num_heads, parts.num_key_heads, parts.num_key_heads], 1))


def _head_norm(heads: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    inverse = torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + eps)
    return (heads * inverse).to(dtype).float() * weight.float()


def _half_turn(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2, -1)
    return torch.cat([-second, first], -1)


def cross_entropy(logits: Tensor, targets: Tensor, grad_factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss of each row; turns the logits into their gradient where a factor is given.

    Args:
        logits: [rows, vocabulary]; overwritten with ``grad_factor * (softmax - one_hot)``.
        targets: [rows].
        grad_factor: A float32 scalar, or None to leave the logits.

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
