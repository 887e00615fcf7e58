"""The Triton kernels of the elementwise passes, started by ``launch_triton``.

A program takes a token (or some heads of it, or a piece of a long row) and reads and writes each number once. The
meaning of each kernel is documented at the function of the same name in ``kernels_torch``.

The gradient of a DoRA magnitude is a sum over the tokens. With HAS_SUMS, a program adds up a block of tokens, and torch
adds the blocks, so that results repeat. Their number of tokens is not specialised: it changes from batch to
batch, and a compilation for each kind of number (a multiple of 16, or not) would take a second during training.
"""
# mypy: ignore-errors
# ruff: noqa: N803, N806, D103 - documented at the function of the same name in kernels_torch

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
def block_program(
    queries, keys, values, num_heads, num_key_heads, WIDTH: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr
):
    """This program's heads: tensor, its first head in the projections, its heads; indices, columns and what is inside.

    The last value is where the first halves of the heads begin in a row of the projections.
    """
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
    head = place * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, HALF)
    known = at < WIDTH // 2
    inside = (head < heads)[:, None] & known[None, :]
    return chosen, first_head, heads, head, at, known, inside, (first_head + head)[:, None] * WIDTH + at[None, :]


@triton.jit
def store_sums_program(sums, magnitude, total, at, inside, row, sums_stride):
    values = tl.load(magnitude + at, mask=inside, other=1.0)
    tl.store(sums + row * sums_stride + at, total / values, mask=inside)


