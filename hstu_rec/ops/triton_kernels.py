"""The kernels of `hstu_rec.ops.triton`.

    forward             a program owns a block of queries of one user and head, and walks over the keys before
    backward            a program owns a block of keys and walks over the queries after; what it finds for
                        queries and bias tables is added to memory, where others add as well
    backward_queries    the same sums for queries and tables in one order: see triton_repeatable

Scores are made again in backward, so that nothing of size L^2 is ever held. Bias is looked up by distance,
where that of keys after the query is so low that their weights and all gradients are exactly 0, and by time
bucket, computed here. Softmax takes its tables times log2(e).
"""

# What is compiled by Triton is no Python to a type checker: a jitted function is called for its tensors.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

from typing import Any

import triton
import triton.language as tl

from hstu_rec.ops.triton_parts import (
    BUCKET_0,
    HISTOGRAM,
    NUM_BEFORE,
    add_to,
    bucket_range,
    distances,
    load_queries,
    load_rows,
    load_times,
    look_up_bias,
    place_of,
    row_addresses,
    score,
    sigmoid_of,
    store_rows,
    time_buckets,
    weights_and_grads,
)

# Tiles with at most so many time buckets are summed bucket by bucket before anything is added to memory.
FEW_BUCKETS = tl.constexpr(4)


@triton.jit
def _forward_tile(
    x, place, num_seen, q, now, rows, start, mixed, total, top,
    A: tl.constexpr, V: tl.constexpr, N: tl.constexpr, FAST: tl.constexpr,
    NATIVE: tl.constexpr, PRECISION: tl.constexpr, IS_LOOKED_UP: tl.constexpr,
):  # fmt: skip
    """(mixed, total, top) with the keys of a tile."""
    head = place[0]
    columns = start + tl.arange(0, N)
    k = load_rows(x.k, x.strides[1], x.head_strides[1], place, columns, x.attention_dim, A)
    v = load_rows(x.v, x.strides[2], x.head_strides[2], place, columns, x.value_dim, V)
    distance = distances(x, rows[:, None], columns[None, :], num_seen)
    buckets = distance
    if x.by_bucket is not None:
        then = load_times(x.then, x.num_events, place, columns)
        buckets = time_buckets(
            now[0][:, None] - then[0][None, :], now[1][:, None] - then[1][None, :], NATIVE
        )
    bias = look_up_bias(x, head, distance, buckets, IS_LOOKED_UP, NATIVE)
    scores = score(x, q, tl.trans(k), bias, PRECISION)
    if x.logsumexp is not None:
        # Every query sees the first key, so that no maximum is of nothing.
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        rest = tl.exp2(top - higher)
        total = total * rest + tl.sum(weights, 1)
        mixed *= rest[:, None]
        top = higher
    else:
        weights = scores * sigmoid_of(scores, FAST)
    mixed = tl.dot(weights.to(v.dtype), v, acc=mixed, input_precision=PRECISION)
    return mixed, total, top


