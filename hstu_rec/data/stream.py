"""Batches as a function of (seed, epoch, step, rank): the position in the data is three integers.

1. users with at least two training events are permuted by a counter-based generator of (seed, epoch)
2. the permutation is cut into global batches, by users or by events
3. the batch's users are dealt to the ranks by the work of their histories, which grows with the length and
   its square, so that none waits for another; each rank reads its users' newest events, or with stochastic
   length some of them, no padding
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from hstu_rec import distributed
from hstu_rec.data.batch import SequenceBatch
from hstu_rec.data.dataset import Dataset, offsets_of
from hstu_rec.data.stochastic_length import (
    Choice,
    cut_lengths,
    kept_events,
    short_length,
    whole_share,
)
from hstu_rec.data.synthetic import SYNTHETIC, SyntheticConfig, SyntheticDataset
from hstu_rec.settings import at_least, without_effect

Split = Literal["valid", "test"]
# Users whose targets are read together.
CHUNK_USERS = 2**20
# What training and evaluation read: of the same interface, one prepared, the other made on the fly.
Sequences = Dataset | SyntheticDataset


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Where the events are."""

    path: str
    """Dataset folder made by apps/prepare.py."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(DatasetConfig):
    """Where the events are and how they are cut into batches."""

    path: str = "data/demo"
    """Dataset folder made by apps/prepare.py, or synthetic: made on the fly."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    batch_users: int = 128
    """Users a step, over all ranks together; 0 when batch_events says it."""
    batch_events: int = 0
    """Events to predict a step, at most, over all ranks together; 0 when batch_users says it."""
    length_alpha: float = 0.0
    """Stochastic length: histories of more than max_history_len ** (this / 2) events are mostly cut to so
    many in training; in (1, 2], the less the shorter; 0 for off."""
    length_choice: Choice = "uniform"
    """Which events are kept then: any, or newest, in proportion to their place from the oldest."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 0, "batch_users", "batch_events")
        if (self.batch_users > 0) == (self.batch_events > 0):
            found.append(
                "batch_users and batch_events: exactly one must be above 0; got "
                f"{self.batch_users} and {self.batch_events}"
            )
        if self.length_alpha and not 1 < self.length_alpha <= 2:
            found.append(f"length_alpha must be in (1, 2], or 0 for off; got {self.length_alpha}")
        if not self.length_alpha:
            found += without_effect(self, "without length_alpha", "length_choice")
        if self.path != SYNTHETIC and self.synthetic != SyntheticConfig():
            found.append(f"synthetic.* has no effect but with path={SYNTHETIC}; got {self.path}")
        return found


def open_dataset(config: DataConfig) -> Sequences:
    """The event sequences that `config` names.

    Raises FileNotFoundError when data.path is no dataset folder, ValueError when another version wrote it.
    """
    return SyntheticDataset(config.synthetic) if config.path == SYNTHETIC else Dataset(config.path)


class _EpochPlan(NamedTuple):
    users: np.ndarray  # in the epoch's order
    lengths: np.ndarray  # their trained positions
    bounds: np.ndarray  # [steps + 1] of the batches
    key: int  # of `kept_events`


class TrainStream:
    """Training batches of this rank; every position of a history is trained.

    costs_of: of lengths, int64 [B], float64 [B] how much work histories are; by default the lengths.
    """

    def __init__(
        self,
        dataset: Sequences,
        config: DataConfig,
        max_history_len: int,
        seed: int,
        costs_of: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> None:
        self.dataset, self.config, self.seed = dataset, config, seed
        self.max_history_len, self._costs_of = max_history_len, costs_of
        self.users = np.flatnonzero(dataset.train_ends >= 2)
        if not len(self.users):
            raise ValueError(
                f"{dataset.path}: no user has two training events; nothing to train on"
            )
        self.positions = np.minimum(dataset.train_ends - 1, max_history_len)
        self._epoch_plan = lru_cache(maxsize=1)(self._make_epoch_plan)

    def _make_epoch_plan(self, epoch: int) -> "_EpochPlan":
        generator = distributed.generator("order of users", self.seed, epoch)
        order = self.users[generator.permutation(len(self.users))]
        lengths, alpha, key = self.positions[order], self.config.length_alpha, 0
        if alpha:
            generator = distributed.generator("stochastic length", self.seed, epoch)
            key = int(generator.integers(2**63))
            lengths = cut_lengths(lengths, self.max_history_len, alpha, generator)
        if self.config.batch_users:
            bounds = np.arange(0, len(order), self.config.batch_users)
            return _EpochPlan(order, lengths, np.append(bounds, len(order)), key)
        total = np.cumsum(lengths)
        bounds = [0]
        while bounds[-1] < len(order):
            spent = total[bounds[-1] - 1] if bounds[-1] else 0
            end = int(np.searchsorted(total, spent + self.config.batch_events, side="right"))
            bounds.append(max(end, bounds[-1] + 1))
        return _EpochPlan(order, lengths, np.array(bounds), key)

    def num_steps(self, epoch: int) -> int:
        """Steps of that epoch; the last batch may be smaller, none is dropped."""
        return len(self._epoch_plan(epoch).bounds) - 1

    def mean_lengths(self) -> np.ndarray:
        """float64: trained positions of each of `users`, in the mean of epochs."""
        lengths = self.positions[self.users]
        if not (alpha := self.config.length_alpha):
            return lengths.astype(np.float64)
        share = whole_share(lengths, self.max_history_len, alpha)
        short = np.minimum(lengths, short_length(self.max_history_len, alpha))
        return share * lengths + (1 - share) * short

    @cached_property
    def num_positions(self) -> int:
        """Trained positions of an epoch, over all ranks; with stochastic length in the mean."""
        return round(self.mean_lengths().sum())

    def _dealt(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """(users of a global batch, their lengths, places of each rank's among them)."""
        plan = self._epoch_plan(epoch)
        part = slice(plan.bounds[step], plan.bounds[step + 1])
        users, lengths = plan.users[part], plan.lengths[part]
        return users, lengths, deal(self._costs_of(lengths), distributed.world_size())

    def imbalance(self, epoch: int, step: int) -> float:
        """The work of the rank that has the most of a batch, over the mean of ranks."""
        _, lengths, hands = self._dealt(epoch, step)
        return imbalance_of(self._costs_of(lengths), hands)

    def batch(self, epoch: int, step: int, of_all_ranks: bool = False) -> SequenceBatch:
        """This rank's part of a global batch, which may be empty, or the parts of all, by rank."""
        plan = self._epoch_plan(epoch)
        everyone, kept, hands = self._dealt(epoch, step)
        num_positions = int(kept.sum())
        mine = np.concatenate(hands) if of_all_ranks else hands[distributed.rank()]
        users, kept = everyone[mine], kept[mine]
        ends = self.dataset.train_ends[users]
        begins = ends - 1 - self.positions[users]
        items, times, offsets = self.dataset.gather(users, begins, ends)
        # Events one by one are inputs and, shifted by one, targets; a user's last is a target only.
        is_input = np.ones(len(items), dtype=bool)
        is_input[offsets[1:] - 1] = False
        is_target = np.ones(len(items), dtype=bool)
        is_target[offsets[:-1]] = False
        inputs, targets = np.flatnonzero(is_input), np.flatnonzero(is_target)
        if self.config.length_alpha:
            whole, choice = self.positions[users], self.config.length_choice
            is_kept = kept_events(whole, kept, users, plan.key, choice)
            inputs, targets = inputs[is_kept], targets[is_kept]
        return SequenceBatch(
            item_ids=torch.from_numpy(items[inputs]),
            timestamps=torch.from_numpy(times[inputs]),
            next_timestamps=torch.from_numpy(times[targets]),
            offsets=torch.from_numpy(offsets_of(kept)),
            target_ids=torch.from_numpy(items[targets]),
            num_targets_global=num_positions,
        )


def deal(costs: np.ndarray, num_hands: int) -> list[np.ndarray]:
    """Places of `costs` [B] in hands of nearly equal sum: the dearest first, each to the hand with the least
    so far, or by equal sums with the fewest (Graham 1969: no sum is above 4/3 of the best)."""
    order = np.argsort(-costs, kind="stable")
    if num_hands == 1:
        return [order]
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    heap = [(0.0, 0, hand) for hand in range(num_hands)]
    for place, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        total, count, hand = heap[0]
        heapq.heapreplace(heap, (total + cost, count + 1, hand))
        hands[hand].append(place)
    return [np.array(hand, dtype=np.int64) for hand in hands]


def imbalance_of(costs: np.ndarray, hands: list[np.ndarray]) -> float:
    """The largest sum of `costs` of the dealt `hands`, over their mean."""
    sums = [costs[hand].sum() for hand in hands]
    return float(max(sums) / np.mean(sums))


@dataclass(frozen=True)
class EvalBatch:
    """One query a user: the newest history, the target, and the distinct items seen before it."""

    users: np.ndarray
    history: SequenceBatch
    seen_ids: torch.Tensor
    seen_offsets: torch.Tensor

    def part(self, users: slice) -> "EvalBatch":
        """The queries of some of the users, of which there may be fewer than the slice says."""
        begin, end, _ = users.indices(len(self.users))
        if end - begin == len(self.users):
            return self
        history = self.history
        offsets, seen_offsets = (
            one[begin : end + 1] for one in (history.offsets, self.seen_offsets)
        )
        events, seen = (slice(*one[[0, -1]].tolist()) for one in (offsets, seen_offsets))
        return EvalBatch(
            users=self.users[begin:end],
            history=SequenceBatch(
                item_ids=history.item_ids[events],
                timestamps=history.timestamps[events],
                next_timestamps=history.next_timestamps[events],
                offsets=offsets - offsets[0],
                target_ids=history.target_ids[begin:end],
                num_targets_global=end - begin,
            ),
            seen_ids=self.seen_ids[seen],
            seen_offsets=seen_offsets - seen_offsets[0],
        )


def eval_users(dataset: Sequences, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """int64 [Q] users with a history and a target of `split`, and int64 [Q] where the target is in it.

    Raises ValueError when there is none.
    """
    ends = dataset.train_ends if split == "valid" else dataset.valid_ends
    limits = dataset.valid_ends if split == "valid" else dataset.lengths
    users = np.flatnonzero((ends < limits) & (ends > 0))
    if not len(users):
        raise ValueError(
            f"{dataset.path}: no user has a {split} target; check the split of prepare"
        )
    return users, ends[users]


def check_frequent(dataset: Sequences, least: int) -> None:
    """Raises ValueError unless targets of validation and of test occur `least` times in training."""
    splits: tuple[Split, ...] = ("valid", "test")
    for split in splits:
        users, ends = eval_users(dataset, split)
        most = 0
        for begin in range(0, len(users), CHUNK_USERS):
            part = slice(begin, begin + CHUNK_USERS)
            targets, _, _ = dataset.gather(users[part], ends[part], ends[part] + 1)
            most = max(most, int(dataset.train_counts[targets].max()))
        if most < least:
            raise ValueError(
                f"eval.min_train_count={least}: no {split} target occurs so often in training, the most "
                f"frequent {most} times; give less"
            )


def eval_batches(
    dataset: Sequences,
    split: Split,
    max_history_len: int,
    batch_users: int,
    chosen_places: np.ndarray | None = None,
) -> Iterator[EvalBatch]:
    """This rank's queries, as many batches on every rank (the last ones may be empty).

    Validation histories end before the validation item; test histories include it. chosen_places: int64,
    which of `eval_users` alone.
    """
    users, target_places = eval_users(dataset, split)
    if chosen_places is not None:
        users, target_places = users[chosen_places], target_places[chosen_places]
    ranks, rank = distributed.world_size(), distributed.rank()
    mine, ends = (np.array_split(one, ranks)[rank] for one in (users, target_places))
    longest = -(-len(users) // ranks)
    for start in range(0, longest, batch_users):
        chosen = mine[start : start + batch_users]
        end = ends[start : start + batch_users]
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
