"""NextItemModel: one lookup, the encoder, the loss; the module that DistributedModelParallel wraps."""

import torch
from torch import Tensor, nn

from hstu_rec.data.batch import SequenceBatch
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.loss import Negatives, SampledSoftmax


class NextItemModel(nn.Module):
    """Next-item training loss and query vectors.

    `table` maps distinct sorted int64 ids [R] to rows [R, D]: an ItemTable, or anything of that form.
    """

    def __init__(self, table: nn.Module, encoder: HSTUEncoder, loss: SampledSoftmax) -> None:
        super().__init__()
        self.table, self.encoder, self.loss = table, encoder, loss

    def _look_up(self, *ids: Tensor) -> list[Tensor]:
        """Rows of each of `ids` from one deduplicated lookup."""
        unique, inverse = torch.unique(torch.cat(ids), return_inverse=True)
        rows = self.table(unique)
        return [rows.index_select(0, part) for part in inverse.split([len(i) for i in ids])]

    def _encode(self, rows: Tensor, batch: SequenceBatch) -> Tensor:
        return self.encoder(rows, batch.offsets, batch.timestamps, batch.next_timestamps)

    def forward(
        self, batch: SequenceBatch, negatives: Negatives | None = None
    ) -> tuple[Tensor, ...]:
        """With `negatives`: (sum of this rank's losses,). Without: (queries [B, D], target vectors [B, D]).

        One method, because DistributedModelParallel wraps `forward`.
        """
        if negatives is None:
            return self._queries(batch)
        history, targets, rows = self._look_up(batch.item_ids, batch.target_ids, negatives.ids)
        encoded = self._encode(history, batch)
        return (self.loss(encoded, targets, batch.target_ids, rows, negatives),)

    def _queries(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """One query a user, at its newest event, and the vector of its target, as they are scored."""
        history, targets = self._look_up(batch.item_ids, batch.target_ids)
        encoded = self._encode(history, batch)[batch.offsets[1:] - 1]
        return self.loss.query_vectors(encoded), self.loss.item_vectors(targets)
