"""Which candidates, and which targets, the history of a position holds: what the seen bias is added to.

The history of position p of a user is events first .. p, so that an item is seen from its first event on.
"""

import numpy as np
import torch
from torch import Tensor

from hstu_rec.data.batch import SequenceBatch
from hstu_rec.softmax import places


def seen_candidates(batch: SequenceBatch, ids: Tensor) -> Tensor:
    """int64 [2, S], in order: every (position of `batch`, place in the distinct sorted `ids`) seen."""
    place = places(batch.item_ids, ids)
    event = torch.nonzero(place >= 0)[:, 0]
    row, ends = _rows(batch), batch.offsets[1:]
    # The first of a user's events with each item.
    _, first = np.unique((row[event] * len(ids) + place[event]).numpy(), return_index=True)
    event = event[first]
    counts = ends[row[event]] - event
    # Event e stands for positions e .. end: one after another, what each is ahead of its event by.
    ahead = torch.arange(int(counts.sum())) - torch.repeat_interleave(
        counts.cumsum(0) - counts, counts
    )
    position = torch.repeat_interleave(event, counts) + ahead
    place = torch.repeat_interleave(place[event], counts)
    order = torch.argsort(position * len(ids) + place)
    return torch.stack([position, place])[:, order]


def seen_targets(batch: SequenceBatch) -> Tensor:
    """bool [T]: whether the target of a position of a training batch is in the position's history."""
    row = _rows(batch)
    size = int(torch.cat([batch.item_ids, batch.target_ids]).max()) + 1 if len(row) else 1
    keys, first = np.unique((row * size + batch.item_ids).numpy(), return_index=True)
    place = places(row * size + batch.target_ids, torch.from_numpy(keys))
    is_found = place >= 0
    is_found[is_found.clone()] = (
        torch.from_numpy(first)[place[is_found]] <= torch.nonzero(is_found)[:, 0]
    )
    return is_found


def _rows(batch: SequenceBatch) -> Tensor:
    """int64 [T]: the user of each event, by the place in the batch."""
    return torch.repeat_interleave(torch.arange(len(batch.offsets) - 1), batch.offsets.diff())
