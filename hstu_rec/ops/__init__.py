"""Jagged attention: one front door, with the slow formula in `reference` and the back ends behind it."""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hstu_rec.ops.candidates import (
    CandidateLayout,
    KeysAndValues,
    candidate_attention,
    candidate_layout,
)
from hstu_rec.ops.grouped import grouped_layout
from hstu_rec.ops.reference import (
    NUM_TIME_BUCKETS,
    AttentionKind,
    jagged_attention_reference,
    time_bucket,
)
from hstu_rec.ops.triton_layout import BlockLayout, block_layout

__all__ = [
    "NUM_TIME_BUCKETS",
    "AttentionKernel",
    "AttentionKind",
    "CandidateLayout",
    "JaggedLayout",
    "KeysAndValues",
    "candidate_attention",
    "candidate_layout",
    "jagged_attention",
    "jagged_attention_reference",
    "jagged_layout",
    "time_bucket",
]

AttentionKernel = Literal["grouped", "triton"]


class JaggedLayout(Protocol):
    """How a jagged batch is cut for a kernel; `jagged_layout` makes it."""

    @property
    def num_targets(self) -> Tensor | None:
        """int64 [B]: candidates at the end of each history; None without."""
        ...

    def to(self, device: torch.device) -> "JaggedLayout":
        """The layout on `device`; made on CPU and moved, it costs no wait for the device."""
        ...


def jagged_layout(
    offsets: Tensor,
    num_heads: int,
    timestamps: Tensor | None = None,
    query_times: Tensor | None = None,
    kernel: AttentionKernel = "grouped",
    dtype: torch.dtype = torch.float32,
    *,
    num_targets: Tensor | None = None,
    window: int = 0,
) -> JaggedLayout:
    """How a batch is cut and which keys a query sees, made once and shared by all layers.

    Args:
        offsets: int64 [B+1]. timestamps, query_times: int64 [T] in s, needed for a time bias only.
        kernel: grouped is plain torch on any device. triton is fused, on a GPU; `dtype` of queries, keys
            and values sets its blocks.
        num_targets: int64 [B], how many of each user's newest rows are candidates: they see the history and
            themselves, not each other, and stand where the next event would (a distance of 1 to the newest
            event of the history, of 0 to themselves).
        window: a query sees the `window` newest events at its place, itself among them; 0 for all.

    Raises ValueError for fewer candidates than none or more than a user's rows, and a window below 0.
    """
    _check_seen(offsets, num_targets, window)
    if kernel == "grouped":
        return grouped_layout(offsets, num_heads, timestamps, query_times, num_targets, window)
    return block_layout(
        offsets, timestamps, query_times, dtype, num_targets=num_targets, window=window
    )


def _check_seen(offsets: Tensor, num_targets: Tensor | None, window: int) -> None:
    if window < 0:
        raise ValueError(f"window must be at least 0; got {window}")
    if num_targets is None:
        return
    lengths = offsets.diff()
    given, dtype = torch.as_tensor(num_targets), getattr(num_targets, "dtype", None)
    if dtype != torch.int64 or given.shape != lengths.shape:
        raise ValueError(
            f"num_targets must be an int64 tensor [{len(lengths)}], a number for every user; got "
            f"{type(num_targets).__name__} {given.dtype} {list(given.shape)}"
        )
    is_outside = (num_targets < 0) | (num_targets > lengths)
    if is_outside.any():
        user = int(is_outside.nonzero()[0])
        raise ValueError(
            f"num_targets must be within 0..{int(lengths[user])}, the rows of user {user} of the batch; "
            f"got {int(num_targets[user])}"
        )


def jagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    kind: AttentionKind = "silu",
    scale: float,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    timestamps: Tensor | None = None,
    query_times: Tensor | None = None,
    layout: JaggedLayout | None = None,
) -> Tensor:
    """Causal attention within each user's history: [T, H, V], in the dtype of `v`.

        silu:     out_i = sum_j silu(q_i . k_j + bias_ij) * scale * v_j
        softmax:  out_i = sum_j softmax_j(q_i . k_j * scale + bias_ij) v_j
        bias_ij = position_bias[h, min(p_i - p_j, P - 1)] + time_bias[h, bucket(now_i - timestamps_j)]

    Event i of a user is at place p_i = i and sees j <= i. After a history of n events, candidates of the
    layout are at place n and see j < n and themselves; a window of it keeps p_i - p_j below itself.

    Args:
        q, k: [T, H, A]; v: [T, H, V]; users one after another, never padded.
        offsets: int64 [B+1], user b owns rows offsets[b] .. offsets[b+1]; empty users are allowed.
        scale: 1/n for silu (arXiv 2402.17152, eq. 3), 1/sqrt(A) for softmax.
        position_bias: [1, P] shared by the heads, or [H, P].
        time_bias: [1, 129] or [H, 129]; needs `timestamps`.
        timestamps: int64 [T], s. query_times: int64 [T], s, what "now" is at each event; the event's
            own time when None.
        layout: `jagged_layout(offsets, H, timestamps, query_times, kernel)`, to choose the kernel, candidates
            and a window, and to share it between layers; the times are not needed beside it.
    """
    if layout is None:
        times = timestamps if time_bias is not None else None
        layout = jagged_layout(offsets, q.shape[1], times, query_times)
    bias = {"position_bias": position_bias, "time_bias": time_bias}
    if isinstance(layout, BlockLayout):
        from hstu_rec.ops.triton import triton_attention  # which needs triton

        return triton_attention(q, k, v, layout, kind=kind, scale=scale, **bias)
    plain: Any = layout  # GroupedLayout, or one that benchmarks compare with it
    return plain.attend(q, k, v, kind=kind, scale=scale, **bias)
