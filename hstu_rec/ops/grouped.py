"""Jagged attention in plain torch: users of like length share a dense block, so padding costs little.

    lengths  3 3 4 | 9 11 | 48        three groups, blocks [3, 4, 4], [2, 11, 11], [1, 48, 48]

Runs on any device. Forward and backward are written out, because autograd over many small groups
costs more than their arithmetic.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hstu_rec.ops.reference import AttentionKind, time_bucket
from hstu_rec.transfer import on_device

# A group of its own costs about as much as this many score entries of a head.
GROUP_OVERHEAD_ENTRIES = 16384
# Bounds the memory of one block of scores (entries of one head).
MAX_BLOCK_ENTRIES = 2**23
# Scores and weights of at most this many entries (of all heads) a layer are kept for backward; those of
# further blocks are made again, to save memory. Kept, they save 4 % of a step on Beauty.
MAX_KEPT_ENTRIES = 2**22
# The score of a hidden key, finite in every float type: silu and its slope are 0 there, and softmax is
# while a score that is not hidden is above it by 100.
HIDDEN = -3e4


@dataclass(frozen=True)
class Group:
    """Users of like length as a dense block of H heads, b users, l events."""

    shape: tuple[int, int]  # b, l
    places: slice  # of the block among the H * b * l rows of all blocks
    distance: Tensor  # int64 [1, l, l], or [b, l, l] with candidates: between places, 0 above the diagonal
    hidden: Tensor  # bool [b, l, l]: key j is not seen by query i; all are hidden from padding
    buckets: Tensor | None  # int64 [b, l, l]: time bucket of (query i, key j), for a time bias

    def block(self, rows: Tensor) -> Tensor:
        """This group's part [H * b, l, A] of the rows of all blocks, a view."""
        return rows[self.places].view(-1, self.shape[1], rows.shape[-1])

    def distance_in(self, table: Tensor) -> Tensor:
        """`distance`, cut to the range of a bias table [., P]."""
        longest = table.shape[1] - 1
        return self.distance if self.shape[1] <= longest + 1 else self.distance.clamp(max=longest)

    def to(self, device: torch.device) -> "Group":
        """The group on `device`."""
        if self.buckets is None or device == self.buckets.device:
            return on_device(self, device)
        # By far the largest part, so that it travels as bytes (NUM_TIME_BUCKETS < 256).
        buckets = self.buckets.to(torch.uint8).to(device, non_blocking=True).long()
        return replace(on_device(replace(self, buckets=None), device), buckets=buckets)


