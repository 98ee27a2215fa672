"""Jagged attention in Triton, with the learned position and time bias computed in the kernel."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hstu_rec.distributed import on_device
from hstu_rec.ops.reference import NUM_TIME_BUCKETS, AttentionKind
from hstu_rec.ops.triton_kernels import (
    HISTOGRAM,
    Inputs,
    backward_keys,
    backward_queries,
    forward,
)

# Queries or keys that a program owns, and that it meets at a time: more in half precision, where their
# tiles still fit the registers (float32 spills from 64 on, on Hopper).
BLOCKS = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
# Products of float32 in three passes of TF32: as exact as float32's own, on the tensor cores.
PRECISION = "tf32x3"


@dataclass(frozen=True)
class BlockLayout:
    """Where the blocks of a jagged batch are, those with the most work first; shared by all layers."""

    block: int
    offsets: Tensor  # int64 [B+1]
    query_users: Tensor  # int32 [n]: owner of each block of queries
    query_begins: Tensor  # int32 [n]: its first event in the history
    key_users: Tensor  # int32 [n]
    key_begins: Tensor  # int32 [n]
    now: Tensor | None  # int32 or int64 [T], s since the user's first event; for a time bias
    then: Tensor | None  # the same of the events themselves

    @property
    def num_targets(self) -> None:
        """No candidates yet."""
        return None

    def to(self, device: torch.device) -> "BlockLayout":
        """The layout on `device`; made on CPU and moved, it costs no wait for the device."""
        return on_device(self, device)


def block_layout(
    offsets: Tensor,
    timestamps: Tensor | None = None,
    query_times: Tensor | None = None,
    block: int = BLOCKS[torch.float32],
) -> BlockLayout:
    """The layout of a batch with int64 `offsets` [B+1]; times (int64 [T], s) only for a time bias.

    `block`: events a program owns, 16 at least; BLOCKS has good ones.
    """
    device, starts = offsets.device, offsets.cpu()
    lengths = starts.diff()
    counts = (lengths + block - 1) // block
    users = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    begins = (torch.arange(len(users)) - (counts.cumsum(0) - counts)[users]) * block
    of_queries = _heaviest_first(users, begins, begins, device)
    of_keys = _heaviest_first(users, begins, lengths[users] - begins, device)
    now = then = None
    if timestamps is not None:
        now, then = timestamps if query_times is None else query_times, timestamps
        first = torch.repeat_interleave(starts[:-1], lengths).to(device)
        now, then = now - timestamps[first], then - timestamps[first]
        if len(then) and max(int(now.abs().max()), int(then.abs().max())) < 2**30:
            now, then = now.int(), then.int()
    return BlockLayout(block, offsets, *of_queries, *of_keys, now, then)


def _heaviest_first(
    users: Tensor, begins: Tensor, work: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Owners and first events of blocks as int32 on `device`: short programs then fill the gaps."""
    order = torch.argsort(work, descending=True, stable=True)
    return users[order].int().to(device), begins[order].int().to(device)


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
    of the position bias's gradient vary from run to run, unless torch.use_deterministic_algorithms is on;
    then it takes a row of the table's length for every `layout.block` events of a head.
    """
    if time_bias is not None and layout.then is None:
        raise ValueError("time_bias is given without timestamps; pass int64 timestamps [T] in s")
    bias = position_bias, time_bias
    blocks = layout.query_users, layout.query_begins, layout.key_users, layout.key_begins
    times = (layout.now, layout.then) if time_bias is not None else (None, None)
    others = scale, layout.block, kind == "softmax"
    return fused_attention(q, k, v, *bias, layout.offsets, *blocks, *times, *others)[0]


def inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    **others: Any,
) -> Inputs:
    """What the kernels read; rows whose entries are apart are copied."""
    q, k, v = rows = [x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v)]
    tables = [None if table is None else table.contiguous() for table in (position_bias, time_bias)]
    return Inputs(
        q=q,
        k=k,
        v=v,
        position_bias=tables[0],
        time_bias=tables[1],
        strides=tuple(x.stride(0) for x in rows),
        head_strides=tuple(x.stride(1) for x in rows),
        bias_strides=tuple(0 if t is None or len(t) == 1 else t.shape[1] for t in tables),
        num_positions=1 if position_bias is None else position_bias.shape[1],
        num_heads=q.shape[1],
        attention_dim=q.shape[2],
        value_dim=v.shape[2],
        **others,
    )


def shape(x: Inputs, block: int) -> dict[str, Any]:
    """What is known when a kernel is compiled."""
    a, v = (max(16, triton.next_power_of_2(dim)) for dim in (x.attention_dim, x.value_dim))
    return {
        "A": a,
        "V": v,
        "N": block,
        "PRECISION": PRECISION,
        "num_warps": 8 if max(a, v) > 64 else 4,
    }


@torch.library.custom_op("hstu_rec::fused_attention", mutates_args=())
def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    offsets: Tensor,
    query_users: Tensor,
    query_begins: Tensor,
    key_users: Tensor,
    key_begins: Tensor,
    now: Tensor | None,
    then: Tensor | None,
    scale: float,
    block: int,
    is_softmax: bool,
) -> tuple[Tensor, Tensor]:
    """`triton_attention` with the tensors of its layout, as torch.compile sees it; and the logsumexp of the
    scores, float32 [T, H], empty for silu."""
    out = v.new_empty(v.shape)
    logsumexp = q.new_empty(q.shape[:2] if is_softmax else 0, dtype=torch.float32)
    x = inputs(
        q,
        k,
        v,
        position_bias,
        time_bias,
        grad_out=None,
        logsumexp=logsumexp if is_softmax else None,
        delta=None,
        offsets=offsets,
        users=query_users,
        begins=query_begins,
        now=now,
        then=then,
        scale=scale,
    )
    if num_programs := len(query_users) * q.shape[1]:
        forward[(num_programs,)](x, out, **shape(x, block))
    return out, logsumexp


@torch.library.custom_op("hstu_rec::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    grad_out: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    offsets: Tensor,
    query_users: Tensor,
    query_begins: Tensor,
    key_users: Tensor,
    key_begins: Tensor,
    now: Tensor | None,
    then: Tensor | None,
    scale: float,
    block: int,
    is_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the bias tables, float32; those of no table are empty.

    `out` and `logsumexp` of forward are read for softmax alone.
    """
    delta = (grad_out.float() * out.float()).sum(-1) if is_softmax else None
    x = inputs(
        q,
        k,
        v,
        position_bias,
        time_bias,
        grad_out=grad_out.contiguous(),
        logsumexp=logsumexp if is_softmax else None,
        delta=delta,
        offsets=offsets,
        users=query_users,
        begins=query_begins,
        now=now,
        then=then,
        scale=scale,
    )
    grad_q, grad_k, grad_v = (y.new_empty(y.shape) for y in (q, k, v))
    num_programs = len(query_users) * q.shape[1]
    # A program's own sums come in one order: two tiles share a distance, and a + b is b + a.
    is_repeatable = torch.are_deterministic_algorithms_enabled()
    num_rows = 0 if position_bias is None else len(position_bias)
    num_rows = num_programs if is_repeatable else num_rows
    by_position = q.new_zeros(num_rows, x.num_positions, dtype=torch.float32)
    by_bucket = q.new_zeros(num_programs, HISTOGRAM.value, dtype=torch.float32)
    if num_programs:
        known = shape(x, block)
        own: dict[str, Any] = {**known, "HAS_OWN_ROW": is_repeatable}
        backward_queries[(num_programs,)](x, grad_q, by_position, by_bucket, **own)
        x = x._replace(users=key_users, begins=key_begins)
        backward_keys[(num_programs,)](x, grad_k, grad_v, **known)
    if is_repeatable:
        by_position = _of_table(by_position, position_bias, x.num_heads)
    by_bucket = _of_table(by_bucket[:, :NUM_TIME_BUCKETS], time_bias, x.num_heads)
    return grad_q, grad_k, grad_v, by_position, by_bucket


