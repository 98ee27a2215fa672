"""How long a piece of work takes, and what memory it needs."""

import math
import statistics
import time
from collections.abc import Callable

import torch

NUM_WARM_UP = 3
# Some milliseconds of the device, which outlast the launches of what is timed.
SLEEP_CYCLES = 4_000_000
GIB = 2**30


def peak_gib(work: Callable[[], object], device: torch.device) -> float:
    """GiB of the device beyond what is there before; nan on CPU, which does not tell."""
    if device.type != "cuda":
        return math.nan
    work()  # what is allocated once, for a library's own use or to compile, is not counted
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def median_s(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median seconds of `work` on the device."""
    times = []
    for turn in range(NUM_WARM_UP + repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The host is ahead by the time that the device begins: its own time is no part of the figure.
            torch.cuda._sleep(SLEEP_CYCLES)
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            spent = begin.elapsed_time(end) / 1e3
        else:
            began_at = time.perf_counter()
            work()
            spent = time.perf_counter() - began_at
        if turn >= NUM_WARM_UP:
            times.append(spent)
    return statistics.median(times)
