"""Sampled softmax over candidates shared by the batch; the exact softmax when the candidates are all items.

    loss_p = log(exp(z_p . y_p) + sum_{r: id_r != target_p} exp(z_p . e_r)) - z_p . y_p

Sampled candidates are few: every rank scores its own queries against all of them. The catalogue is
divided: every rank scores all queries against its own part, so that queries travel and rows do not
(Megatron-LM's vocabulary-parallel cross entropy, arXiv 1909.08053, section 3).

Logits are made a chunk of queries at a time, and their gradients in the same pass, so that neither is
ever held whole (the idea of Liger-Kernel's and Apple's fused linear cross entropy).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hstu_rec import distributed
from hstu_rec.distributed import on_device

NegativeKind = Literal["all", "uniform", "frequency", "in_batch", "mixed"]

LOG2_E = math.log2(math.e)
# Logits of one chunk of queries, all of which are held until the sums over the candidates are known. When
# the catalogue is divided, each chunk waits for the other ranks.
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}
# Logits of a tile, the part of a chunk that is worked on while it is in cache.
TILE_LOGITS = {"cpu": 2**19, "cuda": 2**27}
MIN_TILE_WIDTH = 64
# The least probability that logQ is taken of.
MIN_PROBABILITY = 1e-12
# Base-2 scores within +- this need no maximum taken off, also with log weights: with logQ an exponential is
# at most 2**64 / MIN_PROBABILITY = 2**104, and float32's 2**128 leaves room for 2**24 of them; the target's
# own is at least 2**-64, because log weights and -logQ are not negative.
MAX_BOUNDED_SCORE2 = 64


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The retrieval loss."""

    negatives: NegativeKind = "uniform"
    """all items (exact softmax), uniform, by training frequency, in_batch (targets of all ranks), or
    mixed (half uniform, half by frequency)."""
    num_negatives: int = 1024
    """Negatives drawn a step and shared by all positions of all ranks; unused by all and in_batch."""
    frequency_power: float = 0.75
    """Negatives by frequency are drawn in proportion to count ** this."""
    use_logq: bool = False
    """Subtracts the log of each candidate's probability of being drawn from its logit (unused by all)."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """Score of a query and an item; the same in training and in evaluation."""
    temperature: float = 0.05
    """Scores are divided by this."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = []
        if self.num_negatives < 1:
            found.append(f"num_negatives must be at least 1; got {self.num_negatives}")
        if not self.temperature > 0:
            found.append(f"temperature must be above 0; got {self.temperature}")
        if self.use_logq and self.negatives == "all":
            found.append("use_logq has no effect with negatives 'all'; set one of them")
        return found


@dataclass(frozen=True)
class Negatives:
    """The candidates of a step: the same on every rank, or divided over the ranks."""

    ids: Tensor
    """int64 [R], distinct, sorted; when divided, this rank's part."""
    log_weights: Tensor | None = None
    """float32 [R]: log of the times drawn, less logQ; None for zeros."""
    target_log_q: Tensor | None = None
    """float32 [P]: logQ of this rank's targets; None for zeros."""
    largest_part: int = 0
    """The largest R of all ranks when divided, else 0."""

    @property
    def is_divided(self) -> bool:
        """True when the ranks' parts are disjoint and together the catalogue."""
        return self.largest_part > 0

    def to(self, device: torch.device) -> "Negatives":
        """The candidates on `device`."""
        return on_device(self, device)


