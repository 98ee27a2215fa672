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
    num_targets: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Attention [T, H, V] within each user; arguments as in `jagged_attention` and `jagged_layout` of ops."""
    out = v * 0
    counts = [0] * (len(offsets) - 1) if num_targets is None else num_targets.tolist()
    for (begin, end), count in zip(itertools.pairwise(offsets.tolist()), counts, strict=True):
        for i in range(begin, end):
            # Candidates stand where the next event would, and see no other candidate.
            first_target = end - count
            place = min(i, first_target)
            oldest = max(begin, place - window + 1) if window else begin
            keys = torch.tensor([*range(oldest, min(i, first_target)), i], device=q.device)
            scores = torch.einsum("hd,jhd->hj", q[i], k[keys])
            bias = torch.zeros_like(scores)
            if position_bias is not None:
                distance = place - keys.clamp(max=first_target)
                bias = bias + position_bias[:, distance.clamp(max=position_bias.shape[1] - 1)]
            if time_bias is not None:
                assert timestamps is not None
                now = timestamps[i] if query_times is None else query_times[i]
                bias = bias + time_bias[:, time_bucket(now - timestamps[keys])]
            if kind == "silu":
                weights = torch.nn.functional.silu(scores + bias) * scale
            else:
                weights = torch.softmax(scores * scale + bias, dim=-1)
            out[i] = torch.einsum("hj,jhv->hv", weights, v[keys])
    return out
