"""What checkpoints beside training cost: blocks of steps with one and without, in turn."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from hstu_rec import distributed, hosts
from hstu_rec.benchmarks.memory import peak_bytes, reset_peak
from hstu_rec.benchmarks.timing import GIB
from hstu_rec.checkpoint import Saver
from hstu_rec.config import RunConfig
from hstu_rec.data.stream import open_dataset
from hstu_rec.learner import Learner
from hstu_rec.memory import row_bytes

NUM_BLOCKS = 8
DEFAULT_BLOCK_STEPS = 50


def saving_times(config: RunConfig, device: torch.device) -> Iterator[str]:
    """Lines of a table: seconds of blocks of checkpoint.every_steps steps (50 when that is 0), every other
    one with a checkpoint begun at its first step; the memory of this host's processes. Collective."""
    dataset = open_dataset(config.data)
    learner = Learner(config, dataset, device)
    learner.begin()
    learner.model.train()
    num_steps = config.checkpoint.every_steps or DEFAULT_BLOCK_STEPS
    needed, there = (NUM_BLOCKS + 1) * num_steps, learner.stream.num_steps(0)
    if there < needed:
        raise ValueError(
            f"an epoch has {there} steps and {needed} are timed; give more users or a smaller "
            "checkpoint.every_steps"
        )
    held: dict[bool, list[float]] = {False: [], True: []}
    begun: list[float] = []
    without = 0
    folder = hosts.on_main(lambda: tempfile.mkdtemp(prefix="saving-", dir="."))
    settings = replace(config.checkpoint, keep=1)
    try:
        with Saver(Path(folder), settings) as saver:
            for block in range(NUM_BLOCKS + 1):
                is_saved = block > 0 and block % 2 == 0
                if block == 1:  # training has grown to its size
                    reset_peak()
                distributed.barrier()
                began_at = time.perf_counter()
                if is_saved:
                    saver.save(block, learner.state(), {})
                    begun.append(time.perf_counter() - began_at)
                for index in range(block * num_steps, (block + 1) * num_steps):
                    learner.step(0, index, index)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if block:  # the first warms up
                    held[is_saved].append(time.perf_counter() - began_at)
                if block == 1:
                    without = peak_bytes()
            saver.wait()
    finally:
        hosts.on_main(lambda: shutil.rmtree(folder))
    yield from _lines(config, held, begun, num_steps)
    rows = dataset.num_items * sum(row_bytes(config.table, config.encoder.dim))
    grown = sum(hosts.gathered(peak_bytes() - without))
    yield (
        f"memory  rows and their state {rows / GIB:.3f} GiB, peak grown by {grown / GIB:.3f} GiB with "
        f"copies: {1 + grown / rows:.2f} times the table"
    )


def _lines(
    config: RunConfig, held: dict[bool, list[float]], begun: list[float], num_steps: int
) -> Iterator[str]:
    for is_saved, times in held.items():
        shown = " ".join(f"{one:.2f}" for one in times)
        name = "with a checkpoint" if is_saved else "without"
        yield f"{name:18s} {num_steps} steps in {statistics.median(times):.3f} s ({shown})"
    slower = statistics.median(held[True]) / statistics.median(held[False]) - 1
    how = "in the background" if config.checkpoint.in_background else "in the foreground"
    yield (
        f"slower by {slower:+.2%}, {how}; training waited {statistics.median(begun) * 1e3:.0f} ms "
        f"({begun[0] * 1e3:.0f} the first time)"
    )
