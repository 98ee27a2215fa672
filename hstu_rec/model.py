"""NextItemModel: one lookup, the encoder, the loss; the module that DistributedModelParallel wraps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hstu_rec.data.batch import SequenceBatch
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.item_table import SentIds, check_ids
from hstu_rec.loss import SampledSoftmax
from hstu_rec.ops import JaggedLayout
from hstu_rec.softmax import Negatives
from hstu_rec.transfer import on_device


@dataclass(frozen=True)
class Lookup:
    """What a batch reads from the table: every id once, and where each use finds its rows."""

    ids: Tensor  # int64 [R], distinct, sorted
    places: Tensor  # int64 into the rows: of histories, then targets, then negatives if any
    counts: tuple[int, ...]  # of each

    @classmethod
    def of(cls, batch: SequenceBatch, negatives: Negatives | None = None) -> "Lookup":
        """The one deduplicated lookup of a batch. Raises ValueError for ids outside a whole catalogue."""
        uses = [batch.item_ids, batch.target_ids]
        if negatives is not None:
            uses.append(negatives.ids)
            if negatives.is_whole:
                check_ids(torch.cat(uses), len(negatives.ids))
        return cls.of_uses(uses, negatives)

    @classmethod
    def of_uses(cls, uses: list[Tensor], negatives: Negatives | None = None) -> "Lookup":
        """That of int64 ids by use, checked already: of histories, targets and, if any, `negatives`."""
        places, counts = torch.cat(uses), tuple(len(ids) for ids in uses)
        if negatives is not None and negatives.is_whole:
            return cls(negatives.ids, places, counts)
        unique, places = torch.unique(places, return_inverse=True)
        return cls(unique, places, counts)

    def to(self, device: torch.device) -> "Lookup":
        """The lookup on `device`."""
        return on_device(self, device)


class NextItemModel(nn.Module):
    """Next-item training loss and query vectors.

    `table` maps distinct sorted int64 ids [R] to rows [R, D]: an ItemTable, or anything of that form.
    `dtype`: of the encoder's and the fused loss's products, float32 or bfloat16; what goes in and comes out
    is float32.
    """

    def __init__(
        self,
        table: nn.Module,
        encoder: HSTUEncoder,
        loss: SampledSoftmax,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.table, self.encoder, self.loss, self.dtype = table, encoder, loss, dtype
        self.graphs: Callable[..., Tensor] | None = None

    def forward(
        self,
        batch: SequenceBatch,
        negatives: Negatives | None = None,
        lookup: Lookup | None = None,
        sent: SentIds | None = None,
        layout: JaggedLayout | None = None,
    ) -> tuple[Tensor, ...]:
        """With `negatives`: (sum of this rank's losses,). Without: (queries [B, D], target rows [B, D]).

        `lookup` of the same batch and negatives, its ids `sent` to their owners and the encoder's `layout`
        are made here when they were not made ahead.
        One method, because DistributedModelParallel wraps `forward`.
        """
        lookup = lookup or Lookup.of(batch, negatives)
        rows = self.table(lookup.ids) if sent is None else sent.rows()
        gathered = rows.index_select(0, lookup.places)
        if negatives is not None:
            # A graph instead, where one was made: see hstu_rec.graphs.
            dense = self.graphs or self.dense
            return (dense(gathered, batch, negatives, layout),)
        history, targets = gathered.split(lookup.counts)
        return self.queries(history, batch, layout), targets

    def look_up(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Rows [T, D] of the histories and [B, D] of the targets of a batch of queries. Collective."""
        lookup = Lookup.of(batch)
        history, targets = (
            self.table(lookup.ids).index_select(0, lookup.places).split(lookup.counts)
        )
        return history, targets

    def queries(
        self, history: Tensor, batch: SequenceBatch, layout: JaggedLayout | None = None
    ) -> Tensor:
        """One query a user [B, D], at its newest event, as it is scored, from rows [T, D] of the histories.

        It waits for no other rank.
        """
        return self.loss.query_vectors(self._encoded(history, batch, layout)[batch.offsets[1:] - 1])

    def dense(
        self,
        gathered: Tensor,
        batch: SequenceBatch,
        negatives: Negatives,
        layout: JaggedLayout | None,
    ) -> Tensor:
        """The sum of losses of `gathered` rows of histories, targets and negatives."""
        counts = len(batch.item_ids), len(batch.target_ids), len(negatives.ids)
        history, targets, rows = gathered.split(counts)
        encoded = self._encoded(history, batch, layout)
        return self.loss(encoded, targets, batch.target_ids, rows, negatives, self.dtype)

    def _encoded(
        self, history: Tensor, batch: SequenceBatch, layout: JaggedLayout | None
    ) -> Tensor:
        """float32 [T, D] of rows [T, D]."""
        times = (batch.timestamps, batch.next_timestamps)
        is_half = self.dtype != torch.float32
        with torch.autocast(history.device.type, self.dtype, enabled=is_half):
            return self.encoder(history, batch.offsets, *times, layout=layout).float()