def _of_table(by_program: Tensor, table: Tensor | None, num_heads: int) -> Tensor:
    """Sums [programs, P], heads in turn, added up to the gradient of a table [1 or H, P]; [0, P] of none."""
    if table is None:
        return by_program[:0].clone()
    by_head = by_program.unflatten(0, (-1, num_heads)).sum(0)
    return by_head if len(table) > 1 else by_head.sum(0, keepdim=True)


@fused_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, is_softmax = others
    size = q.shape[:2] if is_softmax else 0
    return v.new_empty(v.shape), q.new_empty(size, dtype=torch.float32)


@fused_attention_backward.register_fake
def _(grad_out: Tensor, out: Tensor, logsumexp: Tensor, *others: Any) -> tuple[Tensor, ...]:
    rows, tables = others[:3], others[3:5]
    empty = (0, 1), (0, NUM_TIME_BUCKETS)
    sizes = [e if t is None else t.shape for t, e in zip(tables, empty, strict=True)]
    of_tables = (rows[0].new_empty(size, dtype=torch.float32) for size in sizes)
    return *(x.new_empty(x.shape) for x in rows), *of_tables


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.block, ctx.is_softmax = inputs
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    # Silu needs no output for its gradients.
    ctx.save_for_backward(out if ctx.is_softmax else logsumexp, logsumexp, *tensors)


def _gradients(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    out, logsumexp, *tensors = ctx.saved_tensors
    others = ctx.scale, ctx.block, ctx.is_softmax
    *of_rows, of_position, of_time = fused_attention_backward(
        grad_out, out, logsumexp, *tensors, *others
    )
    tables = (
        None if table is None else grad.to(table.dtype)
        for table, grad in zip(tensors[3:5], (of_position, of_time), strict=True)
    )
    return *of_rows, *tables, *[None] * (len(tensors) - 5 + len(others))


fused_attention.register_autograd(_gradients, setup_context=_keep)
