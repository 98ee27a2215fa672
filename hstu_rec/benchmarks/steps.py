"""Times of training: steps on jagged histories beside the same padded, whole epochs, and how soon a test
figure is reached."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from typing import Any

import torch
from torch import Tensor

from hstu_rec import distributed
from hstu_rec.benchmarks.attention_forms import PaddedLayout
from hstu_rec.config import RunConfig, load
from hstu_rec.data.batch import SequenceBatch
from hstu_rec.data.stream import TrainStream, open_dataset
from hstu_rec.evaluator import evaluate
from hstu_rec.learner import Learner
from hstu_rec.versions import versions

Measure = Callable[[Any, torch.device], Iterator[str]]

NUM_STEPS = 30
NUM_WARM_UP_STEPS = 3
NUM_EPOCHS = 3


def print_lines(schema: type, measure: Measure, options: list[str]) -> None:
    """Prints what `measure` says of the settings that `options` give, headed by date, device and versions.
    Collective."""
    config: Any = load(schema, options)
    choice = config.train.device if issubclass(schema, RunConfig) else "auto"
    with distributed.process_group(choice) as device:
        if distributed.is_main():
            name = distributed.device_name(device)
            print(f"{date.today()}  {distributed.world_size()} processes on {name}  {versions()}")
        for line in measure(config, device):
            if distributed.is_main():
                print(line, flush=True)


def padded(batch: SequenceBatch, length: int) -> SequenceBatch:
    """The batch with every history at `length` events: padding is item 0 at time 0, after the events."""
    lengths = batch.offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = row * length + torch.arange(len(row)) - batch.offsets[row]
    names = ("item_ids", "timestamps", "next_timestamps", "target_ids")
    full = {n: torch.zeros(len(lengths) * length, dtype=torch.int64) for n in names}
    for name, values in full.items():
        values[place] = getattr(batch, name)
    offsets = torch.arange(len(lengths) + 1) * length
    return replace(batch, **full, offsets=offsets)


class PaddedStream(TrainStream):
    """The same batches, every history at max_history_len: padding is encoded and scored like events."""

    def batch(self, epoch: int, step: int, of_all_ranks: bool = False) -> SequenceBatch:
        """This rank's part of a global batch, or that of all, padded."""
        return padded(super().batch(epoch, step, of_all_ranks), self.max_history_len)


def step_times(
    learner: Learner, epoch: int, num_steps: int, before: int = 0, *, is_apart: bool = False
) -> list[float]:
    """Seconds of each of the first steps of an epoch, which `before` steps came before; is_apart: each waits
    for the GPU, else the last alone, as in training. Collective."""
    times = []
    for index in range(num_steps):
        began_at = time.perf_counter()
        learner.step(epoch, index, before + index)
        if learner.device.type == "cuda" and (is_apart or index == num_steps - 1):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began_at)
    return times


def hold_scores(offsets: Tensor, times: Tensor, _later: Tensor, **_options: Any) -> PaddedLayout:
    """In place of `HSTUEncoder.layout`, for histories of one length: scores and bias are held whole."""
    longest = int(offsets[1])
    return PaddedLayout(longest, times.view(-1, longest))


def compare_steps(config: RunConfig, device: torch.device) -> Iterator[str]:
    """Lines of a table: the median step on jagged histories, on padded ones, and on padded ones whose scores
    and bias are held whole, as HSTU is mostly written. Collective.

    The last is for what is mostly written: silu with both biases, shared by the heads, no query time, no
    window.
    """
    medians, dataset, layers = {}, open_dataset(config.data), config.encoder
    forms = {"jagged": TrainStream, "padded": PaddedStream}
    has_bias = layers.use_position_bias and layers.use_time_bias and not layers.is_bias_per_head
    if has_bias and (layers.attention, layers.query_time, layers.window) == ("silu", "own", 0):
        forms["padded, held"] = PaddedStream
    for name, stream in forms.items():
        if name == "padded, held":
            train = replace(config.train, cuda_graphs=False, compile=False)
            config = replace(config, train=train)
        learner = Learner(config, dataset, device, stream)
        if name == "padded, held":
            encoder: Any = learner.encoder
            encoder.layout = hold_scores
        learner.begin()
        num_steps = min(NUM_STEPS, learner.stream.num_steps(0))
        times = step_times(learner, 0, num_steps, is_apart=True)
        times = times[min(NUM_WARM_UP_STEPS, num_steps - 1) :]
        medians[name] = statistics.median(times)
        ratio = f"  ({medians[name] / medians['jagged']:.1f} times)" if len(medians) > 1 else ""
        yield f"{name:12s} {medians[name] * 1e3:9.2f} ms a step{ratio}"


def figures_by_epoch(config: RunConfig, device: torch.device) -> Iterator[str]:
    """Lines of a table: seconds of training after each epoch, and the test figures then. Collective.

    It tells how soon a figure is reached. Settings and epochs are chosen on validation, by train.
    """
    if 10 not in config.eval.ks:
        raise ValueError(f"eval.ks must hold 10, which is shown; got {config.eval.ks}")
    dataset = open_dataset(config.data)
    learner, spent, step = Learner(config, dataset, device), 0.0, 0
    learner.begin()
    for epoch in range(config.train.max_epochs):
        learner.model.train()
        times = step_times(learner, epoch, learner.stream.num_steps(epoch), step)
        spent, step = spent + sum(times), step + len(times)
        metrics = evaluate(learner.model, dataset, "test", config.eval, device)
        figures = (
            f"{part.removeprefix('seen_')} "
            + " ".join(f"{name} {metrics[part][name]:.4f}" for name in ("recall@10", "ndcg@10"))
            for part in ("seen_allowed", "seen_masked")
        )
        yield f"epoch {epoch + 1:3d}  {spent:8.1f} s  test, seen items {', '.join(figures)}"


def time_epochs(config: RunConfig, device: torch.device) -> Iterator[str]:
    """Lines of a table: seconds of whole epochs without validation, and their steps. Collective."""
    learner = Learner(config, open_dataset(config.data), device)
    learner.begin()
    for epoch in range(NUM_EPOCHS):
        distributed.barrier()
        times = step_times(learner, epoch, learner.stream.num_steps(epoch))
        yield (
            f"epoch {epoch}  {sum(times):7.2f} s  {len(times)} steps  median "
            f"{statistics.median(times) * 1e3:.1f} ms  shortest {min(times) * 1e3:.1f} ms"
        )