@triton.jit
def split_heads_program(
    qkv, scale, bias, query_norm, key_norm, cos, sin, queries, keys, values, qkv_stride, num_queries, num_keys, eps,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    WIDTH: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    out, first_head, num_heads, head, at, known, inside, place = block_program(
        queries, keys, values, num_queries, num_keys, WIDTH, HALF, HEADS
    )
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


@triton.jit(do_not_specialize=["num_tokens"])
def join_heads_program(
    queries, keys, values, qkv, scale, bias, magnitude, query_norm, key_norm, cos, sin, out, sums,
    num_tokens, qkv_stride, out_stride, sums_stride, num_queries, num_keys, eps,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SUMS: tl.constexpr,
    WIDTH: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    grad, first_head, num_heads, head, at, known, inside, place = block_program(
        queries, keys, values, num_queries, num_keys, WIDTH, HALF, HEADS
    )
    turns = first_head <= num_queries
    half: tl.constexpr = WIDTH // 2
    if HAS_SCALE:
        scale1 = tl.load(scale + place, mask=inside, other=0.0)
        scale2 = tl.load(scale + half + place, mask=inside, other=0.0)
    total1 = tl.zeros((HEADS, HALF), dtype=tl.float32)
    total2 = tl.zeros((HEADS, HALF), dtype=tl.float32)
    for step in range(ROWS):
        number = (tl.program_id(0) * ROWS + step).to(tl.int64)
        here = inside & (place * 0 + number < num_tokens)
        token = tl.minimum(number, num_tokens - 1)
        source = grad + (token * num_heads + head)[:, None] * WIDTH + at[None, :]
        first = tl.load(source, mask=here, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=here, other=0.0).to(tl.float32)
        if HAS_NORM or HAS_SUMS:  # otherwise there are no saved projections, and qkv is None
            row = qkv + token * qkv_stride
        if turns:
            cos1, cos2, sin1, sin2 = load_turn_program(cos, sin, token, at, known, WIDTH)
            back = first * cos1 + second * sin2
            second = second * cos2 - first * sin1
            first = back
        if HAS_NORM and turns:
            norm = query_norm if first_head == 0 else key_norm
            full1, full2 = load_heads_program(row, scale, bias, place, here, half, HAS_SCALE, HAS_BIAS)
            squares = tl.sum(full1 * full1, 1) + tl.sum(full2 * full2, 1)
            factor = (1.0 / tl.sqrt(squares / WIDTH + eps))[:, None]
            unit1, unit2 = full1 * factor, full2 * factor
            inner1 = first * tl.load(norm + at, mask=known, other=0.0).to(tl.float32)[None, :]
            inner2 = second * tl.load(norm + half + at, mask=known, other=0.0).to(tl.float32)[None, :]
            mean = ((tl.sum(inner1 * unit1, 1) + tl.sum(inner2 * unit2, 1)) / WIDTH)[:, None]
            first = (inner1 - unit1 * mean) * factor
            second = (inner2 - unit2 * mean) * factor
        if HAS_SCALE:
            first = first * scale1
            second = second * scale2
        goal = out + token * out_stride + place
        tl.store(goal, first.to(out.dtype.element_ty), mask=here)
        tl.store(goal + half, second.to(out.dtype.element_ty), mask=here)
        if HAS_SUMS:
            total1 += first * tl.load(row + place, mask=here, other=0.0).to(tl.float32)
            total2 += second * tl.load(row + half + place, mask=here, other=0.0).to(tl.float32)
    if HAS_SUMS:
        block = tl.program_id(0)
        store_sums_program(sums, magnitude, total1, place, inside, block, sums_stride)
        store_sums_program(sums + half, magnitude + half, total2, place, inside, block, sums_stride)


@triton.jit
def gate_program(both, scale, out, num_columns, both_stride, out_stride, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_columns
    gates = tl.load(both + row * both_stride + at, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(both + row * both_stride + num_columns + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        gates = gates * tl.load(scale + at, mask=inside, other=0.0)
        ups = ups * tl.load(scale + num_columns + at, mask=inside, other=0.0)
    tl.store(out + row * out_stride + at, (gates * tl.sigmoid(gates) * ups).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def gate_backward_program(
    grad, both, scale, magnitude, out, again, sums, num_rows, num_columns,
    grad_stride, both_stride, out_stride, again_stride, sums_stride,
    HAS_SCALE: tl.constexpr, HAS_SUMS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < num_columns
    if HAS_SCALE:
        scale_gate = tl.load(scale + at, mask=inside, other=0.0)[None, :]
        scale_up = tl.load(scale + num_columns + at, mask=inside, other=0.0)[None, :]
    total_gate = tl.zeros((STEP, COLUMNS), dtype=tl.float32)
    total_up = tl.zeros((STEP, COLUMNS), dtype=tl.float32)
    kind = out.dtype.element_ty
    for start in range(0, ROWS, STEP):
        row = (tl.program_id(0) * ROWS + start + tl.arange(0, STEP)).to(tl.int64)[:, None]
        here = (row < num_rows) & inside[None, :]
        place = both + row * both_stride + at[None, :]
        raw_gate = tl.load(place, mask=here, other=0.0).to(tl.float32)
        raw_up = tl.load(place + num_columns, mask=here, other=0.0).to(tl.float32)
        outer = tl.load(grad + row * grad_stride + at[None, :], mask=here, other=0.0).to(tl.float32)
        gates, ups = raw_gate, raw_up
        if HAS_SCALE:
            gates = raw_gate * scale_gate
            ups = raw_up * scale_up
        share = tl.sigmoid(gates)
        active = gates * share
        grad_gate = outer * ups * (share + active * (1.0 - share))
        grad_up = outer * active
        if HAS_SCALE:
            grad_gate = grad_gate * scale_gate
            grad_up = grad_up * scale_up
        goal = out + row * out_stride + at[None, :]
        tl.store(goal, grad_gate.to(kind), mask=here)
        tl.store(goal + num_columns, grad_up.to(kind), mask=here)
        kept = (active * ups).to(again.dtype.element_ty)
        tl.store(again + row * again_stride + at[None, :], kept, mask=here)
        if HAS_SUMS:
            total_gate += grad_gate * raw_gate
            total_up += grad_up * raw_up
    if HAS_SUMS:
        block, beside = tl.program_id(0), num_columns
        store_sums_program(sums, magnitude, tl.sum(total_gate, 0), at, inside, block, sums_stride)
        store_sums_program(sums + beside, magnitude + beside, tl.sum(total_up, 0), at, inside, block, sums_stride)


@triton.jit(do_not_specialize=["seed"])
def dropout_program(x, out, num_columns, stride, p, factor, seed, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_columns
    # A number's place in the matrix is its place in the stream of random numbers.
    kept = tl.rand(seed, row * num_columns + at) >= p
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
    # The first number of a pair is in the high half of the byte.
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


@triton.jit(do_not_specialize=["num_rows"])
def scale_grad_program(
    grad, branch, scale, magnitude, own, sums, num_rows, num_columns, grad_stride, branch_stride, sums_stride,
    ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < num_columns
    total = tl.zeros((STEP, COLUMNS), dtype=tl.float32)
    factor = tl.load(scale + at, mask=inside, other=0.0)
    for start in range(0, ROWS, STEP):
        row = (tl.program_id(0) * ROWS + start + tl.arange(0, STEP)).to(tl.int64)
        here = (row < num_rows)[:, None] & inside[None, :]
        a = tl.load(grad + row[:, None] * grad_stride + at[None, :], mask=here, other=0.0).to(tl.float32)
        rounded = (a * factor[None, :]).to(own.dtype.element_ty)
        tl.store(own + row[:, None] * num_columns + at[None, :], rounded, mask=here)
        b = tl.load(branch + row[:, None] * branch_stride + at[None, :], mask=here, other=0.0).to(tl.float32)
        total += rounded.to(tl.float32) * b
    store_sums_program(sums, magnitude, tl.sum(total, 0), at, inside, tl.program_id(0), sums_stride)


@triton.jit
def dora_scale_program(
    cross, b, gram, squares, magnitude, out, num_rows, layer_stride, b_stride, factor,
    ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    at = tl.arange(0, BLOCK)
    known = row < num_rows
    here = known[:, None] & (at < RANK)[None, :]
    start = b + layer * layer_stride + row * b_stride
    left = tl.load(start[:, None] + at[None, :], mask=here, other=0.0).to(tl.float32) * factor
    place = layer * num_rows + row
    products = tl.load(cross + place[:, None] * RANK + at[None, :], mask=here, other=0.0)
    total = tl.load(squares + place, mask=known, other=1.0) + 2.0 * tl.sum(products * left, 1)
    for column in range(RANK):
        mixed = tl.load(gram + (layer * RANK + column) * RANK + at, mask=at < RANK, other=0.0)
        mine = tl.load(start + column, mask=known, other=0.0).to(tl.float32) * factor
        total += mine * tl.sum(left * mixed[None, :], 1)
    norm = tl.sqrt(tl.maximum(total, 0.0))
    tl.store(out + place, tl.load(magnitude + place, mask=known, other=1.0) / norm, mask=known)
