"""NextItemModel: one lookup, the encoder, the loss; the module that DistributedModelParallel wraps."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hstu_rec.data.batch import SequenceBatch
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.item_table import SentIds
from hstu_rec.loss import Negatives, SampledSoftmax


@dataclass(frozen=True)
class Lookup:
    """What a batch reads from the table: every id once, and where each use finds its rows."""

    ids: Tensor  # int64 [R], distinct, sorted
    places: tuple[Tensor, ...]  # of histories, of targets, of negatives if any: int64 into the rows
    sent: SentIds | None = None  # the ids on their way, when they were sent ahead

    @classmethod
    def of(cls, batch: SequenceBatch, negatives: Negatives | None = None) -> "Lookup":
        """The one deduplicated lookup of a batch."""
        uses = [batch.item_ids, batch.target_ids]
        if negatives is not None:
            uses.append(negatives.ids)
        unique, places = torch.unique(torch.cat(uses), return_inverse=True)
        return cls(unique, places.split([len(ids) for ids in uses]))

    def to(self, device: torch.device) -> "Lookup":
        """The lookup on `device`, before its ids are sent."""
        places = tuple(place.to(device, non_blocking=True) for place in self.places)
        return Lookup(self.ids.to(device, non_blocking=True), places)


class NextItemModel(nn.Module):
    """Next-item training loss and query vectors.

    `table` maps distinct sorted int64 ids [R] to rows [R, D]: an ItemTable, or anything of that form.
    """

    def __init__(self, table: nn.Module, encoder: HSTUEncoder, loss: SampledSoftmax) -> None:
        super().__init__()
        self.table, self.encoder, self.loss = table, encoder, loss

    def forward(
        self,
        batch: SequenceBatch,
        negatives: Negatives | None = None,
        lookup: Lookup | None = None,
    ) -> tuple[Tensor, ...]:
        """With `negatives`: (sum of this rank's losses,). Without: (queries [B, D], target vectors [B, D]).

        `lookup`, of the same batch and negatives, is made here when it was not made ahead.
        One method, because DistributedModelParallel wraps `forward`.
        """
        lookup = lookup or Lookup.of(batch, negatives)
        rows = self.table(lookup.ids) if lookup.sent is None else lookup.sent.rows()
        history, targets, *rest = (rows.index_select(0, place) for place in lookup.places)
        encoded = self.encoder(history, batch.offsets, batch.timestamps, batch.next_timestamps)
        if negatives is not None:
            return (self.loss(encoded, targets, batch.target_ids, rest[0], negatives),)
        # One query a user, at its newest event, and its target, both as they are scored.
        newest = encoded[batch.offsets[1:] - 1]
        return self.loss.query_vectors(newest), self.loss.item_vectors(targets)
