"""Attention of candidates to histories that are encoded already: a row of scores a candidate, no more.

    history of user b   n events, their keys and values kept         |k k k k k|
    its candidates      each sees them and itself, no other one       |c1|c2|c3|..

The same numbers as `jagged_attention` with `num_targets`, whose cost grows with the square of both together
(arXiv 2402.17152, section 3.4, M-FALCON).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hstu_rec.ops.reference import AttentionKind, time_bucket

# Scores of a block of candidates, of all heads: what stays in a core's cache.
MAX_BLOCK_SCORES = 2**18

KeysAndValues = tuple[Tensor, Tensor]
"""Of a layer's events: [H, T, A] and [H, T, V]."""


@dataclass(frozen=True)
class _User:
    """A user's part of a batch."""

    past: slice  # of the events, those that candidates see
    candidates: slice
    distance: Tensor  # int64 [n]: from the candidates' place to the events'
    buckets: Tensor | None  # int64 [n] of time, for a time bias


@dataclass(frozen=True)
class CandidateLayout:
    """Who sees what; made once, and shared by all layers and all parts of the candidates."""

    users: list[_User]
    now_bucket: int  # of the time from a candidate to itself

    def part(self, rows: slice) -> "CandidateLayout":
        """That of some of the candidates, counted from the first of them."""
        found = []
        for user in self.users:
            begin = max(user.candidates.start, rows.start)
            end = min(user.candidates.stop, rows.stop)
            if begin < end:
                mine = slice(begin - rows.start, end - rows.start)
                found.append(_User(user.past, mine, user.distance, user.buckets))
        return CandidateLayout(found, self.now_bucket)


def candidate_layout(
    offsets: Tensor,
    num_candidates: Tensor,
    timestamps: Tensor | None = None,
    at: Tensor | None = None,
    window: int = 0,
) -> CandidateLayout:
    """Args:
    offsets: int64 [B+1] of histories; num_candidates: int64 [B].
    timestamps: int64 [T] in s of the events, at: int64 [B] in s of the requests, for a time bias.
    window: as in `jagged_layout`.
    """
    users = []
    ends = num_candidates.cumsum(0).tolist()
    for user, (begin, end) in enumerate(pairwise(offsets.tolist())):
        begin = max(begin, end - window + 1) if window else begin
        distance = torch.arange(end - begin, 0, -1, device=offsets.device)
        buckets = None
        if timestamps is not None and at is not None:
            buckets = time_bucket(at[user] - timestamps[begin:end])
        candidates = slice(ends[user - 1] if user else 0, ends[user])
        users.append(_User(slice(begin, end), candidates, distance, buckets))
    return CandidateLayout(users, int(time_bucket(torch.zeros((), dtype=torch.int64))))


def candidate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: KeysAndValues,
    layout: CandidateLayout,
    *,
    kind: AttentionKind,
    scale: float,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
) -> Tensor:
    """[C, H, V] of candidates q, k [C, H, A] and v [C, H, V]; the rest as in `jagged_attention`.

    Not made for a backward pass: training takes `num_targets`.
    """
    own = (q * k).sum(-1).T  # [H, C]
    if kind == "softmax":
        own = own * scale
    if position_bias is not None:
        own = own + position_bias[:, :1]
    if time_bias is not None:
        own = own + time_bias[:, layout.now_bucket, None]
    queries, values, out = (
        q.transpose(0, 1),
        v.transpose(0, 1),
        torch.empty_like(v.transpose(0, 1)),
    )
    for user in layout.users:
        keys, seen = (one[:, user.past] for one in past)
        bias = _bias(user, position_bias, time_bias)
        size = max(MAX_BLOCK_SCORES // max(len(own) * keys.shape[1], 1), 1)
        for begin in range(user.candidates.start, user.candidates.stop, size):
            part = slice(begin, min(begin + size, user.candidates.stop))
            scores = torch.bmm(queries[:, part], keys.transpose(1, 2))
            if kind == "softmax":
                scores = scores * scale
            if bias is not None:
                scores = scores + bias
            weights, of_own = _weights(scores, own[:, part, None], kind)
            out[:, part] = torch.bmm(weights, seen) + of_own * values[:, part]
    out = out.transpose(0, 1)
    return out * scale if kind == "silu" else out


def _bias(user: _User, position_bias: Tensor | None, time_bias: Tensor | None) -> Tensor | None:
    """[1, 1, n] or [H, 1, n], the same for all candidates of a request."""
    bias = None
    if position_bias is not None:
        bias = position_bias[:, None, user.distance.clamp(max=position_bias.shape[1] - 1)]
    if time_bias is not None:
        assert user.buckets is not None, "a time bias needs a layout made with times"
        of_time = time_bias[:, None, user.buckets]
        bias = of_time if bias is None else bias + of_time
    return bias


def _weights(scores: Tensor, own: Tensor, kind: AttentionKind) -> tuple[Tensor, Tensor]:
    """Of events [H, c, n] and of the candidate itself [H, c, 1]."""
    if kind == "silu":
        return torch.nn.functional.silu(scores), torch.nn.functional.silu(own)
    weights = torch.softmax(torch.cat([scores, own], dim=-1), dim=-1)
    return weights[..., :-1], weights[..., -1:]
