"""What the GPU runs: Triton programs, launched by ``triton_kernels``.

A program takes a token (or some heads of it, or a piece of a long row) and reads and writes each number once.
"""
# mypy: ignore-errors
# ruff: noqa: N803, N806, D103 - what each does stands at the function of the same name in plain_kernels

import triton
import triton.language as tl


@triton.jit
def add_norm_program(
    residual, branch, scale, weight, out, total, inverse, num_columns, out_stride, eps,
    HAS_BRANCH: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < num_columns
    numbers = tl.load(residual + row * num_columns + at, mask=inside, other=0.0)
    kind = numbers.dtype
    values = numbers.to(tl.float32)
    if HAS_BRANCH:
        added = tl.load(branch + row * num_columns + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            added = added * tl.load(scale + at, mask=inside, other=0.0)
        values = (values + added).to(kind).to(tl.float32)
        tl.store(total + row * num_columns + at, values.to(kind), mask=inside)
    factor = 1.0 / tl.sqrt(tl.sum(values * values) / num_columns + eps)
    unit = (values * factor).to(kind).to(tl.float32)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, (unit * weights).to(out.dtype.element_ty), mask=inside)
    tl.store(inverse + row, factor)


@triton.jit
def add_program(residual, branch, scale, out, num_columns, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < num_columns
    numbers = tl.load(residual + row * num_columns + at, mask=inside, other=0.0)
    added = tl.load(branch + row * num_columns + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        added = added * tl.load(scale + at, mask=inside, other=0.0)
    tl.store(out + row * num_columns + at, (numbers.to(tl.float32) + added).to(numbers.dtype), mask=inside)


@triton.jit
def norm_backward_program(
    grad, residual, inverse, weight, passing, out, num_columns, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < num_columns
    place = row * num_columns + at
    factor = tl.load(inverse + row)
    unit = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32) * factor
    inner = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    inner = inner * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    own = (inner - unit * (tl.sum(inner * unit) / num_columns)) * factor
    past = tl.load(passing + place, mask=inside, other=0.0)
    tl.store(out + place, (own + past.to(tl.float32)).to(past.dtype), mask=inside)


@triton.jit
def load_heads_program(
    row, scale, bias, place, inside, HALF_WIDTH: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Both halves of some heads, float32 [heads, half]."""
    first = tl.load(row + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row + HALF_WIDTH + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        first = first * tl.load(scale + place, mask=inside, other=0.0)
        second = second * tl.load(scale + HALF_WIDTH + place, mask=inside, other=0.0)
    if HAS_BIAS:
        first += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(bias + HALF_WIDTH + place, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def load_turn_program(cos, sin, token, at, inside, WIDTH: tl.constexpr):
    """Cosines and sines of a token for both halves, float32 [1, half] each."""
    start = token * WIDTH + at
    cos1 = tl.load(cos + start, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos + WIDTH // 2 + start, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin + start, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin + WIDTH // 2 + start, mask=inside, other=0.0).to(tl.float32)[None, :]
    return cos1, cos2, sin1, sin2


@triton.jit
def kind_program(queries, keys, values, num_heads, num_key_heads, HEADS: tl.constexpr):
    """What this program's heads are: their tensor, its first head in the projections, its heads, this block's place."""
    block = tl.program_id(1)
    query_blocks = tl.cdiv(num_heads, HEADS)
    key_blocks = tl.cdiv(num_key_heads, HEADS)
    if block < query_blocks:
        chosen, first_head, heads, place = queries, 0, num_heads, block
    elif block < query_blocks + key_blocks:
        chosen, first_head, heads, place = keys, num_heads, num_key_heads, block - query_blocks
    else:
        chosen, first_head, heads = values, num_heads + num_key_heads, num_key_heads
        place = block - query_blocks - key_blocks
    return chosen, first_head, heads, place * HEADS


@triton.jit
def split_heads_program(
    qkv, scale, bias, query_norm, key_norm, cos, sin, queries, keys, values, qkv_stride, num_queries, num_keys, eps,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    WIDTH: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    out, first_head, num_heads, start = kind_program(queries, keys, values, num_queries, num_keys, HEADS)
    head = start + tl.arange(0, HEADS)
    at = tl.arange(0, HALF)
    known = at < WIDTH // 2
    inside = (head < num_heads)[:, None] & known[None, :]
    place = (first_head + head)[:, None] * WIDTH + at[None, :]
    first, second = load_heads_program(
        qkv + token * qkv_stride, scale, bias, place, inside, WIDTH // 2, HAS_SCALE, HAS_BIAS
    )
    kind = qkv.dtype.element_ty
    turns = first_head <= num_queries
    if HAS_NORM and turns:
        norm = query_norm if first_head == 0 else key_norm
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        factor = (1.0 / tl.sqrt(squares / WIDTH + eps))[:, None]
        weight1 = tl.load(norm + at, mask=known, other=0.0).to(tl.float32)[None, :]
        weight2 = tl.load(norm + WIDTH // 2 + at, mask=known, other=0.0).to(tl.float32)[None, :]
        first = (first * factor).to(kind).to(tl.float32) * weight1
        second = (second * factor).to(kind).to(tl.float32) * weight2
    if turns:
        cos1, cos2, sin1, sin2 = load_turn_program(cos, sin, token, at, known, WIDTH)
        turned = first * cos1 - second * sin1
        second = second * cos2 + first * sin2
        first = turned
    goal = out + (token * num_heads + head)[:, None] * WIDTH + at[None, :]
    tl.store(goal, first.to(kind), mask=inside)
    tl.store(goal + WIDTH // 2, second.to(kind), mask=inside)


@triton.jit
def join_heads_program(
    queries, keys, values, qkv, scale, bias, query_norm, key_norm, cos, sin, out, qkv_stride, out_stride,
    num_queries, num_keys, eps,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    WIDTH: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    grad, first_head, num_heads, start = kind_program(queries, keys, values, num_queries, num_keys, HEADS)
    head = start + tl.arange(0, HEADS)
    at = tl.arange(0, HALF)
    known = at < WIDTH // 2
    inside = (head < num_heads)[:, None] & known[None, :]
    source = grad + (token * num_heads + head)[:, None] * WIDTH + at[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + WIDTH // 2, mask=inside, other=0.0).to(tl.float32)
    place = (first_head + head)[:, None] * WIDTH + at[None, :]
    turns = first_head <= num_queries
    if turns:
        cos1, cos2, sin1, sin2 = load_turn_program(cos, sin, token, at, known, WIDTH)
        back = first * cos1 + second * sin2
        second = second * cos2 - first * sin1
        first = back
    if HAS_NORM and turns:
        norm = query_norm if first_head == 0 else key_norm
        raw1, raw2 = load_heads_program(
            qkv + token * qkv_stride, scale, bias, place, inside, WIDTH // 2, HAS_SCALE, HAS_BIAS
        )
        squares = tl.sum(raw1 * raw1, 1) + tl.sum(raw2 * raw2, 1)
        factor = (1.0 / tl.sqrt(squares / WIDTH + eps))[:, None]
        unit1, unit2 = raw1 * factor, raw2 * factor
        inner1 = first * tl.load(norm + at, mask=known, other=0.0).to(tl.float32)[None, :]
        inner2 = second * tl.load(norm + WIDTH // 2 + at, mask=known, other=0.0).to(tl.float32)[None, :]
        mean = ((tl.sum(inner1 * unit1, 1) + tl.sum(inner2 * unit2, 1)) / WIDTH)[:, None]
        first = (inner1 - unit1 * mean) * factor
        second = (inner2 - unit2 * mean) * factor
    if HAS_SCALE:
        first = first * tl.load(scale + place, mask=inside, other=0.0)
        second = second * tl.load(scale + WIDTH // 2 + place, mask=inside, other=0.0)
    goal = out + token * out_stride + place
    tl.store(goal, first.to(out.dtype.element_ty), mask=inside)
    tl.store(goal + WIDTH // 2, second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_program(both, scale, out, num_columns, both_stride, out_stride, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_columns
    gates, ups = load_both_program(both + row * both_stride, scale, at, inside, num_columns, HAS_SCALE)
    tl.store(out + row * out_stride + at, (gates * tl.sigmoid(gates) * ups).to(out.dtype.element_ty), mask=inside)


@triton.jit
def load_both_program(row, scale, at, inside, num_columns, HAS_SCALE: tl.constexpr):
    gates = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(row + num_columns + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        gates = gates * tl.load(scale + at, mask=inside, other=0.0)
        ups = ups * tl.load(scale + num_columns + at, mask=inside, other=0.0)
    return gates, ups


@triton.jit
def gate_backward_program(
    grad, both, scale, out, again, num_columns, grad_stride, both_stride, out_stride, again_stride,
    HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_columns
    gates, ups = load_both_program(both + row * both_stride, scale, at, inside, num_columns, HAS_SCALE)
    outer = tl.load(grad + row * grad_stride + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gates)
    active = gates * share
    grad_gate = outer * ups * (share + active * (1.0 - share))
    grad_up = outer * active
    if HAS_SCALE:
        grad_gate = grad_gate * tl.load(scale + at, mask=inside, other=0.0)
        grad_up = grad_up * tl.load(scale + num_columns + at, mask=inside, other=0.0)
    kind = out.dtype.element_ty
    tl.store(out + row * out_stride + at, grad_gate.to(kind), mask=inside)
    tl.store(out + row * out_stride + num_columns + at, grad_up.to(kind), mask=inside)
    tl.store(again + row * again_stride + at, (active * ups).to(again.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def drop_program(x, out, num_columns, stride, share, factor, seed, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_columns
    # A number's place in the matrix is its place in the stream of random numbers.
    kept = tl.rand(seed, row * num_columns + at) >= share
    values = tl.load(x + row.to(tl.int64) * stride + at, mask=inside, other=0.0).to(tl.float32)
    made = tl.where(kept, values * factor, 0.0).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * num_columns + at, made, mask=inside)


@triton.jit
def unpack_program(
    packed, codes, steps, outer_codes, outer_steps, offset, out, num_blocks, out_stride,
    NESTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, OUTER_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    known = block < num_blocks
    place = row * num_blocks + block
    # One factor for a block of numbers: asked for once, not once a number.
    step = tl.load(steps + place, mask=known, other=0)
    if NESTED:
        outer = tl.load(outer_steps + place // OUTER_SIZE, mask=known, other=0.0)
        step = tl.load(outer_codes + step.to(tl.int32), mask=known, other=0.0) * outer + tl.load(offset)
    HALF: tl.constexpr = BLOCK_SIZE // 2
    pair_at = tl.arange(0, HALF)
    pair = tl.load(packed + place[:, None] * HALF + pair_at[None, :], mask=known[:, None], other=0).to(tl.int32)
    # The first number of a pair stands in the high half of the byte.
    high = (tl.load(codes + (pair >> 4)) * step[:, None]).to(out.dtype.element_ty)
    low = (tl.load(codes + (pair & 15)) * step[:, None]).to(out.dtype.element_ty)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(out + row * out_stride + at, tl.interleave(high, low), mask=known[:, None])


@triton.jit
def cross_entropy_program(
    logits, targets, factor, losses, hits, num_columns, stride, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    target = tl.load(targets + row)
    chosen = tl.load(start + target).to(tl.float32)
    # Finite stand-ins for minus infinity, whose difference is no number.
    tops = tl.full((BLOCK,), -1e30, dtype=tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for column in range(0, num_columns, BLOCK):
        at = column + tl.arange(0, BLOCK)
        values = tl.load(start + at, mask=at < num_columns, other=float("-inf")).to(tl.float32)
        values = tl.maximum(values, -1e30)
        higher = tl.maximum(tops, values)
        here = tl.where(at < num_columns, tl.exp(values - higher), 0.0)
        sums = sums * tl.exp(tops - higher) + here
        tops = higher
    top = tl.max(tops)
    total = top + tl.log(tl.sum(sums * tl.exp(tops - top)))
    tl.store(losses + row, total - chosen)
    tl.store(hits + row, chosen >= top)
    if HAS_FACTOR:
        outer = tl.load(factor)
        for column in range(0, num_columns, BLOCK):
            at = column + tl.arange(0, BLOCK)
            values = tl.load(start + at, mask=at < num_columns, other=float("-inf")).to(tl.float32)
            share = tl.exp(values - total) - tl.where(at == target, 1.0, 0.0)
            tl.store(start + at, (share * outer).to(logits.dtype.element_ty), mask=at < num_columns)
