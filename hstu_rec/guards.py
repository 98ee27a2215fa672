"""Guards of a training step: one that is not finite changes nothing, and a loss that runs away stops the run.

The rows of a fused table change inside backward, before any optimizer steps. So a rank weighs its loss and
all its gradients where backward comes to the rows of its lookup, when the dense gradients are there already;
the weights' sum over ranks travels while the gradients of rows do:

    |(loss, gradient of rows, dense gradients)|^2  ->  sum over ranks  ->  is it finite?
        if not: rows are given a gradient of 0, AdamW is told to stay, and the host raises or counts the step

All of it is done on the device; the host of a GPU reads the answer one step later and never waits for it.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from hstu_rec import distributed
from hstu_rec.settings import at_least
from hstu_rec.transfer import start_reading

# Weight of a loss in the mean of which the least is the best: about the last 20 steps.
MEAN_RATE = 0.05
DEFAULT_MAX_SKIPPED_STEPS, DEFAULT_DIVERGENCE_STEPS = 10, 50


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What becomes of steps that are not finite, and of a loss that runs away."""

    on_nonfinite: Literal["raise", "skip"] = "raise"
    """Where the loss or a gradient is NaN or infinite, on any rank: ends the run, or goes on with the next
    step. Nothing is changed by such a step either way."""
    max_skipped_steps: int = DEFAULT_MAX_SKIPPED_STEPS
    """Steps in a row that may be skipped; one more ends the run."""
    divergence_factor: float = 10.0
    """Ends the run when the loss stays above its best mean by the logarithm of this: that many times the
    perplexity; 0 for never."""
    divergence_steps: int = DEFAULT_DIVERGENCE_STEPS
    """How many more steps must be above than not, before it does."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "max_skipped_steps", "divergence_steps")
        if self.divergence_factor and not 1 < self.divergence_factor < math.inf:
            found.append(
                f"divergence_factor must be above 1, or 0 for no alarm; got {self.divergence_factor}"
            )
        if self.on_nonfinite == "raise" and self.max_skipped_steps != DEFAULT_MAX_SKIPPED_STEPS:
            found.append("max_skipped_steps has no effect with on_nonfinite 'raise'; set 'skip'")
        if not self.divergence_factor and self.divergence_steps != DEFAULT_DIVERGENCE_STEPS:
            found.append("divergence_steps has no effect with divergence_factor 0; set one of them")
        return found


class Asked(NamedTuple):
    """What a rank asks all for at a step; told to all with the loss."""

    stop: bool = False
    """The end of training."""
    save: bool = False
    """A checkpoint."""


NOTHING_ASKED = Asked()


class Stepped(NamedTuple):
    """What a step tells, the same on every rank."""

    loss: float
    """Mean over all ranks' positions."""
    asked: Asked = NOTHING_ASKED
    """What any rank asked for."""
    skipped: tuple[int, ...] = ()
    """Steps found to have changed nothing: on CPU this one, on CUDA also the one before."""


class _Unread(NamedTuple):
    """A step whose guard the host has not read yet."""

    place: tuple[int, int, int]
    loss: float
    read: Callable[[], list[float]]


