"""Times a training step on jagged histories beside the same step on all padded positions, in one run.

python apps/benchmark.py step [CONFIG.yaml ...] [key=value ...]
"""

import statistics
import time
from dataclasses import replace
from datetime import date

import torch

from hstu_rec import distributed
from hstu_rec.config import RunConfig, load, run_app
from hstu_rec.data.batch import SequenceBatch
from hstu_rec.data.dataset import Dataset
from hstu_rec.trainer import Learner
from hstu_rec.versions import versions

NUM_STEPS = 30


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


def step_s(learner: Learner, length: int | None) -> float:
    """Median seconds of a step; with `length`, on histories padded to it."""
    real = learner.stream.batch
    if length is not None:
        learner.stream.batch = lambda epoch, index: padded(real(epoch, index), length)
    times = []
    for index in range(NUM_STEPS):
        began_at = time.perf_counter()
        learner.step(0, index % learner.stream.num_steps(0), index)
        times.append(time.perf_counter() - began_at)
    learner.stream.batch = real
    return statistics.median(times[3:])


def main(arguments: list[str]) -> None:
    if arguments[:1] != ["step"]:
        raise ValueError(
            "give what to measure: python apps/benchmark.py step [CONFIG.yaml ...] [key=value ...]"
        )
    config = load(RunConfig, arguments[1:])
    with distributed.process_group(config.train.device) as device:
        learner = Learner(config, Dataset(config.data.path), device)
        jagged, full = step_s(learner, None), step_s(learner, config.encoder.max_history_len)
        if distributed.is_main():
            print(f"{date.today()}  {distributed.world_size()} processes on {device}  {versions()}")
            print(f"jagged  {jagged * 1e3:8.1f} ms a step")
            print(f"padded  {full * 1e3:8.1f} ms a step  ({full / jagged:.1f} times)")


if __name__ == "__main__":
    run_app(main)
