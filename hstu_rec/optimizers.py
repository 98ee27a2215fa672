"""The two optimizers of a sharded model: rows step inside backward, AdamW on the dense part after it.

set_rates -> forward -> loss -> descend: backward (loss and gradients are checked, then the rows step inside
    it) -> clip -> AdamW
"""

import math
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from hstu_rec import distributed
from hstu_rec.guards import StepGuard
from hstu_rec.item_table import TableConfig
from hstu_rec.run_config import OptimConfig


class DenseGroup(TypedDict):
    """Dense weights that step alike."""

    params: list[nn.Parameter]
    weight_decay: float
    rate: float
    """What optim.lr is multiplied by."""


class Optimizers:
    """The fused optimizer of the rows, and AdamW of the dense part, with the same schedule of their rates."""

    def __init__(
        self,
        sharded: Any,
        dense: list[DenseGroup],
        optim: OptimConfig,
        table: TableConfig,
        num_steps: int,
    ) -> None:
        """sharded: what `shard_model` gave. num_steps: those that are planned, where the schedule ends."""
        self._fused, self._optim, self._table = sharded.fused_optimizer, optim, table
        self._num_steps = num_steps
        self.dense = [one for group in dense for one in group["params"]]
        groups: list[dict[str, Any]] = [{**group} for group in dense]
        betas = (optim.beta1, optim.beta2)
        self._adam: Any = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, fused=True)

    def rates(self, step: int) -> dict[str, float]:
        """The two learning rates at `step`, by the names of their settings."""
        factor = rate_factor(self._optim, step, self._num_steps)
        return {"optim.lr": self._optim.lr * factor, "table.lr": self._table.lr * factor}

    def set_rates(self, step: int) -> None:
        """Before forward, where fbgemm's CPU kernels read the rate that their backward pass uses."""
        rates = self.rates(step)
        for group in self._adam.param_groups:
            group["lr"] = rates["optim.lr"] * group["rate"]
        if any(group["lr"] != rates["table.lr"] for group in self._fused.param_groups):
            for group in self._fused.param_groups:
                group["lr"] = rates["table.lr"]
            self._fused.step()  # changes no weight: it hands the rate to the kernels

    def descend(self, loss: Tensor, guard: StepGuard) -> None:
        """Changes every weight by this rank's part of the mean loss, or none where the step is not finite.
        Collective.

        `guard` has begun with the loss.
        """
        # DDP and TorchRec both average gradients over ranks; the loss is already a global mean.
        (loss * distributed.world_size()).backward()
        if self._optim.clip_norm:
            nn.utils.clip_grad_norm_(self.dense, self._optim.clip_norm)
        # As torch's GradScaler tells its optimizers, which then change neither weights nor state.
        self._adam.found_inf = torch.where(guard.is_finite(), 0.0, 1.0)
        self._adam.step()
        self._adam.zero_grad()

    def continue_at(self, step: int) -> None:
        """Tells the rows' optimizer how many steps its loaded state has seen (Adam's correction)."""
        self._fused.set_optimizer_step(step)

    def state(self) -> dict[str, Any]:
        """Every tensor of both; loading fills them in place."""
        if not self._adam.state:
            self._make_state()
        moments = {
            f"{index}.{name}": value
            for index, state in self._adam.state_dict()["state"].items()
            for name, value in state.items()
        }
        return {"dense": moments, "fused": self._fused.state_dict()["state"]}

    def _make_state(self) -> None:
        """An optimizer that has not stepped has no tensors to load into."""
        for parameter in self.dense:
            parameter.grad = torch.zeros_like(parameter)
        for group in self._adam.param_groups:
            group["lr"] = 0.0
        self._adam.step()
        self._adam.zero_grad()
        for state in self._adam.state.values():
            state["step"].zero_()


def rate_factor(config: OptimConfig, step: int, num_steps: int) -> float:
    """What the learning rates are multiplied by at `step` (from 0) of `num_steps`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    num_decaying = max(num_steps - 1 - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / num_decaying, 1.0)
    shape = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * shape