class NegativeSampler:
    """Draws the negatives of a step from (seed, step) alone."""

    def __init__(
        self, config: LossConfig, num_items: int, train_counts: np.ndarray, seed: int
    ) -> None:
        self.config, self.num_items, self.seed = config, num_items, seed
        weights = np.asarray(train_counts, dtype=np.float64) ** config.frequency_power
        self._frequency = weights / weights.sum()
        self._cumulative = np.cumsum(self._frequency)
        self._log_q = self._make_log_q(np.asarray(train_counts, dtype=np.float64))

    def _make_log_q(self, counts: np.ndarray) -> Tensor | None:
        """log of each item's probability at one draw, or None without the correction."""
        config = self.config
        if not config.use_logq:
            return None
        uniform = np.full(self.num_items, 1 / self.num_items)
        expected = {
            "uniform": uniform,
            "frequency": self._frequency,
            "mixed": (uniform + self._frequency) / 2,
            "in_batch": counts / counts.sum(),
        }[config.negatives]
        return torch.from_numpy(np.log(np.maximum(expected, MIN_PROBABILITY))).float()

    def draw(self, step: int, target_ids: Tensor) -> Negatives:
        """Candidates of `step` for this rank's `target_ids` (int64 [P]), on CPU; collective for in_batch."""
        kind, count = self.config.negatives, self.config.num_negatives
        if kind == "all":
            # Parts as TorchRec's row-wise sharding has them, so that each rank looks up its own rows.
            size = -(-self.num_items // distributed.world_size())
            bounds = [min(size * r, self.num_items) for r in range(distributed.world_size() + 1)]
            mine = torch.arange(*bounds[distributed.rank() : distributed.rank() + 2])
            return Negatives(mine, largest_part=size)
        if kind == "in_batch":
            drawn = distributed.all_gather_rows(target_ids)
        else:
            generator = distributed.generator("negatives", self.seed, step)
            num_uniform = {"uniform": count, "frequency": 0, "mixed": count // 2}[kind]
            uniform = generator.integers(0, self.num_items, num_uniform)
            points = generator.random(count - num_uniform) * self._cumulative[-1]
            drawn = torch.from_numpy(
                np.concatenate([uniform, np.searchsorted(self._cumulative, points, side="right")])
            )
        ids, times = torch.unique(drawn, return_counts=True)
        log_weights = times.float().log()
        if self._log_q is None:
            return Negatives(ids, log_weights)
        return Negatives(ids, log_weights - self._log_q[ids], self._log_q[target_ids])


class SampledSoftmax(nn.Module):
    """Sum of the softmax losses over this rank's positions."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def _is_bounded(self) -> bool:
        """True when no exponential of a logit can overflow: see MAX_BOUNDED_SCORE2."""
        return (
            self.config.similarity == "cosine"
            and LOG2_E / self.config.temperature < MAX_BOUNDED_SCORE2
        )

    def item_vectors(self, rows: Tensor) -> Tensor:
        """Table rows [*, D] as they are scored, in training and in evaluation alike."""
        return _Unit.apply(rows) if self.config.similarity == "cosine" else rows

    def query_vectors(self, encoded: Tensor) -> Tensor:
        """Encoder outputs [*, D] as they are scored, before the temperature."""
        return self.item_vectors(encoded)

    def forward(
        self,
        encoded: Tensor,
        targets: Tensor,
        target_ids: Tensor,
        rows: Tensor,
        negatives: Negatives,
    ) -> Tensor:
        """Scalar sum of losses.

        Args:
            encoded: [P, D] encoder outputs. targets: [P, D] and rows: [R, D] table rows of the targets
                and of `negatives.ids`. target_ids: int64 [P].
        """
        queries = self.query_vectors(encoded) / self.config.temperature
        logits = (queries * self.item_vectors(targets)).sum(-1)
        if negatives.target_log_q is not None:
            logits = logits - negatives.target_log_q
        candidates = self.item_vectors(rows)
        return _SoftmaxLoss.apply(
            queries, logits, candidates, target_ids, negatives, self._is_bounded
        )


class _Unit(torch.autograd.Function):
    """x / |x| over the last dimension, and its gradient, in the fewest passes over memory."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        norm = torch.linalg.vector_norm(inputs[0], dim=-1, keepdim=True).clamp_min_(1e-12)
        unit = inputs[0] / norm
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        unit, norm = ctx.saved_tensors
        along = torch.linalg.vecdot(grads[0], unit).unsqueeze(-1)
        return torch.addcmul(grads[0], unit, along, value=-1).div_(norm)


class _SoftmaxLoss(torch.autograd.Function):
    """sum_p log(exp(t_p) + sum_{r: id_r != target_p} exp(q_p . c_r + w_r)) - t_p, a scalar.

    queries q [P, D], target_logits t [P], candidates c [R, D], target_ids int64 [P]; no gradient of w.
    `is_bounded`: see MAX_BOUNDED_SCORE2. All gradients, of the sum of all ranks' losses, are made in forward.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        queries, target_logits, candidates, target_ids, negatives, is_bounded = inputs
        mine = slice(0, len(queries))
        if negatives.is_divided:
            queries, target_logits, target_ids, mine = _gather(queries, target_logits, target_ids)
        hits = _places(target_ids, negatives.ids)
        # Logits of base 2 from here on: torch's CPU exp2 takes 0.6 of the time of exp.
        scaled, targets2 = queries * LOG2_E, target_logits * LOG2_E
        weights2 = None if negatives.log_weights is None else negatives.log_weights * LOG2_E
        losses, grad_targets = torch.empty_like(target_logits), torch.empty_like(target_logits)
        grad_queries = torch.zeros_like(queries)
        grad_candidates = torch.zeros_like(candidates)
        # As many chunks on every rank, because each ends with a collective when divided.
        width = max(len(candidates), negatives.largest_part, 1)
        num_chunks = math.ceil(len(queries) * width / CHUNK_LOGITS[queries.device.type])
        size = math.ceil(len(queries) / max(num_chunks, 1)) or 1
        block = queries.new_empty(min(size, len(queries)) * len(candidates))
        for begin in range(0, len(queries), size):
            part = slice(begin, begin + size)
            target, top, query = targets2[part], torch.zeros_like(targets2[part]), queries[part]
            logits = _tiles(scaled[part], candidates, weights2, hits[part], block)
            if not is_bounded:
                logits = list(logits)
                top = torch.stack([target, *(tile.amax(1) for _, tile in logits)]).amax(0)
                if negatives.is_divided:
                    distributed.all_reduce_max(top)
                logits = [(at, tile.sub_(top[:, None])) for at, tile in logits]
            # When bounded, each tile is exponentiated as soon as it is made, while it is in cache.
            exponentials = [(at, tile, tile.exp2_().sum(1)) for at, tile in logits]
            total = sum((s for *_, s in exponentials), torch.zeros_like(top))
            if negatives.is_divided:
                distributed.all_reduce_sum(total)
            target_weight = (target - top).exp2_()
            total += target_weight
            losses[part] = total.log2() + (top - target)
            grad_targets[part] = target_weight.div_(total).sub_(1)
            query = query / total[:, None]
            for at, tile, _ in exponentials:
                grad_queries[part].addmm_(tile, candidates[at])
                grad_candidates[at].addmm_(tile.T, query)
            grad_queries[part] /= total[:, None]
        if negatives.is_divided:
            distributed.all_reduce_sum(grad_queries)
        ctx.save_for_backward(grad_queries[mine], grad_targets[mine], grad_candidates)
        return losses[mine].sum() / LOG2_E

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return (*(saved * grad for saved in ctx.saved_tensors), None, None, None)


def _tiles(
    queries: Tensor, candidates: Tensor, weights: Tensor | None, hits: Tensor, block: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Tiles [n, t] of the logits q . c + w, views of `block`, and which candidates each is of.

    queries [n, D], candidates [R, D], weights [R]. Entry (p, hits_p) is -inf, where p's target itself was
    drawn (hits_p >= 0), so that it is no negative of its own.
    """
    size, limit = len(queries) * len(candidates), TILE_LOGITS[queries.device.type]
    # As wide as each other, and not so narrow that the products become slow.
    num_tiles = max(min(math.ceil(size / limit), len(candidates) // MIN_TILE_WIDTH), 1)
    width = math.ceil(len(candidates) / num_tiles) or 1
    bounds = [*range(0, len(candidates), width), len(candidates)]
    hits, order = hits.sort()
    edges = torch.searchsorted(hits, torch.tensor(bounds, device=hits.device)).tolist()
    for (begin, end), hit in zip(pairwise(bounds), pairwise(edges), strict=True):
        tile = block[begin * len(queries) : end * len(queries)].view(len(queries), -1)
        torch.mm(queries, candidates[begin:end].T, out=tile)
        if weights is not None:
            tile += weights[begin:end]
        if hit[0] < hit[1]:
            tile[order[slice(*hit)], hits[slice(*hit)] - begin] = -torch.inf
        yield slice(begin, end), tile


def _places(target_ids: Tensor, ids: Tensor) -> Tensor:
    """int64 [P]: the place of each target among the distinct sorted `ids`, or -1."""
    if not len(ids):
        return torch.full_like(target_ids, -1)
    place = torch.searchsorted(ids, target_ids).clamp_(max=len(ids) - 1)
    return torch.where(ids[place] == target_ids, place, -1)


def _gather(
    queries: Tensor, target_logits: Tensor, target_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, slice]:
    """The positions of all ranks, and which of them are this rank's."""
    columns = (queries, target_logits[:, None], target_ids[:, None].view(queries.dtype))
    packed, mine = distributed.all_gather_placed(torch.cat(columns, dim=1))
    queries, target_logits, target_ids = packed.split([part.shape[1] for part in columns], dim=1)
    return (
        queries.contiguous(),
        target_logits[:, 0].contiguous(),
        target_ids.contiguous().view(torch.int64)[:, 0],
        mine,
    )