class StepGuard:
    """`begin`; backward, which calls `weigh` and then `keep`; the dense optimizer's step; `end`.

    All ranks call them alike. `waits`: for a table whose optimizer moves rows by a gradient of 0 (Adam): the
    host waits for the answer inside backward, and raises there.
    """

    def __init__(
        self, config: GuardConfig, dense: Sequence[nn.Parameter], *, waits: bool = False
    ) -> None:
        self._config, self._dense, self._waits = config, dense, waits
        # A GPU's answer comes when backward is through; its host has the loss before and goes on.
        self._is_late = any(one.is_cuda for one in dense)
        self._unread: deque[_Unread] = deque()
        self.num_skipped = 0
        """Steps in a row that have changed nothing."""
        self._sums: Tensor | None = None
        self._is_finite: Tensor | None = None

    def begin(
        self, place: tuple[int, int, int], loss: Tensor, asked: Asked = NOTHING_ASKED
    ) -> None:
        """Takes the (epoch, batch, step) and this rank's part, a scalar, of the mean loss. Collective."""
        self._place, self._loss = place, loss.detach()
        self._sums = self._is_finite = None
        self._told = torch.stack(
            [self._loss, *(torch.full_like(self._loss, float(one)) for one in asked)]
        )
        if self._is_late:
            wait = distributed.start_all_reduce_sum(self._told)
            self._read = start_reading(self._told, wait)

    def weigh(self, grad: Tensor) -> None:
        """Takes the gradient [R, D] of this rank's lookup. Collective.

        The square, because where it is finite so are the sums and squares that optimizers make.
        """
        # DDP may be summing dense gradients meanwhile, in place: of what is not finite every part of a sum
        # is not.
        dense = [one.grad for one in self._dense if one.grad is not None]
        square = nn.utils.get_total_norm([self._loss, grad, *dense]).square().reshape(1)
        # One sum where the host reads all of it at once.
        self._sums = square if self._is_late else torch.cat([square, self._told])
        self._wait = distributed.start_all_reduce_sum(self._sums)
        if not self._is_late:
            self._read = start_reading(self._sums[1:], self._wait)

    def is_finite(self) -> Tensor:
        """Whether the step is, on all ranks; bool scalar on the device. Raises FloatingPointError if not and
        the host waits."""
        if self._is_finite is None:
            assert self._sums is not None, "the lookup's rows were given no gradient"
            self._wait()
            self._is_finite = self._sums[0] < math.inf
            if self._waits and not self._is_finite:
                self._refuse(self._place, self._read()[0])
        return self._is_finite

    def keep(self, grad: Tensor) -> Tensor:
        """The gradient [n, D] of rows that this rank owns, or zeros."""
        is_finite = self.is_finite()
        if self._is_late:
            return torch.where(is_finite, grad, 0.0)  # a product of NaN and 0 would be NaN
        return grad if is_finite else torch.zeros_like(grad)

    def end(self, *, is_last: bool = False) -> Stepped:
        """What is to be told of the step; of the `last` before something else it is all.

        Raises FloatingPointError on all ranks, with the step that was not finite.
        """
        loss, *num_asking = self._read()
        asked = Asked(*(count > 0 for count in num_asking))
        read = start_reading(self.is_finite())
        self._unread.append(_Unread(self._place, loss, read))
        is_late = self._is_late and math.isfinite(loss) and not (is_last or any(asked))
        skipped = []
        while len(self._unread) > is_late:
            place, its_loss, read = self._unread.popleft()
            if read()[0]:
                self.num_skipped = 0
            else:
                self._refuse(place, its_loss)
                skipped.append(place[2])
        return Stepped(loss, asked, tuple(skipped))

    def _refuse(self, place: tuple[int, int, int], loss: float) -> None:
        """Counts a step that is not finite. Raises FloatingPointError where it may not be skipped."""
        epoch, batch, step = place
        what = f"the loss is {loss}"
        if math.isfinite(loss):
            what = f"a gradient is not finite, of a loss of {loss:.6g},"
        sentence = (
            f"{what} at step {step} (epoch {epoch}, batch {batch}); nothing was changed by it; lower "
            "optim.lr or table.lr"
        )
        self.num_skipped += 1
        if self._config.on_nonfinite == "raise":
            raise FloatingPointError(sentence)
        if self.num_skipped > self._config.max_skipped_steps:
            raise FloatingPointError(
                f"{sentence}; {self.num_skipped} steps in a row were not finite, and "
                f"guard.max_skipped_steps is {self._config.max_skipped_steps}"
            )


@dataclass
class DivergenceAlarm:
    """What the losses were so far, a function of them alone; `asdict` of it is plain JSON.

    A loss is bad when it is above the best mean by more than log(divergence_factor). A difference, because
    that of two log-likelihoods has the same meaning for losses near 0, where a ratio would make an alarm of
    nothing. Bad losses count up and others down, so that spikes, however high, which training gets over,
    raise none; and a run that only learns slowly is left to train.patience.
    """

    mean: float | None = None
    """Exponential moving mean of the loss."""
    best: float | None = None
    """The least mean so far; the first loss is one, because a run may diverge from its first step on."""
    num_bad: int = 0
    """Steps that were bad more than those that were not, of late."""

    def see(self, loss: float, step: int, config: GuardConfig) -> None:
        """Takes the loss of a step. Raises FloatingPointError when training diverges."""
        if not config.divergence_factor or not math.isfinite(loss):
            return  # what is not finite is the StepGuard's
        self.mean = loss if self.mean is None else self.mean + MEAN_RATE * (loss - self.mean)
        self.best = self.mean if self.best is None else min(self.best, self.mean)
        is_bad = loss > self.best + math.log(config.divergence_factor)
        self.num_bad = max(self.num_bad + (1 if is_bad else -1), 0)
        if self.num_bad >= config.divergence_steps:
            raise FloatingPointError(
                f"training diverges: the loss is {loss:.6g} at step {step}, and its best mean was "
                f"{self.best:.6g}; lower optim.lr or table.lr, or set "
                "guard.divergence_factor=0"
            )
