"""Which candidates, and which targets, the history of a position holds: what the seen bias is added to.

The history of position p of a user is events first .. p, so that an item is seen from its first event on.
"""

import numpy as np
import torch
from torch import Tensor

from hstu_rec.data.batch import SequenceBatch
from hstu_rec.softmax import places


def seen_candidates(batch: SequenceBatch, ids: Tensor) -> Tensor:
    """int64 [3, F] (first, end, place), by place: positions first .. end - 1 of `batch` have seen the item
    at `place` among the distinct sorted `ids`."""
    place, row = places(batch.item_ids, ids), _rows(batch)
    event = torch.nonzero(place >= 0)[:, 0]
    # The first of a user's events with each item.
    keys = place[event] * len(batch.offsets) + row[event]
    event = event[torch.from_numpy(np.unique(keys.numpy(), return_index=True)[1])]
    return torch.stack([event, batch.offsets[1:][row[event]], place[event]])


def seen_targets(batch: SequenceBatch) -> Tensor:
    """bool [T]: whether the target of a position of a training batch is in the position's history."""
    row = _rows(batch)
    size = int(torch.cat([batch.item_ids, batch.target_ids]).max()) + 1 if len(row) else 1
    keys, first = np.unique((row * size + batch.item_ids).numpy(), return_index=True)
    place = places(row * size + batch.target_ids, torch.from_numpy(keys))
    # Never seen counts as seen after the end.
    begins = torch.from_numpy(np.append(first, len(row)))[place]
    return begins <= torch.arange(len(row))


def _rows(batch: SequenceBatch) -> Tensor:
    """int64 [T]: the user of each event, by the place in the batch."""
    return torch.repeat_interleave(torch.arange(len(batch.offsets) - 1), batch.offsets.diff())
