"""Jagged attention in plain torch: users of like length share a dense block, so padding costs little.

    lengths  3 3 4 | 9 11 | 48        three groups, blocks [3, 4, 4], [2, 11, 11], [1, 48, 48]

Runs on any device. Forward and backward are written out, because autograd over many small groups
costs more than their arithmetic.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hstu_rec.ops.reference import AttentionKind, time_bucket

# A group of its own costs about as much as this many score entries of a head.
GROUP_OVERHEAD_ENTRIES = 8192
# Bounds the memory of one block of scores (entries of one head).
MAX_BLOCK_ENTRIES = 2**23


@dataclass(frozen=True)
class Group:
    """Users of like length as a dense block of b users by l events."""

    shape: tuple[int, int]  # b, l
    rows: Tensor  # int64 [b * l]: event of the jagged batch; padding repeats the user's first
    events: Tensor  # int64: the places of rows that are no padding
    visible: Tensor  # bool [b, 1, l, l]: key j is seen by query i
    buckets: Tensor | None  # int64 [b, l, l]: time bucket of (query i, key j), for a time bias

    def dense(self, x: Tensor) -> Tensor:
        """The group's part [b, H, l, A] of a jagged [T, H, A]."""
        return x.index_select(0, self.rows).unflatten(0, self.shape).transpose(1, 2)

    def jagged(self, x: Tensor) -> Tensor:
        """The events [t, H, A] of a dense [b, H, l, A], without padding."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.events)


@dataclass(frozen=True)
class JaggedLayout:
    """How a jagged batch is cut into groups; made once a batch and shared by all layers."""

    groups: list[Group]
    restore: Tensor  # int64 [T]: place of each event among the groups' events, one after another


def length_groups(lengths: list[int]) -> list[list[int]]:
    """Users by group, longest first; a user joins the group above while that costs less than a new one."""
    order = sorted((u for u, length in enumerate(lengths) if length), key=lambda u: -lengths[u])
    groups: list[list[int]] = []
    waste = 0
    for user in order:
        longest = lengths[groups[-1][0]] if groups else 0
        extra = longest**2 - lengths[user] ** 2
        is_full = bool(groups) and (len(groups[-1]) + 1) * longest**2 > MAX_BLOCK_ENTRIES
        if not groups or is_full or waste + extra > GROUP_OVERHEAD_ENTRIES:
            groups.append([user])
            waste = 0
        else:
            groups[-1].append(user)
            waste += extra
    return groups


def jagged_layout(
    offsets: Tensor, timestamps: Tensor | None = None, query_times: Tensor | None = None
) -> JaggedLayout:
    """The layout of a batch with int64 `offsets` [B+1]; times (int64 [T], s) only for a time bias."""
    device = offsets.device
    starts = offsets.cpu()
    lengths = (starts[1:] - starts[:-1]).tolist()
    groups, placed = [], []
    for users in length_groups(lengths):
        longest = lengths[users[0]]
        index = torch.tensor(users)
        steps = torch.arange(longest)
        is_event = steps < torch.tensor([lengths[u] for u in users])[:, None]
        first = starts[index][:, None]
        rows = torch.where(is_event, first + steps, first)
        placed.append(rows[is_event])
        visible = (steps[:, None] >= steps) & is_event[:, :, None]
        buckets = None
        if timestamps is not None:
            now, at = timestamps if query_times is None else query_times, rows.to(device)
            buckets = time_bucket(now[at][:, :, None] - timestamps[at][:, None, :])
        events = is_event.flatten().nonzero()[:, 0]
        groups.append(
            Group(
                (len(users), longest),
                rows.flatten().to(device),
                events.to(device),
                visible[:, None].to(device),
                buckets,
            )
        )
    order = torch.cat(placed) if placed else torch.zeros(0, dtype=torch.int64)
    restore = torch.empty_like(order)
    restore[order] = torch.arange(len(order))
    return JaggedLayout(groups, restore.to(device))


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    *,
    kind: AttentionKind,
    scale: float,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
) -> Tensor:
    """Causal attention [T, H, V]; arguments as in `hstu_rec.ops.jagged_attention`."""
    return _GroupedAttention.apply(q, k, v, position_bias, time_bias, layout, kind, scale)


def _distance(length: int, table: Tensor) -> Tensor:
    """int64 [l, l]: i - j, cut to the table's range (entries above the diagonal are never used)."""
    steps = torch.arange(length, device=table.device)
    return (steps[:, None] - steps).clamp(0, table.shape[1] - 1)


