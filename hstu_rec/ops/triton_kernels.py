"""The kernels of `hstu_rec.ops.triton`.

    forward             a program owns a block of queries of one user and head, and walks over the keys before
    backward            a program owns a block of keys and walks over the queries after; what it finds for
                        queries and bias tables is added to memory, where others add as well
    query_grads         as forward, for the gradients of wide heads' queries: then `backward` runs for keys
                        and for values apart, so that each program holds one sum of that width
    backward_queries    sums for queries and tables in one order: see triton_repeatable

Scores are made again in backward, so that nothing of size L^2 is ever held. Bias is looked up by distance,
where that of keys after the query is so low that their weights and all gradients are exactly 0, and by time
bucket, computed here. Softmax takes its tables times log2(e).
"""

# What is compiled by Triton is no Python to a type checker: a jitted function is called for its tensors.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

from typing import Any

import triton
import triton.language as tl

from hstu_rec.ops.triton_bias import (
    HISTOGRAM,
    POSITION_LANES,
    TIME_LANES,
    add_position_grads,
    add_sums,
    add_time_bias,
    add_time_grads,
    load_times,
    no_buckets,
    no_sums,
    position_bias,
    tile_buckets,
    time_ends,
)
from hstu_rec.ops.triton_parts import (
    distances,
    load_keys,
    load_queries,
    load_rows,
    place_of,
    row_addresses,
    score,
    sigmoid_of,
    store_rows,
    weights_and_grads,
)


