"""Parts of histories that are encoded together, and which of their events are scored.

training     windows of W events, cut anew every epoch; every event in them is scored
evaluation   the events of a split, W / 2 at most at a time, after as many before them as there is room for

user    [ . . . . . . . . . . . . v v t t t ]          W = 8
epoch 0 |-----|---------------|--|                     training: the cuts move
test            |---------------[t t t]                history and targets
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hstu_rec import distributed
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stream import DatasetConfig, Split, deal
from hstu_rec.ranker.features import Task
from hstu_rec.ranker.model import RankBatch, RankerConfig
from hstu_rec.settings import at_least

# Windows that are evaluated together on a rank.
EVAL_WINDOWS = 64


@dataclass(frozen=True, kw_only=True)
class RankDataConfig(DatasetConfig):
    """Where the events are and how they are cut into batches."""

    path: str = "data/ratings"
    """Dataset folder made by apps/prepare.py with feature_columns."""
    batch_windows: int = 32
    """Windows of encoder.max_history_len / 2 events a step, at most, over all ranks together."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        return at_least(self, 1, "batch_windows")


@dataclass(frozen=True)
class Scored:
    """A rank's windows, and which of their events count."""

    batch: RankBatch
    labels: Tensor
    """float32 [T, K]."""
    is_target: Tensor
    """bool [T]."""
    users: Tensor
    """int64 [T]: owner of each event."""
    num_targets_global: int
    """Over all ranks; in evaluation, of this rank."""


class Windows:
    """The windows of `length` W events of a dataset.

    Raises ValueError for tasks that its columns cannot tell.
    """

    def __init__(
        self, dataset: Dataset, ranker: RankerConfig, length: int, batch_windows: int, seed: int
    ) -> None:
        self.dataset, self.ranker = dataset, ranker
        self.length, self.batch_windows, self.seed = length, batch_windows, seed
        facts = dataset.stats.get("features", {})
        tasks = [Task.of(text) for text in ranker.tasks]
        self.tasks = [(one, one.limit(facts)) for one in tasks]
        self._plan = lru_cache(maxsize=1)(self._make_plan)
        self._counts = lru_cache(maxsize=1)(self._make_counts)

    def num_steps(self, epoch: int) -> int:
        """Steps of that epoch; others than those of the next, because the cuts move."""
        return -(-int(self._counts(epoch)[2].sum()) // self.batch_windows)

    def batch(self, epoch: int, step: int) -> Scored:
        """This rank's part of a global batch, which may be empty."""
        part = slice(step * self.batch_windows, (step + 1) * self.batch_windows)
        users, begins, ends = (one[part] for one in self._plan(epoch))
        mine = deal((ends - begins).astype(np.float64), distributed.world_size())[
            distributed.rank()
        ]
        total = int((ends - begins).sum())
        return self._scored(users[mine], begins[mine], ends[mine], begins[mine], total)

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(user, begin, end) of the windows of an epoch, in its order."""
        lengths, size = self.dataset.train_ends, self.length
        users, first, counts = self._counts(epoch)
        owner = np.repeat(np.arange(len(users)), counts)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = np.minimum(first[owner] + place * size, lengths[users][owner])
        begins = np.where(place > 0, first[owner] + (place - 1) * size, 0)
        order = distributed.generator("order of users", self.seed, epoch).permutation(len(owner))
        return users[owner][order], begins[order], ends[order]

    def _make_counts(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The users that have events, the length of the first window of each, and how many each has."""
        lengths, size = self.dataset.train_ends, self.length
        users = np.flatnonzero(lengths > 0)
        cuts = distributed.generator("stochastic length", self.seed, epoch)
        # The first window of a long history ends anywhere, so that each event comes after each history.
        first = np.where(
            lengths[users] > size, cuts.integers(1, size + 1, len(users)), lengths[users]
        )
        return users, first, 1 + -(-(lengths[users] - first) // size)

    def evaluation(self, split: Split) -> Iterator[Scored]:
        """This rank's events of a split, as many batches on every rank (the last ones may be empty).

        Raises ValueError on all ranks when the split has no event.
        """
        users, begins, targets, ends = self._of_split(split)
        mine = np.array_split(np.arange(len(users)), distributed.world_size())[distributed.rank()]
        longest = -(-len(users) // distributed.world_size())
        for start in range(0, longest, EVAL_WINDOWS):
            part = mine[start : start + EVAL_WINDOWS]
            count = int((ends[part] - targets[part]).sum())
            yield self._scored(users[part], begins[part], ends[part], targets[part], count)

    def _of_split(self, split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(user, begin, first target, end) of windows."""
        data = self.dataset
        is_valid = split == "valid"
        first = data.train_ends if is_valid else data.valid_ends
        last = data.valid_ends if is_valid else data.lengths
        users = np.flatnonzero(first < last)
        if not len(users):
            raise ValueError(f"{data.path}: there is no {split} event; check the split of prepare")
        stride = self.length // 2
        counts = -(-(last[users] - first[users]) // stride)
        owner = np.repeat(users, counts)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        targets = first[owner] + place * stride
        ends = np.minimum(targets + stride, last[owner])
        return owner, np.maximum(ends - self.length, 0), targets, ends

    def _scored(
        self,
        users: np.ndarray,
        begins: np.ndarray,
        ends: np.ndarray,
        targets: np.ndarray,
        num_targets: int,
    ) -> Scored:
        """Events begins[b] .. ends[b] of users, of which those from targets[b] on count."""
        items, times, offsets = self.dataset.gather(users, begins, ends)
        columns = {
            name: torch.from_numpy(values)
            for name, values in self.dataset.features(users, begins, ends).items()
        }
        owner = np.repeat(np.arange(len(users)), ends - begins)
        place = np.arange(len(items)) - offsets[owner] + begins[owner]
        labels = [task.labels(columns[task.column], limit) for task, limit in self.tasks]
        return Scored(
            batch=RankBatch(
                item_ids=torch.from_numpy(items),
                timestamps=torch.from_numpy(times),
                offsets=torch.from_numpy(offsets),
                context={name: columns[name] for name in self.ranker.context},
                outcomes={name: columns[name] for name in self.ranker.outcome_columns()},
            ),
            labels=torch.stack(labels, dim=1),
            is_target=torch.from_numpy(place >= targets[owner]),
            users=torch.from_numpy(users[owner]),
            num_targets_global=num_targets,
        )
