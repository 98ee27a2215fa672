"""Jagged attention in Triton, with the learned position and time bias computed in the kernel."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from hstu_rec.ops.reference import TIME_BUCKET_WIDTH, AttentionKind
from hstu_rec.ops.triton_bias import (
    HISTOGRAM,
    NUM_BEFORE,
    NUM_BUCKETS,
    POSITION_LANES,
    TIME_LANES,
)
from hstu_rec.ops.triton_kernels import backward, forward, query_grads
from hstu_rec.ops.triton_layout import BlockLayout
from hstu_rec.ops.triton_options import (
    backward_options,
    backward_rows,
    forward_options,
    forward_rows,
    parts_of,
    query_options,
    repeatable_options,
    rows_of,
)
from hstu_rec.ops.triton_parts import Inputs
from hstu_rec.ops.triton_repeatable import backward_queries

# What bias by distance is for keys after the query.
UNSEEN = -1e30
# Rows of memory, about, that programs in turn add their gradients of the tables to.
NUM_ROWS = 64
LOG2_E = math.log2(math.e)
LANES = POSITION_LANES.value, TIME_LANES.value


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    kind: AttentionKind,
    scale: float,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
) -> Tensor:
    """Causal attention [T, H, V]; arguments as in `hstu_rec.ops.jagged_attention`.

    A time difference within float32's rounding of a bucket's edge may fall to the neighbour. The last bits
    of the gradients of q and of the tables vary from run to run, unless
    torch.use_deterministic_algorithms is on; then they take another pass over the keys, and memory of a
    row of the table's length for every `layout.block` events, or 64 of a head.
    """
    if time_bias is not None and layout.then is None:
        raise ValueError("time_bias is given without timestamps; pass int64 timestamps [T] in s")
    unit = LOG2_E if kind == "softmax" else 1.0
    by_distance = distance_table(position_bias, layout, unit)
    by_bucket = None if time_bias is None else bucket_table(time_bias, unit)
    blocks = layout.query_users, layout.query_begins, layout.key_users, layout.key_begins
    times = (layout.now, layout.then) if time_bias is not None else (None, None)
    others: Any = scale, layout.block, layout.window, layout.is_sorted
    others = *others, position_bias is not None, kind == "softmax"
    where = layout.offsets, layout.num_seen
    return fused_attention(q, k, v, by_distance, by_bucket, *where, *blocks, *times, *others)[0]


def distance_table(table: Tensor | None, layout: BlockLayout, unit: float) -> Tensor:
    """float32 [1 or H, NUM_BEFORE + longest + NUM_BEFORE]: bias by every distance in a block's reach."""
    count = layout.longest + NUM_BEFORE.value
    if table is None:
        known = torch.zeros(1, count, device=layout.offsets.device)
    else:
        known = table.float()[:, :count] * unit
        rest = known[:, -1:].expand(-1, count - known.shape[1])
        known = torch.cat([known, rest], 1)
    unseen = known.new_full((len(known), NUM_BEFORE.value), UNSEEN)
    if layout.window:
        known = known[:, : layout.window]
        beyond = known.new_full((len(known), count - known.shape[1]), UNSEEN)
        known = torch.cat([known, beyond], 1)
    return torch.cat([unseen, known], 1)


def bucket_table(table: Tensor, unit: float) -> Tensor:
    """float32 [1 or H, NUM_BUCKETS]: time bias, the last bucket's as often as times can be apart."""
    table = table.float() * unit
    return torch.cat([table, table[:, -1:].expand(-1, NUM_BUCKETS.value - table.shape[1])], 1)


