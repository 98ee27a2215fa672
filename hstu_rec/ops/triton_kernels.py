"""The kernels of `hstu_rec.ops.triton`.

    forward    a program owns a block of queries of one user and head, and walks over the keys before them
    backward   the same for the queries' gradients and those of the bias tables; then programs that own a
               block of keys walk over the queries after them

Scores are made again in backward, so that nothing of size L^2 is ever held; bias is looked up from
distances and from times, whose buckets are computed where they are needed. Of a tile's bias gradients
only sums leave the program: those of its diagonals, and those of the few time buckets it touches.
"""

# What is compiled by Triton is no Python to a type checker: a jitted function is called for its tensors.
# pyright: reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hstu_rec.ops.reference import NUM_TIME_BUCKETS, TIME_BUCKET_WIDTH

WIDTH = tl.constexpr(TIME_BUCKET_WIDTH)
LAST_BUCKET = tl.constexpr(NUM_TIME_BUCKETS - 1)
# The next power of 2 above the number of buckets.
HISTOGRAM = tl.constexpr(256)


class Inputs(NamedTuple):
    """What every kernel reads. Tensors are pointers there, and None is known when it is compiled."""

    q: Any  # [T, H, A], the last dimension contiguous
    k: Any
    v: Any  # [T, H, V]
    grad_out: Any  # [T, H, V] contiguous; None in forward
    logsumexp: Any  # float32 [T, H] of the scores, which forward writes; None for silu
    delta: Any  # float32 [T, H], sum of out * grad_out; None in forward and for silu
    offsets: Any
    users: Any  # of the blocks that programs own
    begins: Any
    now: Any
    then: Any
    position_bias: Any  # [1 or H, P]
    time_bias: Any  # [1 or H, buckets]
    strides: Any  # of an event in q, k, v
    head_strides: Any  # of a head in q, k, v
    bias_strides: Any  # of a head in position_bias, time_bias; 0 where heads share a table
    num_positions: Any
    num_heads: Any
    attention_dim: Any
    value_dim: Any
    scale: Any


@triton.jit
def _place(x, N: tl.constexpr):
    """(head, first event of the user, number of them, the block's events) of this program."""
    block = tl.program_id(0) // x.num_heads
    user = tl.load(x.users + block)
    first = tl.load(x.offsets + user)
    length = (tl.load(x.offsets + user + 1) - first).to(tl.int32)
    events = tl.load(x.begins + block) + tl.arange(0, N)
    return tl.program_id(0) % x.num_heads, first, length, events


@triton.jit
def _load(tensor, stride, head_stride, place, events, width, W: tl.constexpr):
    """[N, W]: events of this program's user and head, 0 beyond its length and `width`."""
    head, first, length = place
    column = tl.arange(0, W)
    at = (first + events).to(tl.int64)[:, None] * stride + head * head_stride + column[None, :]
    is_inside = (events[:, None] < length) & (column[None, :] < width)
    return tl.load(tensor + at, mask=is_inside, other=0.0)


@triton.jit
def _store(tensor, values, num_heads, place, events, width, W: tl.constexpr):
    """Writes `values` [N, W] to a contiguous [T, H, width]."""
    head, first, length = place
    column = tl.arange(0, W)
    at = ((first + events).to(tl.int64)[:, None] * num_heads + head) * width + column[None, :]
    is_inside = (events[:, None] < length) & (column[None, :] < width)
    tl.store(tensor + at, values.to(tensor.dtype.element_ty), mask=is_inside)


@triton.jit
def _queries(x, place, rows, A: tl.constexpr):
    """(q, now) of a block of queries; now means nothing without time bias."""
    _head, first, length = place
    q = _load(x.q, x.strides[0], x.head_strides[0], place, rows, x.attention_dim, A)
    now = rows
    if x.time_bias is not None:
        now = tl.load(x.now + first + rows, mask=rows < length, other=0)
    return q, now


@triton.jit
def _keys(x, place, columns, A: tl.constexpr, V: tl.constexpr):
    """(k, v, then) of a block of keys; then means nothing without time bias."""
    _head, first, length = place
    k = _load(x.k, x.strides[1], x.head_strides[1], place, columns, x.attention_dim, A)
    v = _load(x.v, x.strides[2], x.head_strides[2], place, columns, x.value_dim, V)
    then = columns
    if x.time_bias is not None:
        then = tl.load(x.then + first + columns, mask=columns < length, other=0)
    return k, v, then