@triton.jit
def _first_keys(
    x, place, num_seen, begin, M: tl.constexpr, N: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """(first key that a block of M queries meets, `time_ends` of the block and of the first N keys, buckets
    before any tile)."""
    oldest, ends, key_ends, buckets = 0, 0, 0, 0
    if HAS_WINDOW:
        oldest = tl.maximum(tl.minimum(begin, num_seen) - x.window + 1, 0) // N * N
    if x.by_bucket is not None:
        ends, buckets = time_ends(x.now, place, begin, M), no_buckets(x)
        key_ends = time_ends(x.then, place, oldest, N)
    return oldest, ends, key_ends, buckets


@triton.jit
def _bias_of_keys(
    x, place, num_seen, now, is_far, buckets, rows, start,
    N: tl.constexpr, NATIVE: tl.constexpr, IS_LOOKED_UP: tl.constexpr, CAN_BE_FAR: tl.constexpr,
):  # fmt: skip
    """float32 tile [queries, N keys from `start` on]."""
    columns = start + tl.arange(0, N)
    distance = distances(x, rows[:, None], columns[None, :], num_seen)
    bias = position_bias(x, place[0], distance, IS_LOOKED_UP, NATIVE)
    if x.by_bucket is not None:
        then = load_times(x.then, place, columns)
        bias = add_time_bias(
            x, place[0], bias, now[:, None], then[None, :], is_far, buckets, CAN_BE_FAR, NATIVE
        )
    return bias


@triton.jit
def _forward_tile(
    x, keys, place, num_seen, q, now, is_far, buckets, rows, start, mixed, total, top,
    A: tl.constexpr, V: tl.constexpr, N: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, IS_LOOKED_UP: tl.constexpr, CAN_BE_FAR: tl.constexpr,
):  # fmt: skip
    """(mixed, total, top) with the keys of a tile."""
    k, v = load_keys(x, keys, place, start, A, V, N, TMA)
    bias = _bias_of_keys(
        x, place, num_seen, now, is_far, buckets, rows, start, N, NATIVE, IS_LOOKED_UP, CAN_BE_FAR
    )
    scores = score(x, q, tl.trans(k), bias, PRECISION)
    if x.logsumexp is not None:
        # A tile of hidden keys alone, as a window has, adds weights that vanish beside the diagonal's: what
        # hides them is finite.
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
    x: "Any", q: "Any", k: "Any", v: "Any", out: "Any",
    A: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FAST: tl.constexpr,
    NATIVE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, HAS_POSITION: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:  # fmt: skip
    """Attention of a block of M queries, to `out` [T, H, V]; for softmax, also x.logsumexp, in base 2."""
    place, num_seen, begin, rows = place_of(x, M)
    head, first, length = place
    q = load_rows(q, x.strides[0], x.head_strides[0], place, begin, x.attention_dim, M, A, TMA)
    now = rows
    if x.by_bucket is not None:
        now = load_times(x.now, place, rows)
    mixed = tl.zeros([M, V], dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    top = tl.full([M], -float("inf"), dtype=tl.float32)
    oldest, ends, key_ends, buckets = _first_keys(x, place, num_seen, begin, M, N, HAS_WINDOW)
    # Candidates are seen by themselves alone, on the diagonal.
    for start in range(oldest, tl.minimum(begin, num_seen), N):
        is_far = False
        if x.by_bucket is not None:
            is_far, _, buckets = tile_buckets(x, head, buckets, ends, key_ends, NATIVE)
            key_ends = time_ends(x.then, place, start + N, N)  # a tile early, so that nothing waits
        mixed, total, top = _forward_tile(
            x, (k, v), place, num_seen, q, now, is_far, buckets, rows, start, mixed, total, top, A, V, N,
            FAST, NATIVE, TMA, PRECISION, HAS_POSITION or HAS_WINDOW or x.num_seen is not None, True,
        )  # fmt: skip
    for start in range(begin, tl.minimum(begin + M, length), N):
        mixed, total, top = _forward_tile(
            x, (k, v), place, num_seen, q, now, False, buckets, rows, start, mixed, total, top, A, V, N,
            FAST, NATIVE, TMA, PRECISION, True, False,
        )  # fmt: skip
    if x.logsumexp is not None:
        mixed /= total[:, None]
        at = (first + rows) * x.num_heads + head
        tl.store(x.logsumexp + at, top + tl.log2(total), mask=rows < length)
    else:
        mixed *= x.scale
    store_rows(out, mixed, x.num_heads, place, rows, x.value_dim, V)


@triton.jit
def _query_tile(
    x, keys, place, num_seen, queries, is_far, buckets, rows, start, grads_q,
    A: tl.constexpr, V: tl.constexpr, N: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, IS_LOOKED_UP: tl.constexpr, CAN_BE_FAR: tl.constexpr,
):  # fmt: skip
    """grads_q with the keys of a tile; `queries` are what `load_queries` gave."""
    q, grad_out, logsumexp, delta, now = queries
    k, v = load_keys(x, keys, place, start, A, V, N, TMA)
    bias = _bias_of_keys(
        x, place, num_seen, now, is_far, buckets, rows, start, N, NATIVE, IS_LOOKED_UP, CAN_BE_FAR
    )
    scores = score(x, q, tl.trans(k), bias, PRECISION)
    grads = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    if x.logsumexp is not None:
        logsumexp, delta = logsumexp[:, None], delta[:, None]
    _, grads = weights_and_grads(x, scores, grads, logsumexp, delta, FAST)
    return tl.dot(grads.to(k.dtype), k, acc=grads_q, input_precision=PRECISION)


@triton.jit
def query_grads(
    x: "Any", q: "Any", k: "Any", v: "Any", grad_out: "Any", grad_q: "Any",
    A: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FAST: tl.constexpr,
    NATIVE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, HAS_POSITION: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of a block of M queries, to `grad_q` [T, H, A]."""
    place, num_seen, begin, rows = place_of(x, M)
    head, _first, length = place
    queries = load_queries(x, (q, grad_out), place, begin, A, V, M, TMA)
    grads_q = tl.zeros([M, A], dtype=tl.float32)
    oldest, ends, key_ends, buckets = _first_keys(x, place, num_seen, begin, M, N, HAS_WINDOW)
    for start in range(oldest, tl.minimum(begin, num_seen), N):
        is_far = False
        if x.by_bucket is not None:
            is_far, _, buckets = tile_buckets(x, head, buckets, ends, key_ends, NATIVE)
            key_ends = time_ends(x.then, place, start + N, N)
        grads_q = _query_tile(
            x, (k, v), place, num_seen, queries, is_far, buckets, rows, start, grads_q, A, V, N, FAST,
            NATIVE, TMA, PRECISION, HAS_POSITION or HAS_WINDOW or x.num_seen is not None, True,
        )  # fmt: skip
    for start in range(begin, tl.minimum(begin + M, length), N):
        grads_q = _query_tile(
            x, (k, v), place, num_seen, queries, False, buckets, rows, start, grads_q, A, V, N, FAST,
            NATIVE, TMA, PRECISION, True, False,
        )  # fmt: skip
    store_rows(grad_q, grads_q, x.num_heads, place, rows, x.attention_dim, A)


@triton.jit
def _add_query_grads(
    x, place, start, k, grads, grad_q,
    A: tl.constexpr, M: tl.constexpr, TMA_SUM: tl.constexpr, PRECISION: tl.constexpr,
    IS_ALONE: tl.constexpr,
):  # fmt: skip
    """Adds a tile's [keys, queries] gradients times its keys to memory, or writes them."""
    if M < 64:
        # As its transpose, whose 64 rows or more the tensor cores of Hopper take at once.
        grads_q = tl.trans(tl.dot(tl.trans(k), grads, input_precision=PRECISION))
    else:
        grads_q = tl.dot(tl.trans(grads), k, input_precision=PRECISION)
    if TMA_SUM and not IS_ALONE:
        # Beyond the user's length it adds 0.
        head, first, _length = place
        grad_q.atomic_add([(first + start).to(tl.int32), head * A], grads_q)
    else:
        rows = start + tl.arange(0, M)
        at, is_inside = row_addresses(grad_q, x.num_heads, place, rows, x.attention_dim, A)
        if IS_ALONE:
            tl.store(at, grads_q.to(grad_q.dtype.element_ty), mask=is_inside)
        else:
            tl.atomic_add(at, grads_q, mask=is_inside, sem="relaxed")


@triton.jit
def _backward_tile(
    x, queries, place, num_seen, k, v, then, is_far, most, buckets, sums, columns, start, grads_k, grads_v,
    grad_q, by_distance, num_distances, by_bucket,
    A: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FAST: tl.constexpr,
    NATIVE: tl.constexpr, TMA: tl.constexpr, TMA_SUM: tl.constexpr, ONCE: tl.constexpr,
    PRECISION: tl.constexpr, IS_LOOKED_UP: tl.constexpr, CAN_BE_FAR: tl.constexpr,
    HAS_POSITION: tl.constexpr, IS_ALONE: tl.constexpr, IS_REPEATABLE: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """(grads_k, grads_v, sums) with a tile's queries; the rest is added to memory. Tiles are
    [keys, queries]."""
    head, _first, length = place
    rows = start + tl.arange(0, M)
    q, grad_out, logsumexp, delta, now = load_queries(x, queries, place, start, A, V, M, TMA)
    distance = distances(x, rows[None, :], columns[:, None], num_seen)
    bias = position_bias(x, head, distance, IS_LOOKED_UP, NATIVE)
    if TMA:
        bias += tl.where(rows < length, 0.0, -1e30)[None, :]  # those of the next user
    later, earlier = now, then
    if x.by_bucket is not None:
        later, earlier = now[None, :], then[:, None]
        bias = add_time_bias(x, head, bias, later, earlier, is_far, buckets, CAN_BE_FAR, NATIVE)
    scores = score(x, k, tl.trans(q), bias, PRECISION)
    grads = scores
    if PART != "values":
        grads = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
    if x.logsumexp is not None:
        logsumexp, delta = logsumexp[None, :], delta[None, :]
    weights, grads = weights_and_grads(x, scores, grads, logsumexp, delta, FAST)
    if PART != "keys":
        grads_v = tl.dot(weights.to(v.dtype), grad_out, acc=grads_v, input_precision=PRECISION)
    if PART != "values":
        if HAS_POSITION and not IS_REPEATABLE:
            lanes = columns[:, None]
            add_position_grads(x, by_distance, grads, distance, lanes, num_distances, ONCE)
        if x.by_bucket is not None and not IS_REPEATABLE:
            sums = add_time_grads(
                by_bucket, sums, grads, later, earlier, is_far, most, buckets, N, M, CAN_BE_FAR, ONCE, NATIVE
            )  # fmt: skip
        narrow = grads.to(k.dtype)
        grads_k = tl.dot(narrow, q, acc=grads_k, input_precision=PRECISION)
        if PART == "all" and not IS_REPEATABLE:
            _add_query_grads(x, place, start, k, narrow, grad_q, A, M, TMA_SUM, PRECISION, IS_ALONE)
    return grads_k, grads_v, sums


@triton.jit
def _last_query(x, place, num_seen, begin, N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Where the queries end that see any of N keys from `begin` on, beyond the block itself."""
    length = place[2]
    end = length
    if HAS_WINDOW:
        end = tl.minimum(length, begin + N - 1 + x.window)
        if num_seen < end:
            end = length  # candidates, wherever they are, stand at `num_seen`
    if begin >= num_seen:
        end = begin  # a candidate is seen by itself alone
    return end


@triton.jit
def backward(
    x: "Any", q: "Any", k: "Any", v: "Any", grad_out: "Any", grad_q: "Any", grad_k: "Any", grad_v: "Any",
    grad_distance: "Any", grad_bucket: "Any", num_distances: "Any", num_rows: "Any",
    A: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FAST: tl.constexpr,
    NATIVE: tl.constexpr, TMA: tl.constexpr, TMA_SUM: tl.constexpr, ONCE: tl.constexpr,
    PRECISION: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_WINDOW: tl.constexpr,
    IS_ALONE: tl.constexpr, IS_REPEATABLE: tl.constexpr, PART: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of a block of N keys and their values, and what it adds to those of queries and tables:
    float32 [T, H, A] (IS_ALONE: writes, where no history has another block), and the lanes of a row of
    [rows, POSITION_LANES, num_distances] and [rows, TIME_LANES, HISTOGRAM], rows in turn a head's.

    PART: all; keys, with what is added to tables; or values.
    TMA: q, k, v, grad_out are descriptors. TMA_SUM: grad_q is, unless IS_ALONE or IS_REPEATABLE.
    """
    place, num_seen, begin, columns = place_of(x, N)
    head, _first, length = place
    k, v = load_keys(x, (k, v), place, begin, A, V, N, TMA)
    then, ends, query_ends, buckets = columns, 0, 0, 0
    if x.by_bucket is not None:
        then = load_times(x.then, place, columns)
        ends, buckets = time_ends(x.then, place, begin, N), no_buckets(x)
    sums = no_sums(N)
    row = (tl.program_id(0) % num_rows).to(tl.int64)
    by_distance = grad_distance + row * POSITION_LANES * num_distances
    by_bucket = grad_bucket + row * (TIME_LANES * HISTOGRAM)
    grads_k = tl.zeros([N, A], dtype=tl.float32)
    grads_v = tl.zeros([N, V], dtype=tl.float32)
    for start in range(begin, tl.minimum(begin + N, length), M):
        grads_k, grads_v, sums = _backward_tile(
            x, (q, grad_out), place, num_seen, k, v, then, False, 0, buckets, sums, columns, start, grads_k,
            grads_v, grad_q, by_distance, num_distances, by_bucket, A, V, M, N, FAST, NATIVE, TMA,
            TMA_SUM, ONCE, PRECISION, True, False, HAS_POSITION, IS_ALONE, IS_REPEATABLE, PART,
        )  # fmt: skip
    end = _last_query(x, place, num_seen, begin, N, HAS_WINDOW)
    if x.by_bucket is not None:
        query_ends = time_ends(x.now, place, begin + N, M)
    for start in range(begin + N, end, M):
        is_far, most = False, 0
        if x.by_bucket is not None:
            is_far, most, held = tile_buckets(x, head, buckets, query_ends, ends, NATIVE)
            query_ends = time_ends(x.now, place, start + M, M)
            if held[0] != buckets[0]:
                add_sums(by_bucket, sums, buckets, N, IS_REPEATABLE or PART == "values")
                sums = no_sums(N)
            buckets = held
        grads_k, grads_v, sums = _backward_tile(
            x, (q, grad_out), place, num_seen, k, v, then, is_far, most, buckets, sums, columns, start,
            grads_k, grads_v, grad_q, by_distance, num_distances, by_bucket, A, V, M, N, FAST, NATIVE, TMA,
            TMA_SUM, ONCE, PRECISION, HAS_POSITION or HAS_WINDOW or x.num_seen is not None, True,
            HAS_POSITION, IS_ALONE, IS_REPEATABLE, PART,
        )  # fmt: skip
    if x.by_bucket is not None:
        add_sums(by_bucket, sums, buckets, N, IS_REPEATABLE or PART == "values")
    if PART != "values":
        store_rows(grad_k, grads_k, x.num_heads, place, columns, x.attention_dim, A)
    if PART != "keys":
        if x.logsumexp is None:
            grads_v *= x.scale
        store_rows(grad_v, grads_v, x.num_heads, place, columns, x.value_dim, V)
