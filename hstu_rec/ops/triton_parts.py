"""What the kernels of `hstu_rec.ops.triton` are made of: loads, distances, buckets, bias, scores, slopes."""

# What is compiled by Triton is no Python to a type checker: a jitted function is called for its tensors.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hstu_rec.ops.triton_bias import load_times


class Inputs(NamedTuple):
    """What every kernel reads beside rows. Tensors are pointers there, and None is known when it is compiled.

    Rows of q, k [T, H, A], v and grad_out [T, H, V] are arguments of their own, because Triton takes
    descriptors nowhere else.
    """

    logsumexp: Any  # float32 [T, H] of the scores, which forward writes; None for silu
    delta: Any  # float32 [T, H], sum of out * grad_out; None in forward and for silu
    offsets: Any
    num_seen: Any  # int32 [B], events before a user's candidates; None without candidates
    users: Any  # of the blocks that programs own
    begins: Any
    edges: Any  # [NUM_BUCKETS] of the times' dtype: the least difference in s of each bucket
    is_sorted: Any  # whether every user's times, now and then, are in order
    now: Any  # int32 or int64 [T + a block]: s since the user's first event, from which a query looks back
    then: Any  # the same of the events themselves
    by_distance: Any  # float32 [1 or H, NUM_BEFORE + longest + NUM_BEFORE]
    by_bucket: Any  # float32 [1 or H, NUM_BUCKETS]; None without time bias
    strides: Any  # of an event in q, k, v, whose last dimension is contiguous
    head_strides: Any  # of a head in q, k, v
    table_strides: Any  # of a head in by_distance, by_bucket; 0 where heads share a table
    window: Any  # newest events that a query sees, with HAS_WINDOW
    num_heads: Any
    attention_dim: Any
    value_dim: Any
    scale: Any


@triton.jit
def place_of(x: "Any", N: tl.constexpr) -> "Any":
    """((head, first event of the user, number of them), events before the candidates, first of the block's
    events, all of them)."""
    block = tl.program_id(0) // x.num_heads
    user = tl.load(x.users + block)
    first = tl.load(x.offsets + user)
    length = (tl.load(x.offsets + user + 1) - first).to(tl.int32)
    num_seen = length
    if x.num_seen is not None:
        num_seen = tl.load(x.num_seen + user)
    begin = tl.load(x.begins + block)
    place = tl.program_id(0) % x.num_heads, first, length
    return place, num_seen, begin, begin + tl.arange(0, N)


@triton.jit
def distances(x: "Any", rows: "Any", columns: "Any", num_seen: "Any") -> "Any":
    """int32 tile: from keys to queries, which are rows and columns or the reverse, -1 for another candidate.

    Candidates stand where the next event would.
    """
    distance = rows - columns
    if x.num_seen is not None:
        distance = tl.minimum(rows, num_seen) - tl.minimum(columns, num_seen)
        distance = tl.where((columns >= num_seen) & (rows != columns), -1, distance)
    return distance


@triton.jit
def load_rows(
    rows: "Any",
    stride: "Any",
    head_stride: "Any",
    place: "Any",
    start: "Any",
    width: "Any",
    N: tl.constexpr,
    W: tl.constexpr,
    TMA: tl.constexpr,
) -> "Any":
    """[N, W]: events of this program's user and head from `start` on, 0 beyond its length and `width`.

    TMA: `rows` is a descriptor; beyond the user's length are rows of others, to be hidden.
    """
    head, first, length = place
    if TMA:
        tile = rows.load([(first + start).to(tl.int32), head * head_stride])
    else:
        events, column = start + tl.arange(0, N), tl.arange(0, W)
        at = (first + events).to(tl.int64)[:, None] * stride + head * head_stride + column[None, :]
        is_inside = (events[:, None] < length) & (column[None, :] < width)
        tile = tl.load(rows + at, mask=is_inside, other=0.0)
    return tile