def _scores(
    q: Tensor, k: Tensor, group: Group, position_bias: Tensor | None, time_bias: Tensor | None
) -> Tensor:
    """q kᵀ + bias, [b, H, l, l], of a group's dense q and k [b, H, l, A]."""
    scores = q @ k.transpose(-1, -2)
    if position_bias is not None:
        scores += position_bias[:, _distance(scores.shape[-1], position_bias)]
    if time_bias is not None:
        assert group.buckets is not None, "a time bias needs a layout made with timestamps"
        scores += time_bias[:, group.buckets].transpose(0, 1)
    return scores


def _weights(scores: Tensor, visible: Tensor, kind: AttentionKind, scale: float) -> Tensor:
    """Attention weights [b, H, l, l]; 0 where a key is not visible, and on padded queries."""
    if kind == "silu":
        return torch.nn.functional.silu(scores).mul_(visible).mul_(scale)
    return torch.softmax(scores.masked_fill(~visible, -1e30), dim=-1) * visible


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, position_bias, time_bias, layout, kind, scale = inputs
        ctx.save_for_backward(q, k, v, position_bias, time_bias)
        ctx.layout, ctx.kind, ctx.scale = layout, kind, scale
        parts = [v.new_zeros((0, *v.shape[1:]))]
        for group in layout.groups:
            dense_q, dense_k, dense_v = (group.dense(x) for x in (q, k, v))
            if kind == "softmax":
                dense_q = dense_q * scale
            scores = _scores(dense_q, dense_k, group, position_bias, time_bias)
            weights = _weights(scores, group.visible, kind, scale)
            parts.append(group.jagged(weights @ dense_v))
        return torch.cat(parts).index_select(0, layout.restore)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, position_bias, time_bias = ctx.saved_tensors
        (grad_out,) = grads
        parts = tuple([x.new_zeros((0, *x.shape[1:]))] for x in (q, k, v))
        grad_position = None if position_bias is None else torch.zeros_like(position_bias)
        grad_time = None if time_bias is None else torch.zeros_like(time_bias)
        for group in ctx.layout.groups:
            dense_q, dense_k, dense_v, dense_out = (group.dense(x) for x in (q, k, v, grad_out))
            if ctx.kind == "softmax":
                dense_q = dense_q * ctx.scale
            scores = _scores(dense_q, dense_k, group, position_bias, time_bias)
            weights = _weights(scores, group.visible, ctx.kind, ctx.scale)
            grad_scores = dense_out @ dense_v.transpose(-1, -2)
            if ctx.kind == "silu":
                gate = torch.sigmoid(scores)
                slope = gate * (1 + scores * (1 - gate))
                grad_scores.mul_(slope).mul_(group.visible).mul_(ctx.scale)
            else:
                grad_scores = weights * (
                    grad_scores - (weights * grad_scores).sum(-1, keepdim=True)
                )
            factor = ctx.scale if ctx.kind == "softmax" else 1.0
            dense_grads = (
                grad_scores @ dense_k * factor,
                grad_scores.transpose(-1, -2) @ dense_q,
                # Padded queries have weight 0, so their repeated rows of grad_out add nothing.
                weights.transpose(-1, -2) @ dense_out,
            )
            for part, dense in zip(parts, dense_grads, strict=True):
                part.append(group.jagged(dense))
            _add_bias_grads(grad_scores, group, grad_position, grad_time)
        grad_q, grad_k, grad_v = (
            torch.cat(part).index_select(0, ctx.layout.restore) for part in parts
        )
        return grad_q, grad_k, grad_v, grad_position, grad_time, None, None, None


def _add_bias_grads(
    grad_scores: Tensor, group: Group, grad_position: Tensor | None, grad_time: Tensor | None
) -> None:
    """Adds a group's score gradients [b, H, l, l] to the bias tables' gradients, in place."""
    for table, index in (
        (grad_position, None),
        (grad_time, group.buckets),
    ):
        if table is None:
            continue
        per_row = grad_scores.sum(1, keepdim=True) if table.shape[0] == 1 else grad_scores
        if index is None:
            per_row, index = per_row.sum(0), _distance(grad_scores.shape[-1], table)
        else:
            per_row = per_row.transpose(0, 1)
        table.index_add_(1, index.reshape(-1), per_row.reshape(table.shape[0], -1))
