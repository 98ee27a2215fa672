"""Users of a prepared dataset, and what of their events a model is asked about."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from hstu_rec.data.dataset import Dataset, offsets_of
from hstu_rec.data.histories import Histories
from hstu_rec.data.own_ids import IdIndex, typed_ids
from hstu_rec.data.stream import eval_users

Until = Literal["end", "valid", "test"]


@dataclass(frozen=True)
class Asked:
    """Users and what is taken of their events."""

    dataset: Dataset
    rows: np.ndarray
    """int64 [items of the dataset]: the model's row, -1 for none."""
    users: np.ndarray
    ends: np.ndarray
    """int64 [Q] events of each that count."""

    @classmethod
    def of(cls, data: Path, items: IdIndex, until: Until, source: Path | None = None) -> "Asked":
        """All users of the dataset folder `data`, or those who have the target that `until` names; `items`:
        the model's; `source`: what the folder was made of, if that is what a user knows. Raises ValueError
        for items of another type, or none of the model's."""
        dataset = Dataset(data)
        own = typed_ids(dataset.item_ids)
        if len(own) and own.type != items.ids.type:
            raise ValueError(
                f"{source or data}: item ids are {own.type}, the model's {items.ids.type}, such as "
                f"{items.ids[0].as_py()!r}; give histories with the ids that it was trained on"
            )
        rows = items.rows(own)
        if not (rows >= 0).any():
            raise ValueError(
                f"{source or data}: none of its {len(own):,} items, such as {_first(own)}, is one of the "
                f"model's, such as {_first(items.ids)}; give histories with the ids that it was trained on"
            )
        if until == "end":
            return cls(dataset, rows, np.arange(dataset.num_users), np.asarray(dataset.lengths))
        return cls(dataset, rows, *eval_users(dataset, until))

    def evenly(self, most: int) -> "Asked":
        """At most so many of the users, evenly drawn."""
        kept = np.linspace(0, len(self.users) - 1, min(most, len(self.users))).round().astype(int)
        return replace(self, users=self.users[kept], ends=self.ends[kept])

    def histories(self, part: slice, at: int) -> tuple[Histories, np.ndarray]:
        """Those of some users with an event that the model knows, and the times [B] to recommend for: `at`,
        or if that is 0 of the event that follows, or else of the last."""
        users, ends = self.users[part], self.ends[part]
        items, times, offsets = self.dataset.gather(users, np.zeros_like(ends), ends)
        last = np.minimum(ends, self.dataset.lengths[users] - 1)
        _, next_times, _ = self.dataset.gather(users, last, last + 1)
        rows = self.rows[items]
        is_known = rows >= 0
        owners = np.repeat(np.arange(len(users)), np.diff(offsets))[is_known]
        counts = np.bincount(owners, minlength=len(users))
        kept = np.flatnonzero(counts)
        own = typed_ids(self.dataset.user_ids.take(pa.array(users[kept])))
        found = Histories(own, rows[is_known], times[is_known], offsets_of(counts[kept]))
        return found, np.full(len(kept), at) if at else next_times[kept]


def _first(ids: pa.Array) -> str:
    """The first three, to be compared by eye."""
    return ", ".join(repr(one) for one in ids[:3].to_pylist())
