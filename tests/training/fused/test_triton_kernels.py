"""The GPU's kernels against plain torch, run by Triton's interpreter: a GPU is not needed for their arithmetic."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from fintune.training.fused import kernels_torch, launch_triton  # noqa: E402
from fintune.training.fused.kernels_torch import HeadTransform, MagnitudeSums  # noqa: E402

TOKENS, HIDDEN, BORDER = 37, 96, 8


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def factors(draw):
    return lambda size, given: draw(size).abs() + 0.5 if given else None


def close(own, expected):
    assert own.dtype == expected.dtype
    assert torch.allclose(own.float(), expected.float(), rtol=1e-5, atol=1e-5)


def wide(columns):
    """The left part of a wider buffer, twice; what lies beside it must stay."""
    buffers = [torch.full((TOKENS, columns + BORDER), 7.0) for _ in range(2)]
    return buffers, [buffer[:, :columns] for buffer in buffers]


def check(buffers):
    close(*buffers)
    assert bool((buffers[0][:, -BORDER:] == 7.0).all())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("with_branch", [False, True])
def test_add_norm(draw, factors, scaled, with_branch):
    residual, weight, scale = draw(TOKENS, HIDDEN), draw(HIDDEN), factors(HIDDEN, scaled)
    branch = draw(TOKENS, HIDDEN) if with_branch else None
    buffers, outs = wide(HIDDEN)
    own = launch_triton.add_norm(residual, branch, scale, weight, 1e-5, outs[0])
    expected = kernels_torch.add_norm(residual, branch, scale, weight, 1e-5, outs[1])
    check(buffers)
    close(own[0], expected[0])
    close(own[1], expected[1])
    grads = draw(TOKENS, HIDDEN), draw(TOKENS, HIDDEN)
    close(
        launch_triton.norm_backward(grads[0], own[0], own[1], weight, grads[1]),
        kernels_torch.norm_backward(grads[0], own[0], own[1], weight, grads[1]),
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_add(draw, factors, scaled):
    given = draw(TOKENS, HIDDEN), draw(TOKENS, HIDDEN), factors(HIDDEN, scaled)
    close(launch_triton.add(*given), kernels_torch.add(*given))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 2, 24), (6, 6, 16), (40, 8, 8)])
def test_heads(draw, factors, scaled, biased, normed, heads, key_heads, width):
    features = (heads + 2 * key_heads) * width
    parts = HeadTransform(
        num_heads=heads,
        num_key_heads=key_heads,
        scale=factors(features, scaled),
        bias=draw(features) if biased else None,
        query_norm=draw(width) if normed else None,
        key_norm=draw(width) if normed else None,
        eps=1e-5,
    )
    qkv, cos, sin = draw(TOKENS, features), draw(TOKENS, width), draw(TOKENS, width)
    own = launch_triton.split_heads(qkv, parts, cos, sin)
    for a, b in zip(own, kernels_torch.split_heads(qkv, parts, cos, sin), strict=True):
        close(a, b)
    grads = tuple(draw(*each.shape) for each in own)
    buffers, outs = wide(features)
    # Only the norms of heads need the projections. Otherwise they are not saved.
    launch_triton.join_heads(grads, qkv if normed else None, parts, cos, sin, outs[0])
    kernels_torch.join_heads(grads, qkv, parts, cos, sin, outs[1])
    check(buffers)


@pytest.mark.parametrize("scaled", [False, True])
def test_gate(draw, factors, scaled):
    both, scale = draw(TOKENS, 160), factors(160, scaled)
    buffers, outs = wide(80)
    launch_triton.gate(both, scale, outs[0])
    kernels_torch.gate(both, scale, outs[1])
    check(buffers)
    grads = [draw(TOKENS, 80)] * 2
    grads = [grad.clone() for grad in grads]
    buffers, outs = wide(160)
    # The output once more may take the place of its gradient.
    launch_triton.gate_backward(grads[0], both, scale, outs[0], grads[0])
    kernels_torch.gate_backward(grads[1], both, scale, outs[1], grads[1])
    check(buffers)
    close(*grads)


def magnitudes(module, tokens, values):
    """Two blocks of sums beside each other, of which the right one is ours."""
    everything = torch.full((module.num_sums(tokens), 5 + len(values)), 7.0)
    return everything, MagnitudeSums(values, everything[:, 5:])


def check_sums(pairs):
    (own_all, own), (_, expected) = pairs
    assert torch.allclose(own.blocks.sum(0), expected.blocks.sum(0), rtol=1e-4, atol=1e-4)
    assert bool((own_all[:, :5] == 7.0).all())


@pytest.mark.parametrize("tokens", [7, 300])
def test_scale_grad_sums_magnitude_gradients(draw, factors, tokens):
    grad, branch = draw(tokens, HIDDEN), draw(tokens, HIDDEN)
    scale, values = factors(HIDDEN, True), factors(HIDDEN, True)
    pairs = [magnitudes(module, tokens, values) for module in (launch_triton, kernels_torch)]
    own = launch_triton.scale_grad(grad, branch, scale, pairs[0][1])
    close(own, kernels_torch.scale_grad(grad, branch, scale, pairs[1][1]))
    assert torch.allclose(pairs[1][1].blocks[0], (grad * branch * scale).sum(0) / values, rtol=1e-4, atol=1e-4)
    check_sums(pairs)


def test_gate_backward_sums_magnitude_gradients(draw, factors):
    both, scale, values = draw(TOKENS, 160), factors(160, True), factors(160, True)
    pairs = [magnitudes(module, TOKENS, values) for module in (launch_triton, kernels_torch)]
    buffers, outs = wide(160)
    grads = [draw(TOKENS, 80)] * 2
    grads = [grad.clone() for grad in grads]
    launch_triton.gate_backward(grads[0], both, scale, outs[0], grads[0], pairs[0][1])
    kernels_torch.gate_backward(grads[1], both, scale, outs[1], grads[1], pairs[1][1])
    check(buffers)
    close(*grads)
    check_sums(pairs)


@pytest.mark.parametrize(("biased", "normed"), [(False, False), (True, True)])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 2, 24), (20, 4, 8)])
def test_join_heads_sums_magnitude_gradients(draw, factors, biased, normed, heads, key_heads, width):
    features = (heads + 2 * key_heads) * width
    parts = HeadTransform(
        num_heads=heads,
        num_key_heads=key_heads,
        scale=factors(features, True),
        bias=draw(features) if biased else None,
        query_norm=draw(width) if normed else None,
        key_norm=draw(width) if normed else None,
        eps=1e-5,
    )
    qkv, cos, sin = draw(TOKENS, features), draw(TOKENS, width), draw(TOKENS, width)
    grads = tuple(draw(TOKENS, count, width) for count in (heads, key_heads, key_heads))
    pairs = [magnitudes(module, TOKENS, factors(features, True)) for module in (launch_triton, kernels_torch)]
    pairs[1] = (pairs[1][0], MagnitudeSums(pairs[0][1].values, pairs[1][1].blocks))
    buffers, outs = wide(features)
    launch_triton.join_heads(grads, qkv, parts, cos, sin, outs[0], pairs[0][1])
    kernels_torch.join_heads(grads, qkv, parts, cos, sin, outs[1], pairs[1][1])
    check(buffers)
    check_sums(pairs)


def test_dora_scale_equals_the_norm_of_the_sum(draw, factors):
    weights, a, b, magnitude = draw(3, 50, HIDDEN), draw(3, 6, HIDDEN), draw(3, 50, 10)[:, :, :6], factors(50, True)
    expected = magnitude / (weights + 0.7 * b @ a).norm(dim=2)
    given = weights @ a.mT, b, a @ a.mT, weights.pow(2).sum(2), magnitude.expand(3, 50).contiguous(), 0.7
    close(launch_triton.dora_scale(*given), expected)
    close(kernels_torch.dora_scale(*given), expected)


def test_dropout(draw):
    x = draw(TOKENS, 1500)[:, :1400]
    made = launch_triton.dropout(x, 0.25, 11)
    kept = made != 0
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.01)
    assert torch.allclose(made[kept], x[kept] / 0.75)
    assert torch.equal(made, launch_triton.dropout(x, 0.25, 11))
    other = launch_triton.dropout(x, 0.25, 12) != 0
    # Two masks agree as often as chance has it: 0.75 squared and 0.25 squared.
    assert float((kept == other).float().mean()) == pytest.approx(0.625, abs=0.015)
    assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("with_grad", [False, True])
def test_cross_entropy(draw, with_grad):
    logits = draw(9, 5000)
    logits[3, 100:] = float("-inf")
    targets = torch.arange(9) * 11
    targets[0] = logits[0].argmax()
    factor = torch.tensor(0.3) if with_grad else None
    own, expected = logits.clone(), logits.clone()
    losses, hits = launch_triton.cross_entropy(own, targets, factor)
    expected_losses, expected_hits = kernels_torch.cross_entropy(expected, targets, factor)
    close(losses, expected_losses)
    assert torch.equal(hits, expected_hits)
    assert bool(hits[0])
    close(own, expected)


@pytest.mark.parametrize("nested", [False, True])
def test_unpack_nf4_equals_bitsandbytes(draw, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = draw(96, 192).to(torch.bfloat16)
    packed, state = functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=nested)
    outer = (state.state2.code, state.state2.absmax, state.offset) if nested else None
    out = torch.full((96, 200), 7.0)
    outer_size = state.state2.blocksize if nested else 1
    launch_triton.unpack_nf4(packed, state.code, state.absmax, outer, state.blocksize, outer_size, out[:, :192])
    assert torch.equal(out[:, :192].to(torch.bfloat16), functional.dequantize_4bit(packed, state))
    assert bool((out[:, 192:] == 7.0).all())