@triton.jit
def _scores(x, head, q, k, now, then, rows, columns, PRECISION: tl.constexpr):
    """(float32 [M, N] q k^T + bias, bool [M, N] whether a key is seen, int32 [M, N] time buckets)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if x.logsumexp is not None:
        scores *= x.scale
    distance = rows[:, None] - columns[None, :]
    if x.position_bias is not None:
        at = tl.minimum(tl.maximum(distance, 0), x.num_positions - 1)
        scores += tl.load(x.position_bias + head * x.bias_strides[0] + at).to(tl.float32)
    bucket = distance
    if x.time_bias is not None:
        seconds = tl.maximum(tl.abs(now[:, None] - then[None, :]), 1).to(tl.float32)
        bucket = tl.minimum((tl.log(seconds) / WIDTH).to(tl.int32), LAST_BUCKET)
        scores += tl.load(x.time_bias + head * x.bias_strides[1] + bucket).to(tl.float32)
    return scores, distance >= 0, bucket


@triton.jit
def _row_sums(x, place, rows):
    """(logsumexp, delta) of a block of queries; they mean nothing for silu."""
    head, first, length = place
    logsumexp, delta = rows, rows
    if x.logsumexp is not None:
        at = (first + rows) * x.num_heads + head
        logsumexp = tl.load(x.logsumexp + at, mask=rows < length, other=0.0)
        delta = tl.load(x.delta + at, mask=rows < length, other=0.0)
    return logsumexp, delta


@triton.jit
def _score_grads(x, scores, grad_out, v, is_seen, logsumexp, delta, PRECISION: tl.constexpr):
    """(weights, gradient of the scores), float32 [M, N]; 0 where a key is not seen."""
    grads = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    if x.logsumexp is not None:
        weights = tl.where(is_seen, tl.exp(scores - logsumexp[:, None]), 0.0)
        grads = weights * (grads - delta[:, None])
    else:
        gate = tl.sigmoid(scores)
        weights = tl.where(is_seen, scores * gate, 0.0)
        slope = gate * (1.0 + scores * (1.0 - gate))
        grads = tl.where(is_seen, grads * x.scale * slope, 0.0)
    return weights, grads


@triton.jit
def _add_position_grads(table, grads, distance, num_positions, N: tl.constexpr):
    """Adds the sums over a tile's diagonals to `table`; `distance` is that of the tile's first entry."""
    place = tl.arange(0, N)
    reached = place[:, None] + place[None, :]
    # Row m turned by m: the entries of a diagonal then stand in one column, two diagonals in each.
    turned = tl.gather(grads, reached % N, 1)
    for wrap in tl.static_range(2):
        sums = tl.sum(tl.where(reached // N == wrap, turned, 0.0), 0)
        at = distance + wrap * N - place
        tl.atomic_add(table + tl.minimum(at, num_positions - 1), sums, mask=at >= 0)


@triton.jit
def _add_time_grads(histogram, grads, bucket, is_seen):
    """The sums by bucket, a tile's added, bucket after bucket of those that it touches."""
    place = tl.arange(0, HISTOGRAM)
    low = tl.min(tl.where(is_seen, bucket, LAST_BUCKET))
    high = tl.max(tl.where(is_seen, bucket, 0))
    for one in range(low, high + 1):
        histogram += tl.where(place == one, tl.sum(tl.where(bucket == one, grads, 0.0)), 0.0)
    return histogram


