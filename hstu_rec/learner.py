"""Learner: the next-item model, and what its training step does before backward.

rows fetched -> sum of losses / targets of all ranks
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hstu_rec import distributed
from hstu_rec.any_learner import AnyLearner
from hstu_rec.co_occurrence import count_pairs, item_vectors
from hstu_rec.config import RunConfig
from hstu_rec.data.stream import Sequences, TrainStream
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.encoder_config import EncoderConfig, chosen_kernel
from hstu_rec.flops import history_flops
from hstu_rec.graphs import DenseGraphs
from hstu_rec.item_table import ItemTable, fill_rows, shard_model
from hstu_rec.loss import SampledSoftmax
from hstu_rec.model import NextItemModel
from hstu_rec.negatives import NegativeSampler
from hstu_rec.optimizers import DenseGroup
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


class Learner(AnyLearner):
    """The model, its two optimizers and one training step."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Sequences,
        device: torch.device,
        stream: type[TrainStream] = TrainStream,
    ) -> None:
        torch.manual_seed(config.train.seed)
        self.config = config = resolved(config, dataset)
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
        sharded = shard_model(model, config.table, device, seed)
        encoder = [one for one in model.encoder.parameters() if one.requires_grad]
        dense: list[DenseGroup] = [
            {"params": encoder, "weight_decay": config.optim.weight_decay, "rate": 1.0},
            {"params": [*model.loss.parameters()], "weight_decay": 0.0, "rate": SEEN_RATE},
        ]
        num_steps = config.train.max_epochs * self.stream.num_steps(0)
        super().__init__(config, sharded, dense, num_steps, device)
        sampler = NegativeSampler(config.loss, dataset, seed)
        self.inputs = InputPipeline(self.stream, sampler, model, self.table, device)
        self.encoder, self.loss = model.encoder, model.loss
        self._zero = torch.zeros((), device=device, requires_grad=True)

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

    def num_steps(self, epoch: int) -> int:
        """Steps of that epoch."""
        return self.stream.num_steps(epoch)

    def forward(self, place: Place) -> Tensor:
        """This rank's part of the mean loss; the inputs of later steps are made and sent meanwhile."""
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
        return (loss_sum + meanwhile) / now.batch.num_targets_global

    def told_of(self, place: Place) -> dict[str, float]:
        """How uneven the ranks' work is."""
        return {"imbalance": self.stream.imbalance(place.epoch, place.batch)}


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
