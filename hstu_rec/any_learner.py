"""AnyLearner: what training asks of a model of any kind, and the step that they have in common.

rates -> forward: this rank's part of the mean loss -> Optimizers.descend -> what the guard tells
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from hstu_rec import distributed
from hstu_rec.guards import NOTHING_ASKED, Asked, DivergenceAlarm, StepGuard, Stepped
from hstu_rec.item_table import live_state
from hstu_rec.optimizers import DenseGroup, Optimizers
from hstu_rec.pipeline import Place
from hstu_rec.run_config import AnyRunConfig


class AnyLearner(ABC):
    """A sharded model, its two optimizers and one training step.

    `begin` or a checkpoint comes before the first step.
    """

    def __init__(
        self,
        config: AnyRunConfig,
        sharded: Any,
        dense: list[DenseGroup],
        num_steps_planned: int,
        device: torch.device,
    ) -> None:
        """sharded: what `shard_model` gave."""
        self.model, self.device = sharded, device
        self.num_steps_planned = num_steps_planned
        self.optimizers = Optimizers(sharded, dense, config.optim, config.table, num_steps_planned)
        # Adam's moments move a row even where its gradient is 0.
        self.guard = StepGuard(config.guard, self.dense, waits=config.table.optimizer == "adam")
        self.alarm = DivergenceAlarm()
        self._guarding, self._seed = config.guard, config.train.seed

    @property
    def dense(self) -> list[nn.Parameter]:
        """The weights of the dense part."""
        return self.optimizers.dense

    @abstractmethod
    def begin(self) -> None:
        """What only a new run needs. Collective."""

    @abstractmethod
    def num_steps(self, epoch: int) -> int:
        """Steps of that epoch."""

    @abstractmethod
    def forward(self, place: Place) -> Tensor:
        """This rank's part, a scalar, of the mean loss of a step. Collective.

        Whoever fetches rows gives them `self.guard`.
        """

    def told_of(self, place: Place) -> dict[str, float]:
        """What is logged of a step beside its loss."""
        del place
        return {}

    def step(self, epoch: int, index: int, step: int, asked: Asked = NOTHING_ASKED) -> Stepped:
        """One training step. Collective.

        Raises FloatingPointError on all ranks for a step that is not finite, which has changed nothing, and
        when training diverges: see hstu_rec.guards. What a rank asks for, all are told.
        """
        self.optimizers.set_rates(step)
        # Dropout is a function of (seed, step, rank), so that a resumed run repeats it.
        distributed.seed_torch(self.device, self._seed, step, distributed.rank())
        place = Place(epoch, index, step)
        loss = self.forward(place)
        self.guard.begin(place, loss, asked)
        self.optimizers.descend(loss, self.guard)
        stepped = self.guard.end(is_last=index + 1 == self.num_steps(epoch))
        self.alarm.see(stepped.loss, step, self._guarding)
        return stepped

    def state(self) -> dict[str, Any]:
        """Every tensor a checkpoint holds; loading fills them in place."""
        return {"model": live_state(self.model), **self.optimizers.state()}