@triton.jit
def forward(
    x: "Any",
    out: "Any",
    A: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Attention of a block of queries, to `out` [T, H, V]; for softmax, also x.logsumexp."""
    head, first, length, rows = _place(x, N)
    place = head, first, length
    q, now = _queries(x, place, rows, A)
    mixed = tl.zeros([N, V], dtype=tl.float32)
    total = tl.zeros([N], dtype=tl.float32)
    top = tl.full([N], -float("inf"), dtype=tl.float32)
    for start in range(0, tl.min(rows) + N, N):
        columns = start + tl.arange(0, N)
        k, v, then = _keys(x, place, columns, A, V)
        scores, is_seen, _ = _scores(x, head, q, k, now, then, rows, columns, PRECISION)
        if x.logsumexp is not None:
            # Every query sees the first key, so that no maximum is of nothing.
            higher = tl.maximum(top, tl.max(tl.where(is_seen, scores, -float("inf")), 1))
            weights = tl.where(is_seen, tl.exp(scores - higher[:, None]), 0.0)
            rest = tl.exp(top - higher)
            total = total * rest + tl.sum(weights, 1)
            mixed *= rest[:, None]
            top = higher
        else:
            weights = tl.where(is_seen, scores * tl.sigmoid(scores), 0.0)
        mixed += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    if x.logsumexp is not None:
        mixed /= total[:, None]
        at = (first + rows) * x.num_heads + head
        tl.store(x.logsumexp + at, top + tl.log(total), mask=rows < length)
    else:
        mixed *= x.scale
    _store(out, mixed, x.num_heads, place, rows, x.value_dim, V)


@triton.jit
def backward_queries(
    x: "Any",
    grad_q: "Any",
    grad_position: "Any",
    grad_time: "Any",
    A: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_OWN_ROW: tl.constexpr,
) -> None:
    """Gradients of a block of queries, and what it adds to those of the bias tables: float32 sums, by atomic
    additions to `grad_position`, laid out as the table is or with a row for every program, and in a row of
    `grad_time` [programs, HISTOGRAM]."""
    head, first, length, rows = _place(x, N)
    place = head, first, length
    q, now = _queries(x, place, rows, A)
    stride = x.num_heads * x.value_dim
    grad_out = _load(x.grad_out, stride, x.value_dim, place, rows, x.value_dim, V)
    logsumexp, delta = _row_sums(x, place, rows)
    grads_q = tl.zeros([N, A], dtype=tl.float32)
    histogram = tl.zeros([HISTOGRAM], dtype=tl.float32)
    begin = tl.min(rows)
    for start in range(0, begin + N, N):
        columns = start + tl.arange(0, N)
        k, v, then = _keys(x, place, columns, A, V)
        scores, is_seen, bucket = _scores(x, head, q, k, now, then, rows, columns, PRECISION)
        is_seen = is_seen & (rows[:, None] < length)
        _, grads = _score_grads(x, scores, grad_out, v, is_seen, logsumexp, delta, PRECISION)
        grads_q += tl.dot(grads.to(k.dtype), k, input_precision=PRECISION)
        if x.position_bias is not None:
            row = head * x.bias_strides[0]
            if HAS_OWN_ROW:
                row = tl.program_id(0) * x.num_positions
            table = grad_position + row
            _add_position_grads(table, grads, begin - start, x.num_positions, N)
        if x.time_bias is not None:
            histogram = _add_time_grads(histogram, grads, bucket, is_seen)
    if x.logsumexp is not None:
        grads_q *= x.scale
    _store(grad_q, grads_q, x.num_heads, place, rows, x.attention_dim, A)
    if x.time_bias is not None:
        tl.store(grad_time + tl.program_id(0) * HISTOGRAM + tl.arange(0, HISTOGRAM), histogram)


@triton.jit
def backward_keys(
    x: "Any",
    grad_k: "Any",
    grad_v: "Any",
    A: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Gradients of a block of keys and of their values."""
    head, first, length, columns = _place(x, N)
    place = head, first, length
    k, v, then = _keys(x, place, columns, A, V)
    stride = x.num_heads * x.value_dim
    grads_k = tl.zeros([N, A], dtype=tl.float32)
    grads_v = tl.zeros([N, V], dtype=tl.float32)
    for start in range(tl.min(columns), length, N):
        rows = start + tl.arange(0, N)
        q, now = _queries(x, place, rows, A)
        grad_out = _load(x.grad_out, stride, x.value_dim, place, rows, x.value_dim, V)
        scores, is_seen, _ = _scores(x, head, q, k, now, then, rows, columns, PRECISION)
        logsumexp, delta = _row_sums(x, place, rows)
        weights, grads = _score_grads(x, scores, grad_out, v, is_seen, logsumexp, delta, PRECISION)
        grads_v += tl.dot(tl.trans(weights.to(v.dtype)), grad_out, input_precision=PRECISION)
        grads_k += tl.dot(tl.trans(grads.to(q.dtype)), q, input_precision=PRECISION)
    if x.logsumexp is not None:
        grads_k *= x.scale
    else:
        grads_v *= x.scale
    _store(grad_k, grads_k, x.num_heads, place, columns, x.attention_dim, A)
    _store(grad_v, grads_v, x.num_heads, place, columns, x.value_dim, V)
