"""What the GPU runs for DoRA, launched by ``triton_kernels``: factors, and backward passes that take magnitudes along.

The gradient of a magnitude is a sum over the tokens. A program adds up a block of them; torch adds the blocks, so that
results repeat. The number of tokens changes from batch to batch: it is not specialised, since each kind of it (a
multiple of 16, or not) would cost a second of compilation in the midst of training.
"""
# mypy: ignore-errors
# ruff: noqa: N803, D103 - what each does stands at the function of the same name in plain_kernels

import triton
import triton.language as tl

from fintune.training.fused.triton_programs import kind_program, load_heads_program, load_turn_program


@triton.jit
def store_sums_program(sums, magnitude, total, at, inside, row, sums_stride):
    values = tl.load(magnitude + at, mask=inside, other=1.0)
    tl.store(sums + row * sums_stride + at, total / values, mask=inside)


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


@triton.jit(do_not_specialize=["num_rows"])
def gate_backward_dora_program(
    grad, both, scale, magnitude, out, again, sums, num_rows, num_columns,
    grad_stride, both_stride, out_stride, again_stride, sums_stride,
    ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < num_columns
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
        gates = raw_gate * scale_gate
        ups = raw_up * scale_up
        share = tl.sigmoid(gates)
        active = gates * share
        grad_gate = outer * ups * (share + active * (1.0 - share)) * scale_gate
        grad_up = outer * active * scale_up
        goal = out + row * out_stride + at[None, :]
        tl.store(goal, grad_gate.to(kind), mask=here)
        tl.store(goal + num_columns, grad_up.to(kind), mask=here)
        kept = (active * ups).to(again.dtype.element_ty)
        tl.store(again + row * again_stride + at[None, :], kept, mask=here)
        total_gate += grad_gate * raw_gate
        total_up += grad_up * raw_up
    block = tl.program_id(0)
    store_sums_program(sums, magnitude, tl.sum(total_gate, 0), at, inside, block, sums_stride)
    beside = num_columns
    store_sums_program(sums + beside, magnitude + beside, tl.sum(total_up, 0), at, inside, block, sums_stride)


@triton.jit(do_not_specialize=["num_tokens"])
def join_heads_dora_program(
    queries, keys, values, qkv, scale, bias, magnitude, query_norm, key_norm, cos, sin, out, sums,
    num_tokens, qkv_stride, out_stride, sums_stride, num_queries, num_keys, eps,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    WIDTH: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    grad, first_head, num_heads, start = kind_program(queries, keys, values, num_queries, num_keys, HEADS)
    head = start + tl.arange(0, HEADS)
    at = tl.arange(0, HALF)
    known = at < WIDTH // 2
    inside = (head < num_heads)[:, None] & known[None, :]
    place = (first_head + head)[:, None] * WIDTH + at[None, :]
    turns = first_head <= num_queries
    scale1 = tl.load(scale + place, mask=inside, other=0.0)
    scale2 = tl.load(scale + WIDTH // 2 + place, mask=inside, other=0.0)
    total1 = tl.zeros((HEADS, HALF), dtype=tl.float32)
    total2 = tl.zeros((HEADS, HALF), dtype=tl.float32)
    for step in range(ROWS):
        wanted = (tl.program_id(0) * ROWS + step).to(tl.int64)
        here = inside & (place * 0 + wanted < num_tokens)
        token = tl.minimum(wanted, num_tokens - 1)
        source = grad + (token * num_heads + head)[:, None] * WIDTH + at[None, :]
        first = tl.load(source, mask=here, other=0.0).to(tl.float32)
        second = tl.load(source + WIDTH // 2, mask=here, other=0.0).to(tl.float32)
        row = qkv + token * qkv_stride
        raw1 = tl.load(row + place, mask=here, other=0.0).to(tl.float32)
        raw2 = tl.load(row + WIDTH // 2 + place, mask=here, other=0.0).to(tl.float32)
        if turns:
            cos1, cos2, sin1, sin2 = load_turn_program(cos, sin, token, at, known, WIDTH)
            back = first * cos1 + second * sin2
            second = second * cos2 - first * sin1
            first = back
        if HAS_NORM and turns:
            norm = query_norm if first_head == 0 else key_norm
            full1, full2 = load_heads_program(row, scale, bias, place, here, WIDTH // 2, True, HAS_BIAS)
            squares = tl.sum(full1 * full1, 1) + tl.sum(full2 * full2, 1)
            factor = (1.0 / tl.sqrt(squares / WIDTH + eps))[:, None]
            unit1, unit2 = full1 * factor, full2 * factor
            inner1 = first * tl.load(norm + at, mask=known, other=0.0).to(tl.float32)[None, :]
            inner2 = second * tl.load(norm + WIDTH // 2 + at, mask=known, other=0.0).to(tl.float32)[None, :]
            mean = ((tl.sum(inner1 * unit1, 1) + tl.sum(inner2 * unit2, 1)) / WIDTH)[:, None]
            first = (inner1 - unit1 * mean) * factor
            second = (inner2 - unit2 * mean) * factor
        first = first * scale1
        second = second * scale2
        goal = out + token * out_stride + place
        tl.store(goal, first.to(out.dtype.element_ty), mask=here)
        tl.store(goal + WIDTH // 2, second.to(out.dtype.element_ty), mask=here)
        total1 += first * raw1
        total2 += second * raw2
    block = tl.program_id(0)
    store_sums_program(sums, magnitude, total1, place, inside, block, sums_stride)
    half = WIDTH // 2
    store_sums_program(sums + half, magnitude + half, total2, place, inside, block, sums_stride)


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
