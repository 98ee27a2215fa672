"""The negatives of a step: a function of (seed, step) and the batch, in memory that no catalogue makes grow.

Items that occur equally often are equally likely, so that a distribution is one number for each count that
occurs (thousands, where there are millions of items), and an item is drawn as a place among those of its
count, in the dataset's memory-mapped order by count.

Drawn rows travel to every rank, or queries to the ranks that own the rows: see LossConfig.exchange.
"""

import warnings
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hstu_rec import distributed
from hstu_rec.data.batch import SequenceBatch
from hstu_rec.data.stream import Sequences
from hstu_rec.item_table import check_ids
from hstu_rec.loss import MIN_PROBABILITY, LossConfig, NegativeKind
from hstu_rec.seen import seen_candidates, seen_targets
from hstu_rec.softmax import Negatives

# Counts that are looked at together.
CHUNK_ITEMS = 2**22
# Share of the negatives that is drawn uniformly.
UNIFORM_SHARE = {"uniform": 1.0, "mixed": 0.5, "frequency": 0.0, "log_uniform": 0.0}


class CountGroups:
    """The items that occur equally often, by rising count."""

    def __init__(self, catalogue: Sequences) -> None:
        self._catalogue = catalogue
        parts = [
            np.unique(catalogue.train_counts[begin : begin + CHUNK_ITEMS], return_counts=True)
            for begin in range(0, catalogue.num_items, CHUNK_ITEMS)
        ]
        counts, group = np.unique(np.concatenate([one for one, _ in parts]), return_inverse=True)
        sizes = np.bincount(group, weights=np.concatenate([size for _, size in parts]))
        self.counts: np.ndarray = counts  # int64 [G], distinct
        self.sizes: np.ndarray = sizes.astype(np.int64)  # items of each count
        self._ends = np.cumsum(self.sizes)

    def probabilities(self, kind: NegativeKind, power: float) -> np.ndarray:
        """float64 [G]: how likely one draw is each item of a group. Raises ValueError where none is."""
        num_items = self._catalogue.num_items
        if kind == "uniform":
            return np.full(len(self.counts), 1 / num_items)
        if kind == "mixed":
            return (1 / num_items + self.probabilities("frequency", power)) / 2
        if kind == "log_uniform":
            # Of rank r, from the most frequent, log((r + 2) / (r + 1)) / log(N + 1); equal counts share.
            ranks = num_items - np.append(0, self._ends)
            return -np.diff(np.log1p(ranks)) / np.log1p(num_items) / self.sizes
        weights = self.counts ** (1.0 if kind == "in_batch" else power) * (self.counts > 0)
        if not weights.any():
            raise ValueError(
                f"loss.negatives {kind} draws items by how often they occur in training, and none does"
            )
        return weights / (weights * self.sizes).sum()

    def of_items(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n]: the groups of items."""
        return np.searchsorted(self.counts, self._catalogue.train_counts[ids])

    def draw(self, probabilities: np.ndarray, points: np.ndarray) -> np.ndarray:
        """int64 [n]: the items at `points`, float64 [n] in [0, 1), of the distribution."""
        ends = np.cumsum(probabilities * self.sizes)
        points = points * ends[-1]
        last = np.flatnonzero(probabilities)[-1]
        group = np.minimum(np.searchsorted(ends, points, side="right"), last)
        before = ends[group] - probabilities[group] * self.sizes[group]
        place = ((points - before) / probabilities[group]).astype(np.int64)
        place = place.clip(0, self.sizes[group] - 1)
        return self._catalogue.items_by_count[self._ends[group] - self.sizes[group] + place]


class NegativeSampler:
    """Draws the negatives of a step from (seed, step) alone, but for those in the batch."""

    def __init__(self, config: LossConfig, catalogue: Sequences, seed: int) -> None:
        self.config, self.num_items, self.seed = config, catalogue.num_items, seed
        self._catalogue = catalogue
        if config.negatives == "in_batch" and distributed.is_main():
            warnings.warn(
                "loss.negatives=in_batch: items that are the target of no event in training are never "
                "pushed away, and frequent ones most of all, so that rare items come first in a ranking; "
                "loss.use_logq=true mends the second, mixed, uniform or frequency the first",
                stacklevel=2,
            )

    @cached_property
    def _groups(self) -> CountGroups:
        return CountGroups(self._catalogue)

    @cached_property
    def _log_q_of_groups(self) -> np.ndarray:
        """float64 [G]"""
        config = self.config
        drawn = self._groups.probabilities(config.negatives, config.frequency_power)
        return np.log(np.maximum(drawn, MIN_PROBABILITY))

    def draw(self, step: int, batch: SequenceBatch) -> Negatives:
        """Candidates of `step` for this rank's part of a batch, on CPU; collective for in_batch."""
        kind = self.config.negatives
        if kind == "all":
            bounds = self._bounds().clip(max=self.num_items)
            mine = torch.arange(*bounds[distributed.rank() :][:2])
            return Negatives(
                mine, largest_part=int(bounds[1]), is_whole=len(mine) == self.num_items
            )
        if kind == "in_batch":
            drawn = distributed.all_gather_rows(batch.target_ids)
        else:
            drawn = torch.from_numpy(self._drawn(step))
        ids, times = torch.unique(drawn, return_counts=True)
        check_ids(ids, self.num_items)
        part, largest = slice(None), 0
        ranks = distributed.world_size()
        if is_divided(self.config, ranks, len(ids), batch.num_targets_global):
            edges = np.searchsorted(ids.numpy(), self._bounds())
            part = slice(*edges[distributed.rank() :][:2])
            largest = max(int(np.diff(edges).max()), 1)
        ids, log_weights = ids[part], times[part].float().log()
        if not self.config.use_logq:
            return Negatives(ids, log_weights, largest_part=largest)
        log_weights = log_weights - self.log_q(ids)
        return Negatives(ids, log_weights, self.log_q(batch.target_ids), largest_part=largest)

    def log_q(self, ids: Tensor) -> Tensor:
        """float32 [n]: log of the probability that one draw is each item, int64 [n]."""
        if self.config.negatives == "uniform":
            return torch.full((len(ids),), -float(np.log(self.num_items)))
        groups = self._groups.of_items(ids.numpy())
        return torch.from_numpy(self._log_q_of_groups[groups]).float()

    def _drawn(self, step: int) -> np.ndarray:
        """int64 [num_negatives] of all ranks, with repeats."""
        kind, count = self.config.negatives, self.config.num_negatives
        generator = distributed.generator("negatives", self.seed, step)
        num_uniform = int(count * UNIFORM_SHARE[kind])
        uniform = generator.integers(0, self.num_items, num_uniform)
        if num_uniform == count:
            return uniform
        points = generator.random(count - num_uniform)
        of_rest = self._rest_probabilities
        return np.concatenate([uniform, self._groups.draw(of_rest, points)])

    @cached_property
    def _rest_probabilities(self) -> np.ndarray:
        """Of what is not drawn uniformly."""
        kind = "frequency" if self.config.negatives == "mixed" else self.config.negatives
        return self._groups.probabilities(kind, self.config.frequency_power)

    def _bounds(self) -> np.ndarray:
        """int64 [ranks + 1]: first items of the ranks, as TorchRec's row-wise sharding has them."""
        ranks = distributed.world_size()
        return -(-self.num_items // ranks) * np.arange(ranks + 1)


def is_divided(config: LossConfig, num_ranks: int, num_ids: int, num_positions: int) -> bool:
    """Whether each rank scores the queries of all against its own part of the candidates."""
    if num_ranks == 1 or config.negatives == "all":
        return num_ranks > 1
    # Queries travel once and their gradients, summed over the ranks, twice; rows there and back.
    is_less = 3 * num_positions < 2 * num_ids
    return config.exchange == "queries" or (config.exchange == "auto" and is_less)


def with_seen(negatives: Negatives, mine: SequenceBatch, scored: SequenceBatch) -> Negatives:
    """`negatives` with what the seen bias needs of this rank's batch and of the one that it scores: its own,
    or that of all ranks when the candidates are divided."""
    seen = seen_candidates(scored, negatives.ids)
    count = int((seen[1] - seen[0]).sum())
    return replace(negatives, seen=seen, num_seen=count, is_target_seen=seen_targets(mine))
