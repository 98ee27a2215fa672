"""Sampled softmax over candidates shared by the batch; the exact softmax when the candidates are all items.

    loss_p = log(exp(z_p . y_p) + sum_{r: id_r != target_p} exp(z_p . e_r)) - z_p . y_p

Few candidates are scored by every rank against its own queries. Many, and the catalogue, are divided: every
rank scores all queries against its own part, so that queries travel and rows do not (Megatron-LM's
vocabulary-parallel cross entropy, arXiv 1909.08053, section 3).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hstu_rec.settings import above, at_least, without_effect
from hstu_rec.softmax import LOG2_E, Negatives, SoftmaxLoss

NegativeKind = Literal["all", "uniform", "frequency", "log_uniform", "in_batch", "mixed"]

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
    """all items (exact softmax), uniform, by training frequency, log_uniform (by rank in it, Zipf's law),
    in_batch (targets of all ranks), or mixed (half uniform, half by frequency)."""
    num_negatives: int = 1024
    """Negatives drawn a step and shared by all positions of all ranks; unused by all and in_batch."""
    frequency_power: float = 0.75
    """Negatives by frequency are drawn in proportion to count ** this."""
    exchange: Literal["auto", "queries", "negatives"] = "auto"
    """What travels between ranks when negatives are drawn: their rows to all ranks, or the queries to the
    ranks that own the rows; auto is fewer bytes of the two (unused by all, where queries travel)."""
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
        found = at_least(self, 1, "num_negatives") + at_least(self, 0, "frequency_power")
        found += above(self, 0, "temperature")
        unused = {"all": ["num_negatives", "exchange", "use_logq"], "in_batch": ["num_negatives"]}
        power = [] if self.negatives in ("frequency", "mixed") else ["frequency_power"]
        names = [*unused.get(self.negatives, []), *power]
        return found + without_effect(self, f"with negatives '{self.negatives}'", *names)


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
