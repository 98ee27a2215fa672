"""Learner: the model, its optimizers and one training step.

rows fetched -> sum of losses / targets of all ranks -> backward (loss and gradients are checked, then the
    rows step inside it) -> clip -> AdamW on the dense part
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from hstu_rec import distributed
from hstu_rec.co_occurrence import count_pairs, item_vectors
from hstu_rec.config import OptimConfig, RunConfig
from hstu_rec.data.stream import Sequences, TrainStream
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.encoder_config import EncoderConfig, chosen_kernel
from hstu_rec.flops import history_flops
from hstu_rec.graphs import DenseGraphs
from hstu_rec.guards import NOTHING_ASKED, Asked, DivergenceAlarm, StepGuard, Stepped
from hstu_rec.item_table import ItemTable, fill_rows, live_state, shard_model
from hstu_rec.loss import SampledSoftmax
from hstu_rec.model import NextItemModel
from hstu_rec.negatives import NegativeSampler
from hstu_rec.pipeline import InputPipeline, Meanwhile, Place

# The seen bias learns at this multiple of optim.lr: it has units to go where Adam's steps are as long as the
# rate.
SEEN_RATE = 10.0


def resolved(
    config: RunConfig, dataset: Sequences, former: EncoderConfig | None = None
) -> RunConfig:
    """`config` with what the data decide: the calendar's range, that of the training events.

    The range of the `former` encoder, which is gone on with, begins where it did and never ends earlier.
    """
    encoder = config.encoder
    if encoder.calendar == "none" or encoder.calendar_begin or encoder.calendar_end:
        return config
    begin, end = dataset.train_time_range()
    if former is not None and former.calendar != "none":
        begin, end = former.calendar_begin, max(former.calendar_end, end)
    return replace(config, encoder=replace(encoder, calendar_begin=begin, calendar_end=end))


class Learner:
    """The model, its two optimizers and one training step.

    `begin` or a checkpoint comes before the first step.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Sequences,
        device: torch.device,
        stream: type[TrainStream] = TrainStream,
    ) -> None:
        torch.manual_seed(config.train.seed)
        config = resolved(config, dataset)
        self.config, self.device = config, device
        seed = config.train.seed
        costs_of = partial(history_flops, config.encoder, config.loss, dataset.num_items)
        longest = config.encoder.max_history_len
        self.stream = stream(dataset, config.data, longest, seed, costs_of)
        self.table = ItemTable(config.table, dataset.num_items, config.encoder.dim, device)
        model = NextItemModel(
            self.table,
            HSTUEncoder(config.encoder).to(device),
            SampledSoftmax(config.loss).to(device),
            distributed.product_dtype(config.train.precision),
        )
        model.encoder.recomputes = config.train.recompute
        if config.train.compile:
            model.encoder.compile_layers()
        check_graphs(config, device)
        if config.train.cuda_graphs:
            model.graphs = DenseGraphs(model)
        distributed.use_precision(config.train.precision)
        self.model = shard_model(model, config.table, device, seed)
        sampler = NegativeSampler(config.loss, dataset, seed)
        self.inputs = InputPipeline(self.stream, sampler, model, self.table, device)
        self.encoder, self.loss = model.encoder, model.loss
        encoder = [p for p in model.encoder.parameters() if p.requires_grad]
        of_loss = list(model.loss.parameters())
        self.dense = [*encoder, *of_loss]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [
                {"params": encoder, "weight_decay": optim.weight_decay, "rate": 1.0},
                {"params": of_loss, "weight_decay": 0.0, "rate": SEEN_RATE},
            ],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            fused=True,
        )
        # Adam's moments move a row even where its gradient is 0.
        self.guard = StepGuard(config.guard, self.dense, waits=config.table.optimizer == "adam")
        self.alarm = DivergenceAlarm()
        self._zero = torch.zeros((), device=device, requires_grad=True)
        self.num_steps_planned = config.train.max_epochs * self.stream.num_steps(0)

    def begin(self) -> None:
        """Rows that the data give, which only a new run needs. Collective."""
        table = self.config.table
        if table.init != "co_occurrence":
            return
        vectors = None
        if distributed.is_main():
            dim, norm = self.config.encoder.dim, table.init_norm
            pairs = count_pairs(self.stream.dataset)
            vectors = norm * item_vectors(pairs, dim, self.config.train.seed)
        fill_rows(self.model, self.table, vectors, self.device)

    def step(self, epoch: int, index: int, step: int, asked: Asked = NOTHING_ASKED) -> Stepped:
        """One training step. Collective.

        Raises FloatingPointError on all ranks for a step that is not finite, which has changed nothing, and
        when training diverges: see hstu_rec.guards. What a rank asks for, all are told.
        """
        # Before forward, where fbgemm's CPU kernels read the rate that their backward pass uses.
        self._set_rates(step)
        # Dropout is a function of (seed, step, rank), so that a resumed run repeats it.
        distributed.seed_torch(self.device, self.config.train.seed, step, distributed.rank())
        place = Place(epoch, index, step)
        now, ids = self.inputs.take(place)
        ids.fetch(self.guard)
        later, meanwhile = partial(self.inputs.make_ahead, place.later(2)), self._zero.detach()
        if self.inputs.has_thread:
            later()
        else:
            # Between fetch and the first use of rows: see Meanwhile.
            meanwhile = Meanwhile.apply(self._zero, later)
        self.inputs.send_ahead(place.later(1))
        (loss_sum,) = self.model(now.batch, now.negatives, now.lookup, ids, now.layout)
        self.inputs.advance()
        loss = (loss_sum + meanwhile) / now.batch.num_targets_global
        self.guard.begin(place, loss, asked)
        # DDP and TorchRec both average gradients over ranks; the loss is already a global mean.
        (loss * distributed.world_size()).backward()
        if self.config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self.dense, self.config.optim.clip_norm)
        # As torch's GradScaler tells its optimizers, which then change neither weights nor state.
        optimizer: Any = self.optimizer
        optimizer.found_inf = torch.where(self.guard.is_finite(), 0.0, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        stepped = self.guard.end(is_last=index + 1 == self.stream.num_steps(epoch))
        self.alarm.see(stepped.loss, step, self.config.guard)
        return stepped

    def _set_rates(self, step: int) -> None:
        factor = rate_factor(self.config.optim, step, self.num_steps_planned)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optim.lr * factor * group["rate"]
        set_table_rate(self.model, self.config.table.lr * factor)

    def continue_at(self, step: int) -> None:
        """Tells the table's optimizer how many steps its loaded state has seen (Adam's correction)."""
        self.model.fused_optimizer.set_optimizer_step(step)

    def state(self) -> dict[str, Any]:
        """Every tensor a checkpoint holds; loading fills them in place."""
        if not self.optimizer.state:
            # An optimizer that has not stepped has no tensors to load into.
            for parameter in self.dense:
                parameter.grad = torch.zeros_like(parameter)
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
            self.optimizer.step()
            self.optimizer.zero_grad()
            for state in self.optimizer.state.values():
                state["step"].zero_()
        moments = {
            f"{index}.{name}": value
            for index, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        fused = self.model.fused_optimizer.state_dict()["state"]
        return {"model": live_state(self.model), "dense": moments, "fused": fused}


def check_graphs(config: RunConfig, device: torch.device) -> None:
    """Raises ValueError where train.cuda_graphs is set and cannot be."""
    if not config.train.cuda_graphs:
        return
    dtype = distributed.product_dtype(config.train.precision)
    kernel = chosen_kernel(config.encoder, distributed.is_hopper(device), dtype)
    ranks = distributed.world_size()
    if device.type != "cuda" or ranks > 1 or kernel != "triton":
        raise ValueError(
            "train.cuda_graphs is for one process on CUDA with the attention kernel triton; got "
            f"{ranks} processes on {device.type} with {kernel}; set it to false"
        )


def set_table_rate(sharded: Any, rate: float) -> None:
    """The learning rate of the rows of a sharded model's table, from the next forward on."""
    fused = sharded.fused_optimizer
    if any(group["lr"] != rate for group in fused.param_groups):
        for group in fused.param_groups:
            group["lr"] = rate
        fused.step()  # changes no weight: it hands the rate to the kernels


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