@functools.cache
def _bucket_edges(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[NUM_BUCKETS + 3]: the least differences in s of the buckets, at most the largest number."""
    exact = (torch.arange(NUM_BUCKETS.value + 3, dtype=torch.float64) * TIME_BUCKET_WIDTH).exp()
    largest = torch.iinfo(dtype).max
    edges = exact.ceil().clamp(max=2.0**62).long().clamp(max=largest)
    edges[0] = 0
    return edges.to(device, dtype)


def inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor,
    by_bucket: Tensor | None,
    now: Tensor | None,
    then: Tensor | None,
    **others: Any,
) -> Inputs:
    """What the kernels read beside the `rows_of` q, k, v."""
    rows, tables = (q, k, v), (by_distance, by_bucket)
    return Inputs(
        by_distance=by_distance,
        by_bucket=by_bucket,
        strides=tuple(x.stride(0) for x in rows),
        head_strides=tuple(x.stride(1) for x in rows),
        table_strides=tuple(0 if t is None or len(t) == 1 else t.shape[1] for t in tables),
        num_heads=q.shape[1],
        attention_dim=q.shape[2],
        value_dim=v.shape[2],
        now=now,
        then=then,
        edges=None if now is None else _bucket_edges(q.device, now.dtype),
        **others,
    )


@torch.library.custom_op("hstu_rec::fused_attention", mutates_args=())
def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor,
    by_bucket: Tensor | None,
    offsets: Tensor,
    num_seen: Tensor | None,
    query_users: Tensor,
    query_begins: Tensor,
    key_users: Tensor,
    key_begins: Tensor,
    now: Tensor | None,
    then: Tensor | None,
    scale: float,
    block: int,
    window: int,
    is_sorted: bool,
    has_position: bool,
    is_softmax: bool,
) -> tuple[Tensor, Tensor]:
    """`triton_attention` with the tensors of its layout, as torch.compile sees it; and the logsumexp of the
    scores to base 2, float32 [T, H], empty for silu."""
    out = v.new_empty(v.shape)
    logsumexp = q.new_empty(q.shape[:2] if is_softmax else 0, dtype=torch.float32)
    q, k, v = rows = rows_of(q, k, v)
    x = inputs(
        q, k, v, by_distance, by_bucket, now, then, offsets=offsets, num_seen=num_seen, window=window,
        is_sorted=int(is_sorted),
        users=query_users, begins=query_begins, scale=scale, delta=None,
        logsumexp=logsumexp if is_softmax else None,
    )  # fmt: skip
    if num_programs := len(query_users) * x.num_heads:
        options = forward_options(x, rows, block, has_position)
        arguments: Any = (*forward_rows(rows, options), out)
        forward[(num_programs,)](x, *arguments, **options)
    return out, logsumexp


@torch.library.custom_op("hstu_rec::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    grad_out: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor,
    by_bucket: Tensor | None,
    offsets: Tensor,
    num_seen: Tensor | None,
    query_users: Tensor,
    query_begins: Tensor,
    key_users: Tensor,
    key_begins: Tensor,
    now: Tensor | None,
    then: Tensor | None,
    scale: float,
    block: int,
    window: int,
    is_sorted: bool,
    has_position: bool,
    is_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the tables, float32; that of no table is empty.

    `out` and `logsumexp` of forward are read for softmax alone.
    """
    delta = (grad_out.float() * out.float()).sum(-1) if is_softmax else None
    q, k, v, grad_out = rows = [*rows_of(q, k, v), grad_out.contiguous()]
    x = inputs(
        q, k, v, by_distance, by_bucket, now, then, offsets=offsets, num_seen=num_seen, window=window,
        is_sorted=int(is_sorted),
        users=key_users, begins=key_begins, scale=scale, delta=delta,
        logsumexp=logsumexp if is_softmax else None,
    )  # fmt: skip
    of_queries = x._replace(users=query_users, begins=query_begins)
    (grad_q, grad_k, grad_v), sums = _run_backward(x, of_queries, rows, block, has_position)
    # The kernels' sums are of gradients of q k^T; softmax's tables have another unit.
    unit = 1 / (LOG2_E * scale) if is_softmax else 1.0
    of_distance, of_bucket = (
        _of_table(of_rows, table, x.num_heads, unit)
        for of_rows, table in zip(sums, (by_distance, by_bucket), strict=True)
    )
    return grad_q, grad_k, grad_v, of_distance, of_bucket


def _run_backward(
    x: Inputs, of_queries: Inputs, rows: list[Tensor], block: int, has_position: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(gradients of q, k, v, `table_sums`); `x` has the blocks of keys, `of_queries` those of queries."""
    q, k, v, _ = rows
    is_repeatable, parts = torch.are_deterministic_algorithms_enabled(), parts_of(x, rows[0].dtype)
    # Histories of one block have all keys of a query in one program.
    is_alone = x.by_distance.shape[1] - 2 * NUM_BEFORE.value <= block
    is_summed = not (is_repeatable or is_alone) and parts == ("all",)
    grad_q = torch.zeros(q.shape, dtype=torch.float32 if is_summed else q.dtype, device=q.device)
    grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    grid, known = (len(x.users) * x.num_heads,), (x, rows, block, has_position)
    options = [backward_options(*known, is_alone, is_repeatable, part) for part in parts]
    own: dict[str, Any] = query_options(*known)
    num_programs = None
    if is_repeatable:
        own = repeatable_options(options[0])
        of_queries = _divided(of_queries, block, own["N"])
        num_programs = len(of_queries.users) * x.num_heads
    sums, num_rows = table_sums(x, has_position, num_programs)
    ends = *sums, sums[0].shape[-1]
    if grid[0]:
        if is_repeatable:
            arguments: Any = (*rows, grad_q, *ends)
            backward_queries[(num_programs,)](of_queries, *arguments, **own)
        elif len(parts) > 1:
            arguments = (*forward_rows(rows, own), grad_q)
            query_grads[grid](of_queries, *arguments, **own)
        for each in options:
            arguments = (*backward_rows(rows, grad_q, each), grad_k, grad_v, *ends, num_rows)
            backward[grid](x, *arguments, **each)
    return (grad_q.to(q.dtype), grad_k, grad_v), sums


def _divided(x: Inputs, block: int, size: int) -> Inputs:
    """`x` with blocks cut to `size` events."""
    begins = x.begins[:, None] + torch.arange(0, block, size, device=x.begins.device)
    users = x.users.repeat_interleave(block // size)
    return x._replace(users=users, begins=begins.int().flatten())


def table_sums(
    x: Inputs, has_position: bool, num_programs: int | None = None
) -> tuple[tuple[Tensor, Tensor], int]:
    """Zeros [rows, lanes, P], to which programs add their gradients of the tables, P as `add_position_grads`
    wants it, and HISTOGRAM, [0, lanes, P] without a table; and how many rows there are.

    Programs take the rows in turn, or each has its own, and one more for candidates, when their number is
    given.
    """
    num_rows, lanes = math.ceil(NUM_ROWS / x.num_heads) * x.num_heads, LANES
    if num_programs is not None:
        # Of no programs, a row of zeros a head.
        num_rows, lanes = (num_programs or x.num_heads) * (1 if x.num_seen is None else 2), (1, 1)
    widths = math.ceil(x.by_distance.shape[1] / 8) * 8 + 1, HISTOGRAM.value
    counts = num_rows * has_position, num_rows * (x.by_bucket is not None)
    of_distance, of_bucket = (
        x.by_distance.new_zeros(*size) for size in zip(counts, lanes, widths, strict=True)
    )
    return (of_distance, of_bucket), num_rows


def _of_table(sums: Tensor, table: Tensor | None, num_heads: int, unit: float) -> Tensor:
    """Sums [rows, lanes, P], heads in turn, added up to the gradient of a table [1 or H, n]; [0, n] of no
    rows."""
    width = NUM_BUCKETS.value if table is None else table.shape[1]
    if table is None or not len(sums):
        return sums.new_zeros(0, width)
    by_head = sums[:, :, :width].unflatten(0, (-1, num_heads)).sum((0, 2)) * unit
    return by_head if len(table) > 1 else by_head.sum(0, keepdim=True)


@fused_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, is_softmax = others
    size = q.shape[:2] if is_softmax else 0
    return v.new_empty(v.shape), q.new_empty(size, dtype=torch.float32)


@fused_attention_backward.register_fake
def _(grad_out: Tensor, out: Tensor, logsumexp: Tensor, *others: Any) -> tuple[Tensor, ...]:
    rows, (by_distance, by_bucket), has_position = others[:3], others[3:5], others[-2]
    of_distance = by_distance.new_empty(len(by_distance) * has_position, by_distance.shape[1])
    size = (0, NUM_BUCKETS.value) if by_bucket is None else by_bucket.shape
    return *(x.new_empty(x.shape) for x in rows), of_distance, by_distance.new_empty(size)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.settings = inputs[:13], inputs[13:]
    *_, ctx.has_position, ctx.is_softmax = ctx.settings
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    # Silu needs no output for its gradients.
    ctx.save_for_backward(out if ctx.is_softmax else logsumexp, logsumexp, *tensors)


def _gradients(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    out, logsumexp, *tensors = ctx.saved_tensors
    *of_rows, of_distance, of_bucket = fused_attention_backward(
        grad_out, out, logsumexp, *tensors, *ctx.settings
    )
    tables = of_distance if ctx.has_position else None, None if tensors[4] is None else of_bucket
    return *of_rows, *tables, *[None] * (len(tensors) - 5 + len(ctx.settings))


fused_attention.register_autograd(_gradients, setup_context=_keep)
