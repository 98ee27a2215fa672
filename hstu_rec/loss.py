"""Sampled softmax over candidates shared by the batch; the exact softmax when the candidates are all items.

    loss_p = log(exp(z_p . y_p) + sum_{r: id_r != target_p} exp(z_p . e_r)) - z_p . y_p

Logits are made a chunk of queries at a time, and their gradients in the same pass, so that neither is
ever held whole (the idea of Liger-Kernel's and Apple's fused linear cross entropy).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hstu_rec import distributed

NegativeKind = Literal["all", "uniform", "frequency", "in_batch", "mixed"]

# Logits of one chunk stay in a core's cache: of 2**17 .. 2**22, the fastest on 1 MiB of L2.
CHUNK_LOGITS = {"cpu": 2**18, "cuda": 2**27}


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
    """Subtracts the log of each candidate's expected count from its logit (unused by all)."""
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
    """The candidates of a step: the same on every rank."""

    ids: Tensor  # int64 [R], distinct, sorted
    log_weights: Tensor | None  # float32 [R]: log of the times drawn, less logQ; None for zeros
    target_log_q: Tensor | None  # float32 [N]: logQ of every item as a target, or None
    is_whole_catalogue: bool = False  # ids are 0 .. N - 1


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
        """log of each item's expected count among the candidates, or None without the correction."""
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
        return torch.from_numpy(np.log(np.maximum(expected, 1e-12))).float()

    def draw(self, step: int, batch_targets: Tensor) -> Negatives:
        """Candidates of `step`; `batch_targets` (this rank's, int64 [T]) are used by in_batch only."""
        kind, count = self.config.negatives, self.config.num_negatives
        if kind == "all":
            return Negatives(torch.arange(self.num_items), None, None, is_whole_catalogue=True)
        if kind == "in_batch":
            drawn = distributed.all_gather_rows(batch_targets).cpu()
        else:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, step]))
            num_uniform = {"uniform": count, "frequency": 0, "mixed": count // 2}[kind]
            uniform = generator.integers(0, self.num_items, num_uniform)
            points = generator.random(count - num_uniform) * self._cumulative[-1]
            drawn = torch.from_numpy(
                np.concatenate([uniform, np.searchsorted(self._cumulative, points, side="right")])
            )
        ids, times = torch.unique(drawn, return_counts=True)
        log_weights = times.float().log()
        if self._log_q is not None:
            log_weights -= self._log_q[ids]
        return Negatives(ids, log_weights, self._log_q)


class SampledSoftmax(nn.Module):
    """Sum of the softmax losses over this rank's positions."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config

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
        ids = negatives.ids.to(target_ids.device)
        if negatives.target_log_q is not None:
            logits = logits - negatives.target_log_q.to(logits.device)[target_ids]
        # Where the target itself was drawn: masked, so that it is no negative of its own.
        if negatives.is_whole_catalogue:
            hits = target_ids
        else:
            place = torch.searchsorted(ids, target_ids).clamp(max=max(len(ids) - 1, 0))
            hits = torch.where(ids[place] == target_ids, place, -1)
        log_weights = negatives.log_weights
        if log_weights is not None:
            log_weights = log_weights.to(queries.device, queries.dtype)
        return softmax_loss(queries, logits, self.item_vectors(rows), log_weights, hits)


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


def softmax_loss(
    queries: Tensor,
    target_logits: Tensor,
    candidates: Tensor,
    log_weights: Tensor | None,
    hits: Tensor,
) -> Tensor:
    """sum_p log(exp(t_p) + sum_{r != hits_p} exp(q_p . c_r + w_r)) - t_p, a scalar.

    queries [P, D], target_logits t [P], candidates [R, D], log_weights w [R] (no gradient; None for
    zeros), hits int64 [P] (-1 for none).
    """
    return _SoftmaxLoss.apply(queries, target_logits, candidates, log_weights, hits)


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        queries, target_logits, candidates, log_weights, hits = inputs
        num_chunks = math.ceil(
            len(queries) * max(len(candidates), 1) / CHUNK_LOGITS[queries.device.type]
        )
        loss = queries.new_zeros(())
        grad_queries = torch.empty_like(queries)
        grad_targets = torch.empty_like(target_logits)
        grad_candidates = torch.zeros_like(candidates)
        size = math.ceil(len(queries) / max(num_chunks, 1))
        block = queries.new_empty(size, len(candidates))
        for begin in range(0, len(queries), max(size, 1)):
            part = slice(begin, begin + size)
            query, target, hit = queries[part], target_logits[part], hits[part]
            weights = torch.mm(query, candidates.T, out=block[: len(query)])
            if log_weights is not None:
                weights += log_weights
            at = (hit >= 0).nonzero()[:, 0]
            weights[at, hit[at]] = -torch.inf
            top = torch.maximum(weights.amax(1), target)
            weights.sub_(top[:, None]).exp_()
            target_weight = (target - top).exp()
            total = weights.sum(1) + target_weight
            loss += (total.log() + top - target).sum()
            grad_targets[part] = target_weight / total - 1
            torch.mm(weights, candidates, out=grad_queries[part]).div_(total[:, None])
            grad_candidates.addmm_(weights.T, query / total[:, None])
        ctx.save_for_backward(grad_queries, grad_targets, grad_candidates)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return (*(saved * grad for saved in ctx.saved_tensors), None, None)
