"""Histories and candidates in own ids and own values, a table each, scored by a ranking model.

histories    user_id | item_id | timestamp | columns of context and outcomes       one row an event
candidates   user_id | item_id | columns of context                                one row a candidate
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as _compute
import torch

from hstu_rec.data.dataset import offsets_of
from hstu_rec.data.histories import ids_of, seconds_of
from hstu_rec.data.own_ids import IdIndex, kind_of
from hstu_rec.data.tables import arrow_of, names_of, opened
from hstu_rec.ranker.features import Feature
from hstu_rec.ranker.model import RankBatch, RankingModel

pc: Any = _compute  # its functions are made when it is imported

# Users whose histories are encoded together.
NUM_USERS = 256
NUM_EXAMPLES = 5


@dataclass(frozen=True)
class OwnTerms:
    """What a ranking model's rows and numbers are called outside."""

    items: IdIndex
    """Own ids of the items, by row of the table."""
    values: Mapping[str, Sequence[str]]
    """Of each column of texts, what its numbers stand for."""
    longest: int
    """Events of a history that count, the newest."""
    tasks: Sequence[str]
    """What the columns of scores are of."""

    def score(
        self,
        model: RankingModel,
        histories: Any,
        candidates: Any,
        at: int | Mapping[Any, int] | None,
    ) -> pa.Table:
        """See TrainedRanker.score."""
        context, outcomes = model.context.features, model.outcomes.features
        asked = _columns(candidates, "candidates", ["user_id", "item_id"], context)
        events = _columns(
            histories, "histories", ["user_id", "item_id", "timestamp"], [*context, *outcomes]
        )
        users = ids_of(asked["user_id"], "candidates: user_id").dictionary_encode()
        owner = users.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        rows = self._rows(asked["item_id"], "candidates")
        if (rows < 0).any():
            unknown = asked["item_id"].filter(pa.array(rows < 0))
            raise ValueError(
                f"candidates: {len(unknown):,} of {len(rows):,} are of items that the model does not know, "
                f"such as {unknown[:NUM_EXAMPLES].to_pylist()}; leave them out"
            )
        past = self._past(events, users.dictionary, [*context, *outcomes])
        now = _times_asked(at, users.dictionary, past)
        given = {one.name: self._numbers(asked[one.name], one) for one in context}
        found = np.empty((len(rows), len(self.tasks)), dtype=np.float32)
        order = np.argsort(owner, kind="stable")
        counts = np.bincount(owner, minlength=len(users.dictionary))
        ends = offsets_of(counts)
        for first in range(0, len(counts), NUM_USERS):
            last = min(first + NUM_USERS, len(counts))
            mine = order[ends[first] : ends[last]]
            cached = model.encode_history(past.part(first, last, context, outcomes))
            probabilities = model.score_candidates(
                torch.from_numpy(rows[mine]),
                torch.from_numpy(counts[first:last]),
                cached,
                torch.from_numpy(now[first:last]),
                {name: torch.from_numpy(values[mine]) for name, values in given.items()},
            )
            found[mine] = probabilities.numpy()
        scores = [pa.array(column) for column in found.T]
        names = ["user_id", "item_id", *self.tasks]
        return pa.table([asked["user_id"], asked["item_id"], *scores], names=names)

    def _past(self, events: pa.Table, users: pa.Array, features: Sequence[Feature]) -> "_Past":
        """The newest known events of each of `users`, user after user, oldest first."""
        own = ids_of(events["user_id"], "histories: user_id")
        if len(own) and len(users) and own.type != users.type:
            raise ValueError(
                f"user_id: histories have {kind_of(own)}, candidates {kind_of(users)}; give the same"
            )
        places = pc.index_in(own.cast(users.type), value_set=users)
        owner = pc.fill_null(places, -1).to_numpy().astype(np.int64)
        rows, times = self._rows(events["item_id"], "histories"), seconds_of(events["timestamp"])
        if num_unknown := int(((rows < 0) & (owner >= 0)).sum()):
            warnings.warn(
                f"{num_unknown:,} events are of items that the model does not know; they are left out",
                stacklevel=4,
            )
        order = np.lexsort((times, owner))
        order = order[(owner[order] >= 0) & (rows[order] >= 0)]
        counts = np.bincount(owner[order], minlength=len(users))
        left = offsets_of(counts)[owner[order] + 1] - np.arange(len(order))
        order = order[left <= self.longest]
        columns = {one.name: self._numbers(events[one.name], one)[order] for one in features}
        kept = offsets_of(np.minimum(counts, self.longest))
        return _Past(rows[order], times[order], kept, columns)

    def _rows(self, column: pa.ChunkedArray, what: str) -> np.ndarray:
        """int64 [n], -1 for items that the model does not know."""
        own = ids_of(column, f"{what}: item_id")
        if len(own) and own.type != self.items.ids.type:
            raise ValueError(
                f"{what}: item_id holds {kind_of(own)}, the model's items are {kind_of(self.items.ids)}, "
                f"such as {self.items.ids[0].as_py()!r}"
            )
        return self.items.rows(own.cast(self.items.ids.type))

    def _numbers(self, column: pa.ChunkedArray, feature: Feature) -> np.ndarray:
        """float32 [n] of own values: numbers, or places of texts; NaN where there is none."""
        values = self.values.get(feature.name)
        try:
            if values is None:
                return column.cast(pa.float32()).to_numpy()
            texts = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
        except pa.ArrowException as error:
            kind = "numbers" if values is None else "texts"
            raise ValueError(f"'{feature.name}' must be {kind}; got {column.type}") from error
        places = pc.index_in(texts, value_set=pa.array(values, pa.large_string()))
        is_new = pc.and_(pc.is_null(places), pc.greater(pc.utf8_length(pc.fill_null(texts, "")), 0))
        if not feature.has_missing and pc.any(is_new).as_py():
            new = texts.filter(is_new).unique()[:NUM_EXAMPLES].to_pylist()
            raise ValueError(
                f"'{feature.name}' has texts that training did not have, such as {new}; it had "
                f"{', '.join(values[:10])}"
            )
        return places.cast(pa.float32()).to_numpy()


