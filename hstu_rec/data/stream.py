"""Batches as a function of (seed, epoch, step, rank): the position in the data is three integers.

1. users with at least two training events are permuted by a counter-based generator of (seed, epoch)
2. the permutation is cut into global batches, by users or by events
3. the batch's users are dealt to the ranks by length, so that none waits for another; each rank
   reads its users' newest events, no padding
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from hstu_rec import distributed
from hstu_rec.data.batch import SequenceBatch
from hstu_rec.data.dataset import Dataset

Split = Literal["valid", "test"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the events are and how they are cut into batches."""

    path: str = "data/demo"
    """Dataset folder made by apps/prepare.py."""
    batch_users: int = 128
    """Users a step, over all ranks together; 0 when batch_events says it."""
    batch_events: int = 0
    """Events to predict a step, at most, over all ranks together; 0 when batch_users says it."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = [
            f"{name} must be at least 0; got {getattr(self, name)}"
            for name in ("batch_users", "batch_events")
            if getattr(self, name) < 0
        ]
        if (self.batch_users > 0) == (self.batch_events > 0):
            found.append(
                "batch_users and batch_events: exactly one must be above 0; got "
                f"{self.batch_users} and {self.batch_events}"
            )
        return found


class TrainStream:
    """Training batches of this rank; every position of a history is trained."""

    def __init__(
        self, dataset: Dataset, config: DataConfig, max_history_len: int, seed: int
    ) -> None:
        self.dataset, self.config, self.seed = dataset, config, seed
        self.max_history_len = max_history_len
        self.users = np.flatnonzero(dataset.train_ends >= 2)
        if not len(self.users):
            raise ValueError(
                f"{dataset.path}: no user has two training events; nothing to train on"
            )
        self.positions = np.minimum(dataset.train_ends - 1, max_history_len)
        self._epoch_plan = lru_cache(maxsize=1)(self._make_epoch_plan)

    def _make_epoch_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(users in the epoch's order, bounds [steps + 1] of its batches)."""
        generator = distributed.generator("order of users", self.seed, epoch)
        order = self.users[generator.permutation(len(self.users))]
        if self.config.batch_users:
            bounds = np.arange(0, len(order), self.config.batch_users)
            return order, np.append(bounds, len(order))
        total = np.cumsum(self.positions[order])
        bounds = [0]
        while bounds[-1] < len(order):
            spent = total[bounds[-1] - 1] if bounds[-1] else 0
            end = int(np.searchsorted(total, spent + self.config.batch_events, side="right"))
            bounds.append(max(end, bounds[-1] + 1))
        return order, np.array(bounds)

    def num_steps(self, epoch: int) -> int:
        """Steps of that epoch; the last batch may be smaller, none is dropped."""
        return len(self._epoch_plan(epoch)[1]) - 1

    def num_positions(self) -> int:
        """Trained positions of an epoch, over all ranks."""
        return int(self.positions[self.users].sum())

    def batch(self, epoch: int, step: int, of_all_ranks: bool = False) -> SequenceBatch:
        """This rank's part of a global batch, which may be empty, or the parts of all, by rank."""
        order, bounds = self._epoch_plan(epoch)
        everyone = order[bounds[step] : bounds[step + 1]]
        parts = deal(everyone, self.positions[everyone], distributed.world_size())
        users = np.concatenate(parts) if of_all_ranks else parts[distributed.rank()]
        ends = self.dataset.train_ends[users]
        begins = ends - 1 - self.positions[users]
        items, times, offsets = self.dataset.gather(users, begins, ends)
        # Events one by one are inputs and, shifted by one, targets; a user's last is a target only.
        is_input = np.ones(len(items), dtype=bool)
        is_input[offsets[1:] - 1] = False
        is_target = np.ones(len(items), dtype=bool)
        is_target[offsets[:-1]] = False
        return SequenceBatch(
            item_ids=torch.from_numpy(items[is_input]),
            timestamps=torch.from_numpy(times[is_input]),
            next_timestamps=torch.from_numpy(times[is_target]),
            offsets=torch.from_numpy(offsets - np.arange(len(offsets))),
            target_ids=torch.from_numpy(items[is_target]),
            num_targets_global=int(self.positions[everyone].sum()),
        )


def deal(users: np.ndarray, costs: np.ndarray, num_hands: int) -> list[np.ndarray]:
    """`users` in hands of nearly equal number and cost: the dearest first, to and fro like cards.

    0 1 2 | 2 1 0 | 0 1 ...
    """
    order = users[np.argsort(-costs, kind="stable")]
    place = np.arange(len(users)) % (2 * num_hands)
    hand = np.minimum(place, 2 * num_hands - 1 - place)
    return [order[hand == one] for one in range(num_hands)]


@dataclass(frozen=True)
class EvalBatch:
    """One query a user: the newest history, the target, and the distinct items seen before it."""

    users: np.ndarray
    history: SequenceBatch
    seen_ids: torch.Tensor
    seen_offsets: torch.Tensor


def eval_batches(
    dataset: Dataset, split: Split, max_history_len: int, batch_users: int
) -> Iterator[EvalBatch]:
    """This rank's queries, as many batches on every rank (the last ones may be empty).

    Validation histories end before the validation item; test histories include it.
    """
    ends = dataset.train_ends if split == "valid" else dataset.valid_ends
    limits = dataset.valid_ends if split == "valid" else dataset.lengths
    users = np.flatnonzero((ends < limits) & (ends > 0))
    if not len(users):
        raise ValueError(
            f"{dataset.path}: no user has a {split} target; check the split of prepare"
        )
    mine = np.array_split(users, distributed.world_size())[distributed.rank()]
    longest = -(-len(users) // distributed.world_size())
    for start in range(0, longest, batch_users):
        chosen = mine[start : start + batch_users]
        end = ends[chosen]
        begin = np.maximum(end - max_history_len, 0)
        items, times, offsets = dataset.gather(chosen, begin, end)
        targets, target_times, _ = dataset.gather(chosen, end, end + 1)
        next_times = np.append(times[1:], 0)[: len(times)]
        next_times[offsets[1:] - 1] = target_times
        seen, _, seen_offsets = dataset.gather(chosen, np.zeros_like(end), end)
        yield EvalBatch(
            users=chosen,
            history=SequenceBatch(
                item_ids=torch.from_numpy(items),
                timestamps=torch.from_numpy(times),
                next_timestamps=torch.from_numpy(next_times),
                offsets=torch.from_numpy(offsets),
                target_ids=torch.from_numpy(targets),
                num_targets_global=len(targets),
            ),
            seen_ids=torch.from_numpy(seen),
            seen_offsets=torch.from_numpy(seen_offsets),
        )
