"""ServingModel: recommendations in own ids on one CPU process, without TorchRec, fbgemm or a process group.

    model = load_bundle("beauty")
    events = {"user_id": ["b", "b"], "item_id": ["x", "y"], "timestamp": [1700000000, 1700000100]}
    model.recommend(events, k=10)        user_id | rank 1..k | item_id | score

Scores are those that evaluation ranks by (hstu_rec.scores), the encoder's and the item's vectors going
through the same modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from hstu_rec.bundle import BundleConfig, read_bundle, read_index
from hstu_rec.data.batch import SequenceBatch
from hstu_rec.data.dataset import LATEST_S, places_of
from hstu_rec.data.histories import Events, Histories, OnUnknown, read_histories, rows_of
from hstu_rec.data.own_ids import IdIndex
from hstu_rec.item_index import ItemIndex
from hstu_rec.metrics import both_metrics, cut_off_problems
from hstu_rec.model import NextItemModel
from hstu_rec.portions import Portion
from hstu_rec.ranking import LEAST_CHUNK_ITEMS, Queries, rank_targets
from hstu_rec.scores import NUM_SPARE, Catalogue, ItemShard, Seen, best_items

# Users that are encoded and scored together, at most, and numbers of the vectors of their best items.
BATCH_USERS = 1024
MAX_NUMBERS = 2**24
# Items that targets are ranked among at a time.
CHUNK_ITEMS = 2**17


def load_bundle(path: str | Path, *, use_index: bool = False) -> "ServingModel":
    """The model of a folder that apps/export.py wrote, on CPU; nothing of the folder is executed.

    The item vectors are mapped into memory. With `use_index` the folder's FAISS index finds the items to
    score where all may be recommended: sooner, and some are missed, as README.md in the folder tells. FAISS
    parses the file in C++ that is not made for files of strangers: ask for it where the maker is trusted.

    Raises ValueError (BundleError) with the file and what is wrong with it: damage, another format version,
    ids that are not the model's, no index.
    """
    config, model, items = read_bundle(path)
    index = read_index(path, config) if use_index else None
    return ServingModel(config, model, items, index)


class ServingModel:
    """A trained model with the own ids of its items. `config` tells what it is and was measured to be;
    `model` is in evaluation mode."""

    def __init__(
        self,
        config: BundleConfig,
        model: NextItemModel,
        items: IdIndex,
        index: ItemIndex | None = None,
    ) -> None:
        self.config, self.items, self._index = config, items, index
        self.model = model.eval()
        self._rows: Any = model.table.rows
        shard = ItemShard(self._rows, 0, len(self._rows), model.loss.item_vectors)
        self._catalogue = Catalogue.of(shard)

    def with_index(self, index: ItemIndex) -> "ServingModel":
        """The same model, by an index of its items."""
        return ServingModel(self.config, self.model, self.items, index)

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
        candidates: Sequence[Any] | pa.Array | None = None,
        on_unknown: OnUnknown = "warn",
        at: int | Mapping[Any, int] | None = None,
    ) -> pa.Table:
        """The k best items of every user of `events`: user_id | rank (from 1) | item_id | score (float64,
        higher is better), by user in the order of first appearance and rank; of equal scores the item of the
        lower row comes first.

        Args:
            events: a table of pandas, polars or Arrow, or columns by name (lists, numpy or arrow arrays):
                user_id, item_id (own ids) and timestamp (unix time in s, ms, us or ns, timestamps, ISO text;
                UTC), one row an event, in any order. The model looks at the newest
                `encoder.max_history_len` of a user, filter_seen at all.
            k: rows of a user; fewer where fewer items are left.
            filter_seen: leaves out items of the user's events.
            candidates: own ids of the items that may be recommended, the same for all users; all when None.
            on_unknown: events of items, and candidates, that the model does not know are left out, with a
                warning (warn) or without (ignore), or raise. Users without any other event get no rows, and
                a warning.
            at: unix seconds for which is recommended, one number or one by user id; for models whose
                `uses_query_time`, and those alone.

        Raises ValueError for k below 1, columns that are missing or of another type, and times that are
        missing, of no use, or before a user's newest event.
        """
        _check_k(k)
        if not isinstance(filter_seen, bool | np.bool_):
            raise ValueError(f"filter_seen must be True or False; got {filter_seen!r}")
        chosen = self._chosen(candidates, on_unknown)
        histories = read_histories(events, self.items, on_unknown)
        return self.recommend_to(
            histories, self._query_times(histories, at), k, filter_seen, chosen
        )

    def recommend_to(
        self,
        histories: Histories,
        times: np.ndarray,
        k: int,
        filter_seen: bool = True,
        chosen: "Candidates | None" = None,
    ) -> pa.Table:
        """`recommend` for histories of rows of this model, at `times` int64 [B] in s (of no effect unless
        `uses_query_time`)."""
        chosen = chosen or Candidates(np.arange(len(self.items)), self._catalogue)
        width = (min(k, len(chosen.rows)) + NUM_SPARE) * self.config.encoder.dim
        batch_users = min(max(MAX_NUMBERS // width, 1), BATCH_USERS)
        num_users = len(histories.user_ids)
        parts = [
            self.best_rows(
                histories, times, slice(begin, begin + batch_users), k, filter_seen, chosen
            )
            for begin in range(0, num_users, batch_users)
        ]
        empty = (torch.zeros(0, dtype=kind) for kind in (torch.int64, torch.int64, torch.float64))
        columns = [torch.cat(one) for one in zip(*parts, strict=True)] if parts else [*empty]
        users, rows, scores = (column.numpy() for column in columns)
        return pa.table(
            {
                "user_id": histories.user_ids.take(pa.array(users)),
                "rank": _places(users),
                "item_id": self.items.ids.take(pa.array(rows)),
                "score": scores,
            }
        )

    def similar_items(
        self,
        item_ids: Sequence[Any] | pa.Array,
        k: int = 10,
        *,
        on_unknown: OnUnknown = "warn",
    ) -> pa.Table:
        """The k items whose vectors have the highest cosine with those of each of `item_ids`, itself left
        out: item_id | rank (from 1) | similar_item_id | score (float64, the cosine), in the order given.

        Ids that the model does not know get no rows, by `on_unknown` as for `recommend`. Raises ValueError
        for k below 1.
        """
        _check_k(k)
        asked = rows_of(item_ids, self.items, "item_ids", on_unknown)
        shard = ItemShard(self._rows, 0, len(self._rows), nn.functional.normalize)
        catalogue = Catalogue.of(shard)
        size = min(max(MAX_NUMBERS // ((k + NUM_SPARE) * self._rows.shape[1]), 1), BATCH_USERS)
        found = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
        for begin in range(0, len(asked), size):
            rows = torch.from_numpy(asked[begin : begin + size])
            itself = Seen(torch.arange(len(rows)), rows, -torch.inf)
            for parts, values in zip(
                found, best_items(shard.vectors(rows), catalogue, k, itself), strict=True
            ):
                parts.append(values.flatten())
        scores, similar = torch.cat(found[0]), torch.cat(found[1])
        owner = np.repeat(np.arange(len(asked)), len(scores) // max(len(asked), 1))
        is_other = ~scores.isneginf().numpy()
        owner = owner[is_other]
        return pa.table(
            {
                "item_id": self.items.ids.take(pa.array(asked[owner])),
                "rank": _places(owner),
                "similar_item_id": self.items.ids.take(pa.array(similar.numpy()[is_other])),
                "score": scores.numpy()[is_other],
            }
        )

    def evaluate(
        self,
        events: Events,
        ks: Sequence[int] = (1, 5, 10, 20, 50),
        *,
        on_unknown: OnUnknown = "warn",
    ) -> dict[str, Any]:
        """Recall@k, NDCG@k and MRR of the last event of every user, by the user's events before it, among
        all items: {"num_users", "seen_masked": {"recall@10", ...}, "seen_allowed"}, with items of those
        events masked or not. Exact, and ties are never hits, as hstu_rec.evaluator.

        events: as for `recommend`. Users with fewer than two events of known items are left out. Raises
        ValueError when that leaves none.
        """
        return self.evaluate_last(read_histories(events, self.items, on_unknown), ks)

    def evaluate_last(self, histories: Histories, ks: Sequence[int]) -> dict[str, Any]:
        """`evaluate` of the last event of histories of rows of this model."""
        if problems := cut_off_problems(ks):
            raise ValueError("; ".join(problems))
        lengths = np.diff(histories.offsets)
        begins, ends = histories.offsets[:-1][lengths > 1], histories.offsets[1:][lengths > 1] - 1
        chunk = Portion("items", CHUNK_ITEMS, LEAST_CHUNK_ITEMS)
        ranks = [torch.zeros(2, 0, dtype=torch.int64)]
        for first in range(0, len(begins), BATCH_USERS):
            part = slice(first, first + BATCH_USERS)
            queries = self._targeted(histories, begins[part], ends[part])
            ranks.append(
                torch.stack(
                    rank_targets(
                        queries, self._catalogue.shard, chunk, self.model.loss.seen_score()
                    )
                )
            )
        return both_metrics(torch.cat(ranks, dim=1), ks)

    def _targeted(self, histories: Histories, begins: np.ndarray, ends: np.ndarray) -> Queries:
        """Users [B] with events begins[b] .. ends[b], and event ends[b] for a target."""
        targets = torch.from_numpy(histories.items[ends])
        batch, vectors = self._encoded(histories, histories.times[ends], begins, ends)
        seen, offsets = places_of(begins, ends - begins)
        return Queries(
            vectors=vectors,
            target_vectors=self._catalogue.shard.vectors(targets),
            target_ids=targets,
            seen_ids=torch.from_numpy(histories.items[seen]),
            seen_offsets=torch.from_numpy(offsets),
            num_recent=batch.offsets.diff(),
        )

    def _chosen(
        self, candidates: Sequence[Any] | pa.Array | None, on_unknown: OnUnknown
    ) -> "Candidates | None":
        if candidates is None:
            return None
        rows = np.unique(rows_of(candidates, self.items, "candidates", on_unknown))
        if not len(rows):
            raise ValueError(
                f"none of {len(candidates)} candidates is known; give at least one that is"
            )
        shard = ItemShard(
            self._rows[torch.from_numpy(rows)], 0, len(rows), self.model.loss.item_vectors
        )
        return Candidates(rows, Catalogue.of(shard))

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

    def best_rows(
        self,
        histories: Histories,
        times: np.ndarray,
        users: slice,
        k: int,
        filter_seen: bool = True,
        chosen: "Candidates | None" = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(user, row, score) of the best items of some users, all at once: int64, int64, float64 [n] each;
        arguments as of `recommend_to`."""
        chosen = chosen or Candidates(np.arange(len(self.items)), self._catalogue)
        whole = histories.offsets[users.start : users.stop + 1]
        batch, queries = self._encoded(histories, times[users], whole[:-1], whole[1:])
        every = torch.arange(len(queries))
        if filter_seen:
            owner = torch.repeat_interleave(every, torch.from_numpy(np.diff(whole)))
            items, added = torch.from_numpy(histories.items[whole[0] : whole[-1]]), -torch.inf
        else:
            owner = torch.repeat_interleave(every, batch.offsets.diff())
            items, added = batch.item_ids, self.model.loss.seen_score()
        seen = Seen(*chosen.among(owner, items), added)
        is_all = chosen.catalogue is self._catalogue
        find = self._index.best_items if self._index and is_all else best_items
        scores, places = find(queries, chosen.catalogue, k, seen)
        is_candidate = ~scores.isneginf()
        user = users.start + is_candidate.nonzero()[:, 0]
        rows = torch.from_numpy(chosen.rows)[places[is_candidate]]
        return user, rows, scores[is_candidate]

    def _encoded(
        self, histories: Histories, times: np.ndarray, begins: np.ndarray, ends: np.ndarray
    ) -> tuple[SequenceBatch, Tensor]:
        """The newest events of begins[b] .. ends[b], and float32 [B, D] what they ask for at `times` [B]."""
        begins = np.maximum(ends - self.config.encoder.max_history_len, begins)
        batch = _batch(histories, times, begins, ends)
        with torch.inference_mode():
            queries, _ = self.model(batch)
        return batch, queries.float()


@dataclass(frozen=True)
class Candidates:
    """The items that may be recommended."""

    rows: np.ndarray
    """int64 [C], rising."""
    catalogue: Catalogue

    def among(self, owner: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """(owner, place in `rows`) of the items that are among them."""
        rows = torch.from_numpy(self.rows)
        place = torch.searchsorted(rows, items).clamp_(max=len(rows) - 1)
        is_here = rows[place] == items
        return owner[is_here], place[is_here]


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1; got {k!r}")


def _places(owners: np.ndarray) -> np.ndarray:
    """int64 [n]: 1, 2, .. within each of the runs of rising `owners` [n]."""
    return np.arange(len(owners)) - np.searchsorted(owners, owners) + 1


def _batch(
    histories: Histories, times: np.ndarray, begins: np.ndarray, ends: np.ndarray
) -> SequenceBatch:
    """Events begins[b] .. ends[b] of users [B], and the times [B] of what follows them."""
    event, offsets = places_of(begins, ends - begins)
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