@dataclass(frozen=True)
class GroupedLayout:
    """How a jagged batch is cut into groups; made once a batch and shared by all layers.

    One gather makes all blocks, one gather takes their events back: small batches are bound by the
    number of operations.
    """

    groups: list[Group]
    num_heads: int
    gather: Tensor  # int64: row of [T * H] at each place; padding repeats the user's first event
    restore: Tensor  # int64 [T * H]: place of each row
    num_targets: Tensor | None  # int64 [B]; None without candidates

    def dense(self, x: Tensor) -> Tensor:
        """The rows of all blocks, one after another, of a jagged [T, H, A]."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.gather)

    def jagged(self, rows: Tensor) -> Tensor:
        """[T, H, A] of the rows of all blocks, without padding."""
        return rows.index_select(0, self.restore).unflatten(0, (-1, self.num_heads))

    def to(self, device: torch.device) -> "GroupedLayout":
        """The layout on `device`; made on CPU and moved, it costs no wait for the device."""
        return replace(on_device(self, device), groups=[g.to(device) for g in self.groups])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        """`grouped_attention` of the batch."""
        return grouped_attention(q, k, v, self, **settings)


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


def grouped_layout(
    offsets: Tensor,
    num_heads: int,
    timestamps: Tensor | None = None,
    query_times: Tensor | None = None,
    num_targets: Tensor | None = None,
    window: int = 0,
) -> GroupedLayout:
    """The layout of a batch with int64 `offsets` [B+1]; arguments as in `hstu_rec.ops.jagged_layout`."""
    device = offsets.device
    starts = offsets.cpu()
    lengths = (starts[1:] - starts[:-1]).tolist()
    targets = None if num_targets is None else num_targets.cpu()
    heads = torch.arange(num_heads)[:, None]
    groups: list[Group] = []
    none = torch.zeros(0, dtype=torch.int64)
    gathered, events, places = [none], [none], [none]
    begin = 0
    for users in length_groups(lengths):
        longest = lengths[users[0]]
        index = torch.tensor(users)
        steps = torch.arange(longest)
        is_event = steps < index.new_tensor([lengths[u] for u in users])[:, None]
        first = starts[index][:, None]
        rows = torch.where(is_event, first + steps, first)
        distance, hidden = _relations(steps, index, starts, targets)
        hidden = hidden | ~is_event[:, :, None]
        if window:
            hidden = hidden | (distance >= window)
        buckets = None
        if timestamps is not None:
            now, at = timestamps if query_times is None else query_times, rows.to(device)
            buckets = time_bucket(now[at][:, :, None] - timestamps[at][:, None, :])
        end = begin + num_heads * rows.numel()
        shape, place = (len(users), longest), slice(begin, end)
        groups.append(Group(shape, place, distance.to(device), hidden.to(device), buckets))
        gathered.append((rows.flatten() * num_heads + heads).flatten())
        real = is_event.flatten().nonzero()[:, 0]
        events.append((rows.flatten()[real] * num_heads + heads).flatten())
        places.append((begin + real + rows.numel() * heads).flatten())
        begin = end
    restore = torch.empty(int(starts[-1]) * num_heads, dtype=torch.int64)
    restore[torch.cat(events)] = torch.cat(places)
    gather = torch.cat(gathered)
    return GroupedLayout(groups, num_heads, gather.to(device), restore.to(device), num_targets)


def _relations(
    steps: Tensor, users: Tensor, starts: Tensor, num_targets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(distance, hidden) of queries and keys at `steps` [l] of a group's users, [1, l, l], or [b, l, l] with
    candidates; padding is not hidden yet."""
    if num_targets is None:
        distance = (steps[:, None] - steps)[None]
        return distance.clamp(min=0), distance < 0
    first_target = (starts[users + 1] - starts[users] - num_targets[users])[:, None]
    # Candidates stand where the next event would, and see no other candidate.
    place = torch.minimum(steps, first_target)
    distance = (place[:, :, None] - place[:, None, :]).clamp_(min=0)
    is_other = (steps[:, None] != steps) & (steps >= first_target)[:, None, :]
    return distance, (steps[:, None] < steps) | is_other


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: GroupedLayout,
    *,
    kind: AttentionKind,
    scale: float,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
) -> Tensor:
    """Causal attention [T, H, V]; arguments as in `hstu_rec.ops.jagged_attention`."""
    if time_bias is not None and any(group.buckets is None for group in layout.groups):
        raise ValueError("time_bias is given without timestamps; pass int64 timestamps [T] in s")
    return _GroupedAttention.apply(q, k, v, position_bias, time_bias, layout, kind, scale)


def _scores(
    q: Tensor, k: Tensor, group: Group, position_bias: Tensor | None, time_bias: Tensor | None
) -> Tensor:
    """q kᵀ + bias, or HIDDEN, [H, b, l, l], of a group's blocks q and k [H * b, l, A]."""
    users, length = group.shape
    scores = torch.bmm(q, k.transpose(1, 2)).view(-1, users, length, length)
    if position_bias is not None:
        scores += position_bias[:, group.distance_in(position_bias)]
    if time_bias is not None:
        assert group.buckets is not None, "a time bias needs a layout made with timestamps"
        scores += time_bias[:, group.buckets]
    return scores.masked_fill_(group.hidden, HIDDEN)


