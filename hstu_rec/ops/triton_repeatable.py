"""Gradients of queries and bias tables with the same bits in every run.

A program owns a block of queries, and its sums come in one order. Those of keys and values are always so, in
`backward` of `hstu_rec.ops.triton_kernels`.
"""

# pyright: reportGeneralTypeIssues=false

from typing import Any

import triton
import triton.language as tl

from hstu_rec.ops.triton_bias import (
    BUCKET_0,
    HISTOGRAM,
    NUM_BEFORE,
    bucket_bias,
    load_times,
    position_bias,
    time_buckets,
)
from hstu_rec.ops.triton_parts import (
    distances,
    load_keys,
    load_queries,
    place_of,
    score,
    store_rows,
    weights_and_grads,
)


@triton.jit
def _add_position_grads(table, grads, distance, N: tl.constexpr):
    """Adds the sums over a tile's diagonals to `table`; `distance` is that of the tile's first entry.

    Two tiles at most share a distance, and a + b is b + a.
    """
    place = tl.arange(0, N)
    reached = place[:, None] + place[None, :]
    # Row m turned by m: the entries of a diagonal then stand in one column, two diagonals in each.
    turned = tl.gather(grads, reached % N, 1)
    for wrap in tl.static_range(2):
        sums = tl.sum(tl.where(reached // N == wrap, turned, 0.0), 0)
        tl.atomic_add(table + (distance + wrap * N - place + NUM_BEFORE), sums, sem="relaxed")


@triton.jit
def _add_target_grads(table, sums, distance):
    """Adds sums [N] over candidates to `table`: by distance from what they see, and of themselves."""
    is_event = distance > 0
    tl.atomic_add(table + (distance + NUM_BEFORE), sums, mask=is_event, sem="relaxed")
    tl.atomic_add(table + NUM_BEFORE, tl.sum(tl.where(is_event, 0.0, sums)), sem="relaxed")


@triton.jit
def _add_time_grads(histogram, grads, buckets, is_seen):
    """The sums by bucket, a tile's added, bucket after bucket of those that it touches."""
    place = tl.arange(0, HISTOGRAM)
    low = tl.min(tl.where(is_seen, buckets, BUCKET_0 + HISTOGRAM - 1))
    high = tl.max(tl.where(is_seen, buckets, BUCKET_0))
    for one in range(low, high + 1):
        sums = tl.sum(tl.where(buckets == one, grads, 0.0))
        histogram += tl.where(place == one - BUCKET_0, sums, 0.0)
    return histogram


@triton.jit
def backward_queries(
    x: "Any",
    q: "Any",
    k: "Any",
    v: "Any",
    grad_out: "Any",
    grad_q: "Any",
    grad_distance: "Any",
    grad_bucket: "Any",
    num_distances: "Any",
    A: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    FAST: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    """Gradients of a block of N queries, and of the tables, a row of each for every program."""
    place, num_seen, begin, rows = place_of(x, N)
    head, _first, length = place
    queries = load_queries(x, (q, grad_out), place, begin, A, V, N, False)
    query, out_grads, logsumexp, delta, now = queries
    if x.logsumexp is not None:
        logsumexp, delta = logsumexp[:, None], delta[:, None]
    grads_q = tl.zeros([N, A], dtype=tl.float32)
    histogram = tl.zeros([HISTOGRAM], dtype=tl.float32)
    for start in range(0, begin + N, N):
        columns = start + tl.arange(0, N)
        key, value = load_keys(x, (k, v), place, start, A, V, N, False)
        distance = distances(x, rows[:, None], columns[None, :], num_seen)
        bias, buckets = position_bias(x, head, distance, True, NATIVE), distance
        if x.by_bucket is not None:
            seconds = now[:, None] - load_times(x.then, place, columns)[None, :]
            buckets = time_buckets(seconds.to(tl.float32), NATIVE)
            bias += bucket_bias(x, head, buckets, NATIVE)
        scores = score(x, query, tl.trans(key), bias, PRECISION)
        grads = tl.dot(out_grads, tl.trans(value), input_precision=PRECISION)
        _, grads = weights_and_grads(x, scores, grads, logsumexp, delta, FAST)
        grads_q = tl.dot(grads.to(key.dtype), key, acc=grads_q, input_precision=PRECISION)
        if HAS_POSITION:
            row = grad_distance + tl.program_id(0).to(tl.int64) * num_distances
            of_events = grads
            if x.num_seen is not None:
                # In rows of their own: three sums at one distance would depend on their order.
                other = row + tl.num_programs(0).to(tl.int64) * num_distances
                is_target = rows[:, None] >= num_seen
                of_targets = tl.sum(tl.where(is_target, grads, 0.0), 0)
                _add_target_grads(other, of_targets, num_seen - columns)
                of_events = tl.where(is_target, 0.0, grads)
            _add_position_grads(row, of_events, begin - start, N)
        if x.by_bucket is not None:
            is_seen = (distance >= 0) & (rows[:, None] < length)
            histogram = _add_time_grads(histogram, grads, buckets, is_seen)
    store_rows(grad_q, grads_q, x.num_heads, place, rows, x.attention_dim, A)
    if x.by_bucket is not None:
        row = tl.program_id(0).to(tl.int64) * HISTOGRAM
        tl.store(grad_bucket + row + tl.arange(0, HISTOGRAM), histogram)