@triton.jit
def forward(
    x: "Any",
    out: "Any",
    A: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    FAST: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    """Attention of a block of M queries, to `out` [T, H, V]; for softmax, also x.logsumexp, in base 2."""
    place, num_seen, begin, rows = place_of(x, M)
    head, first, length = place
    q = load_rows(x.q, x.strides[0], x.head_strides[0], place, rows, x.attention_dim, A)
    now = rows, rows
    if x.by_bucket is not None:
        now = load_times(x.now, x.num_events, place, rows)
    mixed = tl.zeros([M, V], dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    top = tl.full([M], -float("inf"), dtype=tl.float32)
    oldest = 0
    if HAS_WINDOW:
        oldest = tl.maximum(tl.minimum(begin, num_seen) - x.window + 1, 0) // N * N
    # Candidates are seen by themselves alone, on the diagonal.
    for start in range(oldest, tl.minimum(begin, num_seen), N):
        mixed, total, top = _forward_tile(
            x, place, num_seen, q, now, rows, start, mixed, total, top,
            A, V, N, FAST, NATIVE, PRECISION, HAS_POSITION or HAS_WINDOW or x.num_seen is not None,
        )  # fmt: skip
    for start in range(begin, tl.minimum(begin + M, length), N):
        mixed, total, top = _forward_tile(
            x, place, num_seen, q, now, rows, start, mixed, total, top,
            A, V, N, FAST, NATIVE, PRECISION, True,
        )  # fmt: skip
    if x.logsumexp is not None:
        mixed /= total[:, None]
        at = (first + rows) * x.num_heads + head
        tl.store(x.logsumexp + at, top + tl.log2(total), mask=rows < length)
    else:
        mixed *= x.scale
    store_rows(out, mixed, x.num_heads, place, rows, x.value_dim, V)


@triton.jit
def _thread_sums(tile, M: tl.constexpr, N: tl.constexpr):
    """[N / 16, 8, 4] sums of a tile [N, M] over what one thread holds of a product's result."""
    tile = tl.reshape(tile, [N // 16, 2, 8, M // 8, 4, 2])
    return tl.sum(tl.sum(tl.sum(tile, 5), 3), 1)


@triton.jit
def _add_time_grads(
    table, grads, buckets, low, high, M: tl.constexpr, N: tl.constexpr, NATIVE: tl.constexpr
):
    """Adds the sums over the buckets of a tile [N, M], which are within low..high, to a row of memory."""
    if high - low < FEW_BUCKETS:
        above = _thread_sums(grads, M, N)
        for count in tl.static_range(FEW_BUCKETS):
            bucket = low + count
            mine = above
            if count + 1 < FEW_BUCKETS:
                above = _thread_sums(tl.where(buckets > bucket, grads, 0.0), M, N)
                mine -= above
            add_to(table, bucket + tl.zeros(mine.shape, tl.int32), mine, NATIVE)
    else:
        add_to(table, buckets, grads, NATIVE)


@triton.jit
def _backward_tile(
    x, place, num_seen, k, v, then, columns, start, grads_k, grads_v, grad_q, by_distance, by_bucket,
    A: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FAST: tl.constexpr,
    NATIVE: tl.constexpr, PRECISION: tl.constexpr, IS_LOOKED_UP: tl.constexpr,
    HAS_POSITION: tl.constexpr, IS_REPEATABLE: tl.constexpr,
):  # fmt: skip
    """(grads_k, grads_v) with a tile's queries; the rest is added to memory. Tiles are [keys, queries]."""
    head = place[0]
    rows = start + tl.arange(0, M)
    q, grad_out, logsumexp, delta, now = load_queries(x, place, rows, A, V)
    distance = distances(x, rows[None, :], columns[:, None], num_seen)
    buckets = distance
    if x.by_bucket is not None:
        buckets = time_buckets(
            now[0][None, :] - then[0][:, None], now[1][None, :] - then[1][:, None], NATIVE
        )
    bias = look_up_bias(x, head, distance, buckets, IS_LOOKED_UP, NATIVE)
    scores = score(x, k, tl.trans(q), bias, PRECISION)
    grads = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
    if x.logsumexp is not None:
        logsumexp, delta = logsumexp[None, :], delta[None, :]
    weights, grads = weights_and_grads(x, scores, grads, logsumexp, delta, FAST)
    grads_v = tl.dot(weights.to(v.dtype), grad_out, acc=grads_v, input_precision=PRECISION)
    if HAS_POSITION and not IS_REPEATABLE:
        add_to(by_distance + NUM_BEFORE, distance, grads, NATIVE)
    if x.by_bucket is not None and not IS_REPEATABLE:
        low, high = bucket_range(now, then, NATIVE)
        _add_time_grads(by_bucket - BUCKET_0, grads, buckets, low, high, M, N, NATIVE)
    narrow = grads.to(k.dtype)
    grads_k = tl.dot(narrow, q, acc=grads_k, input_precision=PRECISION)
    if not IS_REPEATABLE:
        if M < 64:
            # As its transpose, whose 64 rows or more the tensor cores of Hopper take at once.
            grads_q = tl.trans(tl.dot(tl.trans(k), narrow, input_precision=PRECISION))
        else:
            grads_q = tl.dot(tl.trans(narrow), k, input_precision=PRECISION)
        at, is_inside = row_addresses(grad_q, x.num_heads, place, rows, x.attention_dim, A)
        tl.atomic_add(at, grads_q, mask=is_inside, sem="relaxed")
    return grads_k, grads_v


@triton.jit
def backward(
    x: "Any",
    grad_q: "Any",
    grad_k: "Any",
    grad_v: "Any",
    grad_distance: "Any",
    grad_bucket: "Any",
    num_distances: "Any",
    num_rows: "Any",
    A: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    FAST: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_REPEATABLE: tl.constexpr,
) -> None:
    """Gradients of a block of N keys and their values, and what it adds to those of queries and tables:
    float32 [T, H, A], and a row of [rows, num_distances] and [rows, HISTOGRAM], rows in turn a head's."""
    place, num_seen, begin, columns = place_of(x, N)
    length = place[2]
    k = load_rows(x.k, x.strides[1], x.head_strides[1], place, columns, x.attention_dim, A)
    v = load_rows(x.v, x.strides[2], x.head_strides[2], place, columns, x.value_dim, V)
    then = columns, columns
    if x.by_bucket is not None:
        then = load_times(x.then, x.num_events, place, columns)
    row = (tl.program_id(0) % num_rows).to(tl.int64)
    by_distance, by_bucket = grad_distance + row * num_distances, grad_bucket + row * HISTOGRAM
    grads_k = tl.zeros([N, A], dtype=tl.float32)
    grads_v = tl.zeros([N, V], dtype=tl.float32)
    for start in range(begin, tl.minimum(begin + N, length), M):
        grads_k, grads_v = _backward_tile(
            x, place, num_seen, k, v, then, columns, start, grads_k, grads_v, grad_q, by_distance,
            by_bucket, A, V, M, N, FAST, NATIVE, PRECISION, True, HAS_POSITION, IS_REPEATABLE,
        )  # fmt: skip
    end = length
    if HAS_WINDOW:
        end = tl.minimum(length, begin + N - 1 + x.window)
        if num_seen < end:
            end = length  # candidates, wherever they are, stand at `num_seen`
    if begin >= num_seen:
        end = begin  # a candidate is seen by itself alone
    for start in range(begin + N, end, M):
        grads_k, grads_v = _backward_tile(
            x, place, num_seen, k, v, then, columns, start, grads_k, grads_v, grad_q, by_distance,
            by_bucket, A, V, M, N, FAST, NATIVE, PRECISION,
            HAS_POSITION or HAS_WINDOW or x.num_seen is not None, HAS_POSITION, IS_REPEATABLE,
        )  # fmt: skip
    if x.logsumexp is None:
        grads_v *= x.scale
    store_rows(grad_k, grads_k, x.num_heads, place, columns, x.attention_dim, A)
    store_rows(grad_v, grads_v, x.num_heads, place, columns, x.value_dim, V)
