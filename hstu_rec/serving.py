"""ServingModel: recommendations in own ids on one CPU process, without TorchRec, fbgemm or a process group.

    model = load_bundle("beauty")
    events = {"user_id": ["b", "b"], "item_id": ["x", "y"], "timestamp": [1700000000, 1700000100]}
    model.recommend(events, k=10)        user_id | rank 1..k | item_id | score

Scores are those that evaluation ranks by (hstu_rec.scores), the encoder's and the item's vectors going
through the same modules.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hstu_rec.bundle import BundleConfig, read_bundle
from hstu_rec.data.batch import SequenceBatch
from hstu_rec.data.dataset import LATEST_S, offsets_of
from hstu_rec.data.histories import Events, Histories, OnUnknown, read_histories
from hstu_rec.data.own_ids import ItemIndex
from hstu_rec.model import NextItemModel
from hstu_rec.scores import NUM_SPARE, Catalogue, ItemShard, Seen, best_items

# Users that are encoded and scored together, at most, and numbers of the vectors of their best items.
BATCH_USERS = 1024
MAX_NUMBERS = 2**24


def load_bundle(path: str | Path) -> "ServingModel":
    """The model of a folder that apps/export.py wrote, on CPU; nothing of the folder is executed.

    The item vectors are mapped into memory. Raises ValueError (BundleError) with the file and what is wrong
    with it: damage, another format version, ids that are not the model's.
    """
    return ServingModel(*read_bundle(path))


class ServingModel:
    """A trained model with the own ids of its items. `config` tells what it is and was measured to be."""

    def __init__(self, config: BundleConfig, model: NextItemModel, items: ItemIndex) -> None:
        self.config, self.items = config, items
        self._model = model.eval()
        rows: Any = model.table.rows
        shard = ItemShard(rows, 0, len(rows), model.loss.item_vectors)
        self._catalogue = Catalogue.of(shard)

    @property
    def uses_query_time(self) -> bool:
        """Whether recommendations depend on the time for which they are made."""
        return self.config.encoder.query_time == "next"

    def recommend(
        self,
        events: Events,
        k: int = 10,
        *,
        filter_seen: bool = True,
        on_unknown: OnUnknown = "warn",
        at: int | Mapping[Any, int] | None = None,
    ) -> pa.Table:
        """The k best items of every user of `events`: user_id | rank (from 1) | item_id | score (float64,
        higher is better), by user in the order of first appearance and rank; of equal scores the item of the
        lower row comes first.

        Args:
            events: a pyarrow table, or columns by name (lists, numpy or arrow arrays): user_id, item_id (own
                ids) and timestamp (integers, unix seconds), one row an event, in any order. The model looks
                at the newest `encoder.max_history_len` of a user, filter_seen at all.
            k: rows of a user; fewer where fewer items are left.
            filter_seen: leaves out items of the user's events.
            on_unknown: events of items that the model does not know are left out, with a warning (warn) or
                without (ignore), or raise. Users without any other event get no rows, and a warning.
            at: unix seconds for which is recommended, one number or one by user id; for models whose
                `uses_query_time`, and those alone.

        Raises ValueError for k below 1, columns that are missing or of another type, and times that are
        missing, of no use, or before a user's newest event.
        """
        if type(k) is not int or k < 1:
            raise ValueError(f"k must be a whole number of at least 1; got {k!r}")
        histories = read_histories(events, self.items, on_unknown)
        times = self._query_times(histories, at)
        width = (min(k, len(self.items)) + NUM_SPARE) * self.config.encoder.dim
        batch_users = min(max(MAX_NUMBERS // width, 1), BATCH_USERS)
        num_users = len(histories.user_ids)
        parts = [
            self._of_users(histories, times, slice(begin, begin + batch_users), k, filter_seen)
            for begin in range(0, num_users, batch_users)
        ]
        empty = (torch.zeros(0, dtype=kind) for kind in (torch.int64, torch.int64, torch.float64))
        columns = [torch.cat(one) for one in zip(*parts, strict=True)] if parts else [*empty]
        users, rows, scores = (column.numpy() for column in columns)
        first = np.searchsorted(users, users)
        return pa.table(
            {
                "user_id": histories.user_ids.take(pa.array(users)),
                "rank": np.arange(len(users)) - first + 1,
                "item_id": self.items.ids.take(pa.array(rows)),
                "score": scores,
            }
        )

    def _query_times(self, histories: Histories, at: int | Mapping[Any, int] | None) -> np.ndarray:
        """int64 [B] s for which each user's recommendations are made."""
        newest = histories.times[histories.offsets[1:] - 1]
        if not self.uses_query_time:
            if at is not None:
                raise ValueError(
                    "at has no effect on this model, which does not use the query time (encoder.query_time "
                    "'own'); leave it out"
                )
            return newest
        if at is None:
            raise ValueError(
                "this model uses the query time (encoder.query_time 'next'): give at, the unix seconds for "
                "which is recommended, one number or one by user id"
            )
        own = histories.user_ids.to_pylist()
        given = [at.get(user) for user in own] if isinstance(at, Mapping) else [at] * len(own)
        for user, time, last in zip(own, given, newest.tolist(), strict=True):
            if not isinstance(time, int | np.integer) or not last <= time < LATEST_S:
                raise ValueError(
                    f"at must be unix seconds, not before the newest event of a user; got {time!r} for user "
                    f"{user!r}, whose newest event is at {last}"
                )
        return np.array(given, dtype=np.int64)

    def _of_users(
        self, histories: Histories, times: np.ndarray, users: slice, k: int, filter_seen: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(user, row, score) of the best items of some users, [n] each."""
        whole = histories.offsets[users.start : users.stop + 1]
        longest = self.config.encoder.max_history_len
        begins = np.maximum(whole[1:] - longest, whole[:-1])
        batch = _batch(histories, times[users], begins, whole[1:])
        with torch.inference_mode():
            queries, _ = self._model(batch)
        owner = torch.repeat_interleave(torch.arange(len(begins)), torch.from_numpy(np.diff(whole)))
        items = torch.from_numpy(histories.items[whole[0] : whole[-1]])
        if filter_seen:
            seen = Seen(owner, items, -torch.inf)
        else:
            recent = torch.repeat_interleave(torch.arange(len(begins)), batch.offsets.diff())
            seen = Seen(recent, batch.item_ids, self._model.loss.seen_score())
        scores, rows = best_items(queries.float(), self._catalogue, k, seen)
        is_candidate = ~scores.isneginf()
        user = users.start + is_candidate.nonzero()[:, 0]
        return user, rows[is_candidate], scores[is_candidate]


def _batch(
    histories: Histories, times: np.ndarray, begins: np.ndarray, ends: np.ndarray
) -> SequenceBatch:
    """Events begins[b] .. ends[b] of users [B], and the times [B] of what follows them."""
    counts = ends - begins
    offsets = offsets_of(counts)
    event = np.repeat(begins - offsets[:-1], counts) + np.arange(offsets[-1])
    next_times = np.append(histories.times, 0)[event + 1]
    next_times[offsets[1:] - 1] = times
    return SequenceBatch(
        item_ids=torch.from_numpy(histories.items[event]),
        timestamps=torch.from_numpy(histories.times[event]),
        next_timestamps=torch.from_numpy(next_times),
        offsets=torch.from_numpy(offsets),
        target_ids=torch.zeros(0, dtype=torch.int64),
        num_targets_global=0,
    )
