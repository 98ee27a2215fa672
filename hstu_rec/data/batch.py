"""SequenceBatch: users' histories one after another, never padded.

item_ids    a b c | p q          offsets  0 3 5
target_ids  b c d | q r          (training: every position has a target)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_rec.transfer import on_device


@dataclass(frozen=True)
class SequenceBatch:
    """One rank's part of a batch of B users with T events; everything int64."""

    item_ids: Tensor
    """[T] item index."""
    timestamps: Tensor
    """[T] s."""
    next_timestamps: Tensor
    """[T] s: time of the event that follows (the one to predict)."""
    offsets: Tensor
    """[B+1]: user b owns events offsets[b] .. offsets[b+1]."""
    target_ids: Tensor
    """[T] in training (one a position), [B] in evaluation (one a user)."""
    num_targets_global: int
    """Targets of this batch over all ranks; in evaluation, of this rank."""

    def to(self, device: torch.device) -> "SequenceBatch":
        """The batch on `device`."""
        return on_device(self, device)