@dataclass(frozen=True)
class _Past:
    """Events of users, user after user."""

    rows: np.ndarray
    times: np.ndarray
    offsets: np.ndarray
    columns: dict[str, np.ndarray]

    def part(
        self, first: int, last: int, context: Sequence[Feature], outcomes: Sequence[Feature]
    ) -> RankBatch:
        """Those of users first .. last - 1."""
        here = slice(self.offsets[first], self.offsets[last])
        given = {name: torch.from_numpy(values[here]) for name, values in self.columns.items()}
        return RankBatch(
            item_ids=torch.from_numpy(self.rows[here]),
            timestamps=torch.from_numpy(self.times[here]),
            offsets=torch.from_numpy(self.offsets[first : last + 1] - self.offsets[first]),
            context={one.name: given[one.name] for one in context},
            outcomes={one.name: given[one.name] for one in outcomes},
        )


def _columns(table: Any, what: str, names: Sequence[str], features: Sequence[Feature]) -> pa.Table:
    """The columns of those names and of the features. Raises ValueError where one is missing."""
    wanted = [*dict.fromkeys([*names, *(one.name for one in features)])]
    table = opened(table)
    there = names_of(table)
    if missing := [name for name in wanted if name not in there]:
        raise ValueError(
            f"{what} need the columns {', '.join(wanted)}; {', '.join(missing)} missing, there are "
            f"{', '.join(map(str, there)) or 'none'}"
        )
    return arrow_of(table, wanted)


def _times_asked(at: int | Mapping[Any, int] | None, users: pa.Array, past: _Past) -> np.ndarray:
    """int64 [B] s: `at`, or the time of each user's newest event, 0 for users without one."""
    newest = np.zeros(len(users), dtype=np.int64)
    has_events = np.diff(past.offsets) > 0
    newest[has_events] = past.times[past.offsets[1:][has_events] - 1]
    if at is None:
        return newest
    ids = users.to_pylist()
    if isinstance(at, Mapping):
        if missing := [one for one in ids if one not in at]:
            raise ValueError(f"at has no time for {len(missing):,} users, such as {missing[:5]}")
        found = np.array([at[one] for one in ids])
    else:
        found = np.full(len(users), at)
    if found.dtype.kind not in "iu" or (found < newest).any():
        raise ValueError(
            "at must be unix seconds, not before a user's newest event; got "
            f"{found[(found < newest).argmax()] if found.dtype.kind in 'iu' else at!r}"
        )
    return found.astype(np.int64)