@triton.jit
def row_addresses(
    tensor: "Any", num_heads: "Any", place: "Any", events: "Any", width: "Any", W: tl.constexpr
) -> "Any":
    """(addresses [N, W] of events in a contiguous [T, H, width], whether each is inside)."""
    head, first, length = place
    column = tl.arange(0, W)
    at = ((first + events).to(tl.int64)[:, None] * num_heads + head) * width + column[None, :]
    return tensor + at, (events[:, None] < length) & (column[None, :] < width)


@triton.jit
def store_rows(
    tensor: "Any",
    values: "Any",
    num_heads: "Any",
    place: "Any",
    events: "Any",
    width: "Any",
    W: tl.constexpr,
) -> "Any":
    """Writes `values` [N, W] to a contiguous [T, H, width]."""
    at, is_inside = row_addresses(tensor, num_heads, place, events, width, W)
    tl.store(at, values.to(tensor.dtype.element_ty), mask=is_inside)


@triton.jit
def score(x: "Any", left: "Any", right: "Any", bias: "Any", PRECISION: tl.constexpr) -> "Any":
    """float32: silu's argument, or for softmax the exponent of 2."""
    if x.logsumexp is None:
        return tl.dot(left, right, acc=bias, input_precision=PRECISION)
    exponent = x.scale * 1.4426950408889634
    return tl.dot(left, right, input_precision=PRECISION) * exponent + bias


@triton.jit
def sigmoid_of(scores: "Any", FAST: tl.constexpr) -> "Any":
    """FAST: to 2**-11, by one instruction of its kind."""
    if FAST:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [scores * 0.5], tl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * tanh
    return tl.sigmoid(scores)


@triton.jit
def weights_and_grads(
    x: "Any", scores: "Any", grads: "Any", logsumexp: "Any", delta: "Any", FAST: tl.constexpr
) -> "Any":
    """(weights, those of silu before scale; gradients of q k^T, from the weights')."""
    if x.logsumexp is not None:
        weights = tl.exp2(scores - logsumexp)
        grads = weights * ((grads - delta) * x.scale)
    else:
        gate = sigmoid_of(scores, FAST)
        weights = scores * gate
        grads *= (gate * x.scale) * (1.0 + (scores - weights))
    return weights, grads


@triton.jit
def load_keys(
    x: "Any", keys: "Any", place: "Any", start: "Any",
    A: tl.constexpr, V: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
) -> "Any":  # fmt: skip
    """(k, v) of N keys from `start` on; `keys` are their rows."""
    k = load_rows(
        keys[0], x.strides[1], x.head_strides[1], place, start, x.attention_dim, N, A, TMA
    )
    v = load_rows(keys[1], x.strides[2], x.head_strides[2], place, start, x.value_dim, N, V, TMA)
    return k, v


@triton.jit
def load_queries(
    x: "Any", queries: "Any", place: "Any", start: "Any",
    A: tl.constexpr, V: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
) -> "Any":  # fmt: skip
    """(q, grad_out, logsumexp, delta, now) of N queries from `start` on, whose rows are `queries`; what is
    not there means nothing."""
    head, first, length = place
    rows = start + tl.arange(0, N)
    q = load_rows(
        queries[0], x.strides[0], x.head_strides[0], place, start, x.attention_dim, N, A, TMA
    )
    stride = x.num_heads * x.value_dim
    grad_out = load_rows(queries[1], stride, x.value_dim, place, start, x.value_dim, N, V, TMA)
    logsumexp, delta, now = rows, rows, rows
    if x.logsumexp is not None:
        at = (first + rows) * x.num_heads + head
        # Weights of what is not there are 0, whatever the bias.
        logsumexp = tl.load(x.logsumexp + at, mask=rows < length, other=float("inf"))
        delta = tl.load(x.delta + at, mask=rows < length, other=0.0)
    if x.by_bucket is not None:
        now = load_times(x.now, place, rows)
    return q, grad_out, logsumexp, delta, now
