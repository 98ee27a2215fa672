"""Jagged attention: one front door, with the slow formula in `reference` and the back ends behind it."""

from torch import Tensor

from hstu_rec.ops.grouped import JaggedLayout, grouped_attention, jagged_layout
from hstu_rec.ops.reference import (
    NUM_TIME_BUCKETS,
    AttentionKind,
    jagged_attention_reference,
    time_bucket,
)

__all__ = [
    "NUM_TIME_BUCKETS",
    "AttentionKind",
    "JaggedLayout",
    "jagged_attention",
    "jagged_attention_reference",
    "jagged_layout",
    "time_bucket",
]


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

        silu:     out_i = sum_{j <= i} silu(q_i . k_j + bias_ij) * scale * v_j
        softmax:  out_i = sum_{j <= i} softmax_j(q_i . k_j * scale + bias_ij) v_j
        bias_ij = position_bias[h, min(i - j, P - 1)] + time_bias[h, bucket(now_i - timestamps_j)]

    Args:
        q, k: [T, H, A]; v: [T, H, V]; users one after another, never padded.
        offsets: int64 [B+1], user b owns rows offsets[b] .. offsets[b+1]; empty users are allowed.
        scale: 1/n for silu (arXiv 2402.17152, eq. 3), 1/sqrt(A) for softmax.
        position_bias: [1, P] shared by the heads, or [H, P].
        time_bias: [1, 129] or [H, 129]; needs `timestamps`.
        timestamps: int64 [T], s. query_times: int64 [T], s, what "now" is at each event; the event's
            own time when None.
        layout: `jagged_layout(offsets, H, timestamps, query_times)`, to share it between layers; the
            times are not needed beside it.
    """
    if layout is None:
        if time_bias is not None and timestamps is None:
            raise ValueError(
                "time_bias is given without timestamps; pass int64 timestamps [T] in s"
            )
        times = timestamps if time_bias is not None else None
        layout = jagged_layout(offsets, q.shape[1], times, query_times)
    return grouped_attention(
        q, k, v, layout, kind=kind, scale=scale, position_bias=position_bias, time_bias=time_bias
    )
