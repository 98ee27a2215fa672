"""Jagged attention as loops over users: slow, obvious, and the specification of every back end."""

import itertools
from typing import Literal

import torch
from torch import Tensor

AttentionKind = Literal["silu", "softmax"]

NUM_TIME_BUCKETS = 129
TIME_BUCKET_WIDTH = 0.301


def time_bucket(seconds: Tensor) -> Tensor:
    """int64 bucket floor(ln(max(1, |dt|)) / 0.301), at most 128, of time differences in s (int64).

    Source: arXiv 2402.17152, relative attention bias; the published code's constants.
    """
    logarithm = seconds.abs().clamp(min=1).to(torch.float64).log()
    return (logarithm / TIME_BUCKET_WIDTH).long().clamp(max=NUM_TIME_BUCKETS - 1)


def jagged_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    kind: AttentionKind,
    scale: float,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    timestamps: Tensor | None = None,
    query_times: Tensor | None = None,
) -> Tensor:
    """Causal attention [T, H, V] within each user; arguments as in `hstu_rec.ops.jagged_attention`."""
    out = v * 0
    bounds = offsets.tolist()
    for begin, end in itertools.pairwise(bounds):
        for i in range(begin, end):
            scores = torch.einsum("hd,jhd->hj", q[i], k[begin : i + 1])
            bias = torch.zeros_like(scores)
            if position_bias is not None:
                distance = i - torch.arange(begin, i + 1, device=q.device)
                bias = bias + position_bias[:, distance.clamp(max=position_bias.shape[1] - 1)]
            if time_bias is not None:
                assert timestamps is not None
                now = timestamps[i] if query_times is None else query_times[i]
                bias = bias + time_bias[:, time_bucket(now - timestamps[begin : i + 1])]
            if kind == "silu":
                weights = torch.nn.functional.silu(scores + bias) * scale
            else:
                weights = torch.softmax(scores * scale + bias, dim=-1)
            out[i] = torch.einsum("hj,jhv->hv", weights, v[begin : i + 1])
    return out
