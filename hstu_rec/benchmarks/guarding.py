"""What the guards of a step cost: guarded steps and others in turn."""

import resource
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from hstu_rec import distributed
from hstu_rec.config import RunConfig
from hstu_rec.data.stream import open_dataset
from hstu_rec.guards import StepGuard, Stepped
from hstu_rec.learner import Learner
from hstu_rec.transfer import start_reading

NUM_WARM_UP, NUM_TIMED = 10, 200


class Unguarded(StepGuard):
    """Reads the loss of a step, as a loop without guards does, and weighs nothing."""

    def weigh(self, grad: Tensor) -> None:
        """Lets any gradient [R, D] through. Collective."""
        if not self._is_late:
            wait = distributed.start_all_reduce_sum(self._told)
            self._read = start_reading(self._told, wait)

    def is_finite(self) -> Tensor:
        """True, whatever it is."""
        if self._is_finite is None:
            self._is_finite = torch.ones((), dtype=torch.bool, device=self._loss.device)
        return self._is_finite

    def keep(self, grad: Tensor) -> Tensor:
        """The gradient [n, D] as it is."""
        return grad

    def end(self, *, is_last: bool = False) -> Stepped:
        """The loss."""
        return Stepped(self._read()[0])


def guard_times(config: RunConfig, device: torch.device) -> Iterator[str]:
    """Lines of a table: wall and CPU seconds of NUM_TIMED steps with guards and as many without, every other
    one, on this process. Collective."""
    learner = Learner(config, open_dataset(config.data), device)
    learner.begin()
    learner.model.train()
    needed, there = NUM_WARM_UP + 2 * NUM_TIMED, learner.stream.num_steps(0)
    if there < needed:
        raise ValueError(f"an epoch has {there} steps and {needed} are timed; give more users")
    guards = (learner.guard, Unguarded(config.guard, learner.dense))
    wall: tuple[list[float], ...] = ([], [])
    cpu: tuple[list[float], ...] = ([], [])
    for index in range(needed):
        which = index % 2
        learner.guard = guards[which]
        began_at, used = time.perf_counter(), _cpu_s()
        learner.step(0, index, index)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if index >= NUM_WARM_UP:
            wall[which].append(time.perf_counter() - began_at)
            cpu[which].append(_cpu_s() - used)
    for name, times in (("wall", wall), ("CPU", cpu)):
        guarded, bare = (statistics.median(one) for one in times)
        yield (
            f"{name:5s} guarded {guarded * 1e3:.3f} ms, without {bare * 1e3:.3f} ms, medians of {NUM_TIMED} "
            f"steps: {guarded / bare - 1:+.2%}"
        )


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
