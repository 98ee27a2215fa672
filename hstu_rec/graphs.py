"""The dense part of a step as one CUDA graph: a small model's step is the host's, a launch an operation.

A graph has tensors of fixed sizes. So a batch is filled up to sizes that many batches share, an eighth more
at most but for small ones: with histories of dummy events, whose positions are not scored, with candidates
of weight 0, and with blocks of no user. A graph is captured for each combination of sizes, and replayed on
copies of what comes.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hstu_rec.data.batch import SequenceBatch
from hstu_rec.model import Lookup, NextItemModel
from hstu_rec.ops.triton_layout import BlockLayout
from hstu_rec.softmax import CHUNK_LOGITS, Negatives
from hstu_rec.transfer import tensors_of, with_tensors

# Sizes are filled up to multiples of these at least: few sizes, and little to compute for nothing.
EVENTS, USERS, CANDIDATES, SEEN_RANGES, SEEN_PAIRS = 512, 64, 256, 1024, 4096
# Dummy events that a batch has at least, so that pairs that stand for nothing have a place.
MIN_DUMMIES = 128
# A graph keeps its inputs and gradients; what it makes between shares one pool with the others.
MAX_GRAPHS = 64


def _up(size: int, step: int) -> int:
    """`size` up to a multiple of `step`, or of an eighth of the power of 2 above."""
    step = max(step, 2 ** (max(size - 1, 0).bit_length() - 3))
    return math.ceil(size / step) * step


def _filled(values: Tensor, size: int, value: Any = 0) -> Tensor:
    """`values` [n, ...] and `value` up to `size`."""
    rest = values.new_full((size - len(values), *values.shape[1:]), value)
    return torch.cat([values, rest])


def filled_batch(batch: SequenceBatch, max_history_len: int) -> SequenceBatch:
    """The batch with dummy users after its own: item 0 at time 0."""
    num_events = len(batch.item_ids)
    size = _up(num_events + MIN_DUMMIES, EVENTS)
    dummies = torch.arange(num_events, size, max_history_len)[1:]
    ends = torch.cat([batch.offsets, dummies, torch.tensor([size])])
    # One user without events at least, whose are the blocks of no user.
    num_users = _up(len(ends), USERS)
    names = ("item_ids", "timestamps", "next_timestamps", "target_ids")
    events = {name: _filled(getattr(batch, name), size) for name in names}
    return replace(batch, **events, offsets=_filled(ends, num_users + 1, size))


def filled_negatives(negatives: Negatives, num_events: int, size: int) -> Negatives:
    """Negatives of a batch of `num_events` filled up to `size`: what is beyond is not scored."""
    is_scored = torch.arange(size) < num_events
    changed: dict[str, Any] = {"is_scored": is_scored}
    if not negatives.is_divided:
        count = _up(len(negatives.ids), CANDIDATES)
        weights = negatives.log_weights
        weights = torch.zeros(len(negatives.ids)) if weights is None else weights
        changed["ids"] = _filled(negatives.ids, count, torch.iinfo(torch.int64).max)
        changed["log_weights"] = _filled(weights, count, -math.inf)
    for name in ("target_log_q", "is_target_seen"):
        if (value := getattr(negatives, name)) is not None:
            changed[name] = _filled(value, size)
    if negatives.seen is not None:
        num_logits = size * len(changed.get("ids", negatives.ids))
        if num_logits > CHUNK_LOGITS["cuda"]:
            raise ValueError(
                f"a graph with loss.use_seen_bias holds all logits at once, {num_logits} here of at most "
                f"{CHUNK_LOGITS['cuda']}; make batches smaller, or set train.cuda_graphs=false"
            )
        changed |= _filled_seen(negatives.seen, num_events, size)
    return replace(negatives, **changed)


def _filled_seen(seen: Tensor, num_events: int, size: int) -> dict[str, Any]:
    """Ranges and pairs that stand for nothing come first: of dummy events and the first candidate."""
    pairs = int((seen[1] - seen[0]).sum())
    wanted, dummies = _up(pairs + 1, SEEN_PAIRS), size - num_events
    whole, rest = divmod(wanted - pairs, dummies)
    ends = torch.tensor([size] * whole + [num_events + rest])
    ranges = torch.stack([torch.full_like(ends, num_events), ends, torch.zeros_like(ends)])
    count = _up(seen.shape[1] + ranges.shape[1], SEEN_RANGES)
    nothing = ranges.new_zeros(3, count - seen.shape[1] - ranges.shape[1])
    return {"seen": torch.cat([ranges, nothing, seen], 1), "num_seen": wanted}


def filled_lookup(lookup: Lookup, sizes: tuple[int, ...]) -> Lookup:
    """The lookup with places of row 0 up to `sizes` of histories, targets and negatives."""
    if sizes == lookup.counts:
        return lookup
    parts = lookup.places.split(lookup.counts)
    places = [_filled(part, size) for part, size in zip(parts, sizes, strict=True)]
    return replace(lookup, places=torch.cat(places), counts=sizes)


def filled_layout(layout: BlockLayout, max_history_len: int) -> BlockLayout:
    """The layout of a filled batch with blocks of the last user, which has no events."""
    num_users, num_events = len(layout.offsets) - 1, int(layout.offsets[-1])
    count = num_users + num_events // layout.block
    blocks = {
        "query_users": num_users - 1, "query_begins": 0, "key_users": num_users - 1, "key_begins": 0
    }  # fmt: skip
    filled = {name: _filled(getattr(layout, name), count, value) for name, value in blocks.items()}
    return replace(layout, **filled, longest=max_history_len)


class DenseGraphs:
    """`NextItemModel.dense` of filled inputs, as a graph on CUDA; elsewhere the same on its own copies."""

    def __init__(self, model: NextItemModel) -> None:
        self._model, self._pool = model, None
        self._made: dict[Any, tuple[list[Tensor], Callable[[Tensor], Tensor]]] = {}

    def __call__(self, gathered: Tensor, *inputs: Any) -> Tensor:
        """The sum of losses of rows `gathered`; `inputs` are the batch, its negatives and layout."""
        key = len(gathered), *(_form(value) for value in inputs)
        tensors = [tensor for value in inputs for tensor in tensors_of(value)]
        if key not in self._made:
            if len(self._made) == MAX_GRAPHS:
                warnings.warn(
                    f"batches have had more than {MAX_GRAPHS} sizes; those of other sizes run without a "
                    "graph: batches of data.batch_events events have fewer",
                    stacklevel=2,
                )
                return self._model.dense(gathered, *inputs)
            self._made[key] = self._capture(gathered, inputs)
        copies, replay = self._made[key]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)
        return replay(gathered)

    def _capture(
        self, gathered: Tensor, inputs: tuple[Any, ...]
    ) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
        copies = [tensor.clone() for value in inputs for tensor in tensors_of(value)]
        moved = iter(copies)
        dense = _Dense(self._model, [with_tensors(value, moved) for value in inputs])
        if not gathered.is_cuda:
            return copies, dense
        sample = gathered.detach().clone().requires_grad_()
        state = torch.cuda.get_rng_state(gathered.device)
        # Graphs of one pool overwrite each other's tensors: each is done before the next is replayed.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        replay: Any = torch.cuda.make_graphed_callables(dense, (sample,), pool=self._pool)
        torch.cuda.set_rng_state(state, gathered.device)  # as if the graph had been there
        return copies, replay


class _Dense(nn.Module):
    """The dense part of fixed inputs, and its parameters."""

    def __init__(self, model: NextItemModel, inputs: list[Any]) -> None:
        super().__init__()
        self.encoder, self.loss, self.inputs = model.encoder, model.loss, inputs
        self.run = model.dense

    def forward(self, gathered: Tensor) -> Tensor:
        return self.run(gathered, *self.inputs)


def _form(value: Any) -> Any:
    """What a graph of a dataclass depends on: shapes and dtypes of its tensors, and all else."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if is_dataclass(value):
        # The batch's number of targets is of the loss's mean, which is no part of the graph.
        names = [field.name for field in fields(value) if field.name != "num_targets_global"]
        return tuple(_form(getattr(value, name)) for name in names)
    return value