def _weights(scores: Tensor, hidden: Tensor, kind: AttentionKind) -> Tensor:
    """Attention weights [H, b, l, l]; 0 where a key is hidden, and on padded queries."""
    if kind == "silu":
        return torch.nn.functional.silu(scores)
    return torch.softmax(scores, dim=-1).masked_fill_(hidden, 0)


class _GroupedAttention(torch.autograd.Function):
    """softmax scales the scores, silu the output: the scale is put on rows, outside the groups."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, position_bias, time_bias, layout, kind, scale = inputs
        rows = q, k, v = tuple(layout.dense(x) for x in (q, k, v))
        if kind == "softmax":
            q.mul_(scale)
        ctx.layout, ctx.kind, ctx.scale = layout, kind, scale
        out, room, kept = torch.empty_like(v), MAX_KEPT_ENTRIES, []
        for group in layout.groups:
            scores = _scores(group.block(q), group.block(k), group, position_bias, time_bias)
            weights = _weights(scores, group.hidden, kind)
            is_kept = scores.numel() <= room
            room -= scores.numel() if is_kept else 0
            kept += (scores, weights) if is_kept else (None, None)
            torch.bmm(weights.flatten(0, 1), group.block(v), out=group.block(out))
        # All of it this way, which lets torch's checkpoint leave it out and make it again.
        ctx.save_for_backward(*rows, position_bias, time_bias, *kept)
        out = layout.jagged(out)
        return out.mul_(scale) if kind == "silu" else out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, position_bias, time_bias, *kept = ctx.saved_tensors
        layout, kind, scale = ctx.layout, ctx.kind, ctx.scale
        grad_out = layout.dense(grads[0])
        if kind == "silu":
            grad_out.mul_(scale)
        grad_rows = tuple(torch.empty_like(x) for x in (q, k, v))
        grad_position = None if position_bias is None else torch.zeros_like(position_bias)
        grad_time = None if time_bias is None else torch.zeros_like(time_bias)
        for group, scores, weights in zip(layout.groups, kept[::2], kept[1::2], strict=True):
            block_q, block_k, block_v, block_out = (group.block(x) for x in (q, k, v, grad_out))
            grad_q, grad_k, grad_v = (group.block(x) for x in grad_rows)
            if scores is None:
                scores = _scores(block_q, block_k, group, position_bias, time_bias)
                weights = _weights(scores, group.hidden, kind)
            # Padded queries have weight 0, so their repeated rows of grad_out add nothing.
            torch.bmm(weights.flatten(0, 1).transpose(1, 2), block_out, out=grad_v)
            grad_scores = torch.bmm(block_out, block_v.transpose(1, 2)).view_as(scores)
            if kind == "silu":
                grad_scores = torch.ops.aten.silu_backward(grad_scores, scores)
            else:
                mean = (weights * grad_scores).sum(-1, keepdim=True)
                grad_scores = grad_scores.sub_(mean).mul_(weights)
            flat = grad_scores.flatten(0, 1)
            torch.bmm(flat, block_k, out=grad_q)
            torch.bmm(flat.transpose(1, 2), block_q, out=grad_k)
            _add_bias_grads(grad_scores, group, grad_position, grad_time)
        if kind == "softmax":
            grad_rows[0].mul_(scale)
        return *map(layout.jagged, grad_rows), grad_position, grad_time, None, None, None


def _add_bias_grads(
    grad_scores: Tensor, group: Group, grad_position: Tensor | None, grad_time: Tensor | None
) -> None:
    """Adds a group's score gradients [H, b, l, l] to the bias tables' gradients, in place."""
    for table in (grad_position, grad_time):
        if table is None:
            continue
        is_shared = table.shape[0] == 1
        per_row = grad_scores.sum(0, True, dtype=table.dtype) if is_shared else grad_scores
        index = group.buckets
        if table is grad_position:
            index = group.distance_in(table)
            if len(index) == 1:
                per_row = per_row.sum(1, dtype=table.dtype)
        assert index is not None
        table.index_add_(1, index.reshape(-1), per_row.reshape(len(table), -1).to(table.dtype))
