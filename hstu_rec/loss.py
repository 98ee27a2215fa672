"""Sampled softmax over candidates shared by the batch; the exact softmax when the candidates are all items.

    loss_p = log(exp(z_p . y_p) + sum_{r: id_r != target_p} exp(z_p . e_r)) - z_p . y_p

Sampled candidates are few: every rank scores its own queries against all of them. The catalogue is
divided: every rank scores all queries against its own part, so that queries travel and rows do not
(Megatron-LM's vocabulary-parallel cross entropy, arXiv 1909.08053, section 3).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hstu_rec import distributed
from hstu_rec.data.batch import SequenceBatch
from hstu_rec.seen import seen_candidates, seen_targets
from hstu_rec.softmax import LOG2_E, Negatives, SoftmaxLoss

NegativeKind = Literal["all", "uniform", "frequency", "in_batch", "mixed"]

# The least probability that logQ is taken of.
MIN_PROBABILITY = 1e-12
# Base-2 scores within +- this need no maximum taken off, also with log weights: with logQ an exponential is
# at most 2**64 / MIN_PROBABILITY = 2**104, and float32's 2**128 leaves room for 2**24 of them; the target's
# own is at least 2**-64, because log weights and -logQ are not negative.
MAX_BOUNDED_SCORE2 = 64
# The seen bias is within +- this, by a tanh; in cosines, within +- this times the temperature.
MAX_SEEN_BIAS = 10.0


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
    use_seen_bias: bool = False
    """Learns one number, added to the logits of items of the user's history in training and in
    evaluation: how much likelier, or less likely, an event is a repeat. The history is what the encoder is
    given, the newest encoder.max_history_len events."""

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


class NegativeSampler:
    """Draws the negatives of a step from (seed, step) alone."""

    def __init__(
        self, config: LossConfig, num_items: int, train_counts: np.ndarray, seed: int
    ) -> None:
        self.config, self.num_items, self.seed = config, num_items, seed
        self._counts = train_counts
        self._log_q = self._make_log_q()

    # Made when they are first drawn by: of a large catalogue, they are large.
    @cached_property
    def _frequency(self) -> np.ndarray:
        weights = np.asarray(self._counts, dtype=np.float64) ** self.config.frequency_power
        return weights / weights.sum()

    @cached_property
    def _cumulative(self) -> np.ndarray:
        return np.cumsum(self._frequency)

    def _make_log_q(self) -> Tensor | None:
        """log of each item's probability at one draw, or None without the correction."""
        if not self.config.use_logq:
            return None
        kind, uniform = self.config.negatives, 1 / self.num_items
        if kind == "uniform":
            expected = np.full(self.num_items, uniform)
        elif kind == "in_batch":
            counts = np.asarray(self._counts, dtype=np.float64)
            expected = counts / counts.sum()
        else:
            expected = self._frequency if kind == "frequency" else (uniform + self._frequency) / 2
        return torch.from_numpy(np.log(np.maximum(expected, MIN_PROBABILITY))).float()

    def draw(self, step: int, target_ids: Tensor) -> Negatives:
        """Candidates of `step` for this rank's `target_ids` (int64 [P]), on CPU; collective for in_batch."""
        kind, count = self.config.negatives, self.config.num_negatives
        if kind == "all":
            # Parts as TorchRec's row-wise sharding has them, so that each rank looks up its own rows.
            size = -(-self.num_items // distributed.world_size())
            bounds = [min(size * r, self.num_items) for r in range(distributed.world_size() + 1)]
            mine = torch.arange(*bounds[distributed.rank() : distributed.rank() + 2])
            return Negatives(mine, largest_part=size, is_whole=len(mine) == self.num_items)
        if kind == "in_batch":
            drawn = distributed.all_gather_rows(target_ids)
        else:
            generator = distributed.generator("negatives", self.seed, step)
            num_uniform = {"uniform": count, "frequency": 0, "mixed": count // 2}[kind]
            uniform = generator.integers(0, self.num_items, num_uniform)
            by_frequency = uniform[:0]
            if num_uniform < count:
                points = generator.random(count - num_uniform) * self._cumulative[-1]
                by_frequency = np.searchsorted(self._cumulative, points, side="right")
            drawn = torch.from_numpy(np.concatenate([uniform, by_frequency]))
        ids, times = torch.unique(drawn, return_counts=True)
        log_weights = times.float().log()
        if self._log_q is None:
            return Negatives(ids, log_weights)
        return Negatives(ids, log_weights - self._log_q[ids], self._log_q[target_ids])


def with_seen(negatives: Negatives, mine: SequenceBatch, scored: SequenceBatch) -> Negatives:
    """`negatives` with what the seen bias needs of this rank's batch and of the one that it scores: its own,
    or that of all ranks when the candidates are divided."""
    seen = seen_candidates(scored, negatives.ids)
    count = int((seen[1] - seen[0]).sum())
    return replace(negatives, seen=seen, num_seen=count, is_target_seen=seen_targets(mine))


class SampledSoftmax(nn.Module):
    """Sum of the softmax losses over this rank's positions."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.seen_weight = nn.Parameter(torch.zeros(())) if config.use_seen_bias else None

    @property
    def _is_bounded(self) -> bool:
        """True when no exponential of a logit can overflow: see MAX_BOUNDED_SCORE2."""
        largest = 1 / self.config.temperature + MAX_SEEN_BIAS * self.config.use_seen_bias
        return self.config.similarity == "cosine" and LOG2_E * largest < MAX_BOUNDED_SCORE2

    def seen_bias(self) -> Tensor | None:
        """What is added to the logits of seen items, a scalar; None without seen bias."""
        if self.seen_weight is None:
            return None
        return MAX_SEEN_BIAS * torch.tanh(self.seen_weight / MAX_SEEN_BIAS)

    def seen_score(self) -> float:
        """What is added to the scores of seen items, before the temperature; 0 without seen bias."""
        bias = self.seen_bias()
        return 0.0 if bias is None else float(bias.detach()) * self.config.temperature

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
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Scalar sum of losses.

        Args:
            encoded: [P, D] encoder outputs. targets: [P, D] and rows: [R, D] table rows of the targets
                and of `negatives.ids`. target_ids: int64 [P]. dtype: of the products in fused kernels
                (see SoftmaxLoss), float32 or bfloat16; what goes in and comes out is float32.
        """
        seen_bias = self.seen_bias()
        queries = self.query_vectors(encoded) / self.config.temperature
        logits = (queries * self.item_vectors(targets)).sum(-1)
        if negatives.target_log_q is not None:
            logits = logits - negatives.target_log_q
        if seen_bias is not None:
            assert negatives.is_target_seen is not None, "with_seen comes first"
            logits = logits + seen_bias * negatives.is_target_seen
        candidates = self.item_vectors(rows)
        return SoftmaxLoss.apply(
            queries, logits, candidates, target_ids, negatives, seen_bias, self._is_bounded, dtype
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
