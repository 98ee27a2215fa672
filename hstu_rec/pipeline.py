"""InputPipeline: what the model is given at a step, made and sent ahead of its use.

A step seldom waits for other ranks, because it works on the next ones of its epoch meanwhile (as TorchRec's
sparse distribution pipeline does):

    rows of this step travel              ->  the ids of the next one are sent
    gradients of this step's rows travel  ->  the batch after that is made; of many events, in a thread
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hstu_rec import distributed
from hstu_rec.data.batch import SequenceBatch
from hstu_rec.data.stream import TrainStream
from hstu_rec.graphs import filled_batch, filled_layout, filled_lookup, filled_negatives
from hstu_rec.item_table import ItemTable, SentIds, check_ids
from hstu_rec.model import Lookup, NextItemModel
from hstu_rec.negatives import NegativeSampler, with_seen
from hstu_rec.ops import JaggedLayout
from hstu_rec.ops.triton_layout import BlockLayout
from hstu_rec.softmax import Negatives
from hstu_rec.transfer import beside, on_device

# Events of a rank's step from which its input is made in a thread beside CUDA: 131,000 events took 15 ms in
# place of 23. Python's threads take turns: of few events operations are short, and steps were half longer.
THREAD_EVENTS = 2**15


class Place(NamedTuple):
    """Which batch of which epoch, at which step of the run."""

    epoch: int
    batch: int
    step: int

    def later(self, count: int) -> "Place":
        """The place `count` steps on in the same epoch."""
        return Place(self.epoch, self.batch + count, self.step + count)


@dataclass(frozen=True)
class StepInput:
    """What the model is given at a step."""

    batch: SequenceBatch
    negatives: Negatives
    layout: JaggedLayout
    num_ids: tuple[
        int, int, int
    ]  # of histories, targets and negatives; filled for a graph there are more
    lookup: Lookup | None = None  # made when the ids are sent

    def to(self, device: torch.device) -> "StepInput":
        """The input on `device`."""
        layout = self.layout.to(device)  # in its own way
        return replace(on_device(self, device, but={"layout"}), layout=layout)

    def with_lookup(self) -> "StepInput":
        """The input with its deduplicated lookup."""
        uses = self.batch.item_ids, self.batch.target_ids, self.negatives.ids
        own = [ids[:count] for ids, count in zip(uses, self.num_ids, strict=True)]
        lookup = Lookup.of_uses(own, self.negatives)
        return replace(self, lookup=filled_lookup(lookup, tuple(map(len, uses))))


class InputPipeline:
    """The inputs of steps, each a function of its place and the rank alone, whether made ahead or not."""

    def __init__(
        self,
        stream: TrainStream,
        sampler: NegativeSampler,
        model: NextItemModel,
        table: ItemTable,
        device: torch.device,
    ) -> None:
        self._stream, self._sampler, self._device = stream, sampler, device
        self._model, self._table = model, table
        is_alone = sampler.config.negatives != "in_batch" or distributed.world_size() == 1
        mean = stream.num_positions / stream.num_steps(0) / distributed.world_size()
        is_beside = device.type == "cuda" and is_alone and mean >= THREAD_EVENTS
        self._thread = ThreadPoolExecutor(1, "inputs") if is_beside else None
        # Few entries: those for places that do not come next are dropped, on every rank alike.
        self._made: dict[Place, Future[StepInput]] = {}
        self._sent: dict[Place, tuple[StepInput, SentIds]] = {}

    def take(self, place: Place) -> tuple[StepInput, SentIds]:
        """The input of a step, and its ids on their way. Collective."""
        ahead = self._sent.pop(place, None)
        self._sent.clear()
        return ahead or self._send(place)

    def send_ahead(self, place: Place) -> None:
        """Sends the ids of a step, if its epoch has it. Collective."""
        if place.batch < self._stream.num_steps(place.epoch):
            self._sent[place] = self._send(place)
            if distributed.world_size() == 1:
                # No other to wait for; later it would be for the GPU's forward pass.
                self.advance()

    @property
    def has_thread(self) -> bool:
        """Whether inputs are made in a thread, which is better begun soon."""
        return self._thread is not None

    def make_ahead(self, place: Place) -> None:
        """Makes the input of a step on CPU, if its epoch has it; collective for in_batch negatives."""
        if place.batch >= self._stream.num_steps(place.epoch):
            return
        if self._thread is not None:
            self._made[place] = self._thread.submit(self._make, place)
        else:
            self._made[place] = Future()
            self._made[place].set_result(self._make(place))

    def advance(self) -> None:
        """Starts the second exchange of the ids that were sent ahead, once others have sent theirs."""
        for _, ids in self._sent.values():
            ids.advance()

    def _send(self, place: Place) -> tuple[StepInput, SentIds]:
        ahead = self._made.pop(place, None)
        made = ahead.result() if ahead else self._make(place)
        self._made = {later: self._made[later] for later in self._made if later == place.later(1)}
        # 10 ms on CPU for 270,000 ids, and a wait for the device elsewhere.
        sent = beside(self._device, lambda: made.to(self._device).with_lookup())
        assert sent.lookup is not None
        return sent, self._table.send(sent.lookup.ids, is_checked=True)

    def _make(self, place: Place) -> StepInput:
        batch = self._stream.batch(place.epoch, place.batch)
        negatives = self._sampler.draw(place.step, batch)
        if self._sampler.config.use_seen_bias:
            is_shared = negatives.is_divided and distributed.world_size() > 1
            of_all = self._stream.batch(*place[:2], of_all_ranks=True) if is_shared else batch
            negatives = with_seen(negatives, batch, of_all)
        uses = batch.item_ids, batch.target_ids, negatives.ids
        for ids in uses[:2] if negatives.is_divided else uses:
            check_ids(ids, self._table.num_items)
        num_ids = len(uses[0]), len(uses[1]), len(uses[2])
        if self._model.graphs:
            batch, negatives, layout = self._filled(batch, negatives)
            return StepInput(batch, negatives, layout, num_ids)
        return StepInput(batch, negatives, self._layout(batch), num_ids)

    def _layout(self, batch: SequenceBatch) -> JaggedLayout:
        times = batch.timestamps, batch.next_timestamps
        return self._model.encoder.layout(batch.offsets, *times, dtype=self._model.dtype)

    def _filled(
        self, batch: SequenceBatch, negatives: Negatives
    ) -> tuple[SequenceBatch, Negatives, BlockLayout]:
        """What has sizes of a graph."""
        num_events, longest = len(batch.item_ids), self._stream.max_history_len
        batch = filled_batch(batch, longest)
        size = len(batch.item_ids)
        negatives = filled_negatives(negatives, num_events, size)
        layout = self._layout(batch)
        assert isinstance(layout, BlockLayout)  # the kernel was checked
        return batch, negatives, filled_layout(layout, longest)


class Meanwhile(torch.autograd.Function):
    """`Meanwhile.apply(zero, work)`: 0, and in backward a call of `work` while gradients of rows travel.

    Autograd runs the youngest of the nodes that are ready: one made between the lookup and the use of its
    rows comes after the gradients are sent and before they are waited for. If it ever came elsewhere,
    nothing but the overlap would be lost, because every rank runs the same nodes in the same order. It
    saves 2 to 4 % of a step of two processes on CPU, where a thread for the same work cost 8 %.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """A copy of `zero`, a scalar that requires a gradient; to be added to the loss."""
        zero: Tensor = inputs[0]
        work: Callable[[], None] = inputs[1]
        ctx.work = work
        return zero.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """No gradient."""
        ctx.work()
        return None, None
