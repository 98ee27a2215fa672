"""Runs a function on several processes of one gloo group."""

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 240


def _run(
    rank: int, world_size: int, store: str, queue: Any, function: Callable, args: tuple
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        result = function(*args)
        dist.barrier()
        queue.put((rank, True, result))
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on every rank; the results by rank. Results are plain Python or numpy."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_run, args=(rank, world_size, store, queue, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while len(results) < world_size:
                is_last_look = time.monotonic() > deadline or any(
                    process.exitcode and rank not in results
                    for rank, process in enumerate(processes)
                )
                try:
                    rank, is_done, result = queue.get(timeout=1)
                except Empty:
                    if not is_last_look:
                        continue
                    raise TimeoutError(
                        f"only ranks {sorted(results)} of {world_size} answered; exit codes "
                        f"{[process.exitcode for process in processes]}"
                    ) from None
                if not is_done:
                    raise RuntimeError(f"rank {rank} of {world_size} failed:\n{result}")
                results[rank] = result
        finally:
            if len(results) < world_size:  # the others wait for the one that failed
                for process in processes:
                    process.kill()
            for process in processes:
                process.join(timeout=5)
                process.kill()
    return [results[rank] for rank in range(world_size)]
