"""What training holds, measured beside what hstu_rec.planning says: a few real steps on made events."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from hstu_rec import distributed
from hstu_rec.item_table import Cluster
from hstu_rec.learner import Learner
from hstu_rec.planning import GIB, PlannedRun, made_dataset, make_plan

NUM_STEPS = 6
REHEARSAL_ITEMS = 4096


def measure_memory(config: PlannedRun, device: torch.device) -> Iterator[str]:
    """Lines of measured and estimated memory of each rank; `world` and `hbm` are those of the processes.
    Collective.

    On CUDA the peak of the allocator, on CPU that of the resident set without files, over what there was
    before the model. A small model has trained before, so that libraries are loaded.
    """
    if not config.plan.num_items:
        raise ValueError("memory is measured on made events; give plan.num_items, at least 1")
    cluster = Cluster.present(device)
    hosts = cluster.num_ranks // cluster.ranks_per_host
    plan_config = replace(config.plan, device=cluster.device_type, popularity_power=0.0)
    config = replace(config, world=f"{hosts}x{cluster.ranks_per_host}", plan=plan_config)
    few = replace(plan_config, num_items=REHEARSAL_ITEMS)
    data = replace(config.data, batch_users=16, batch_events=0)
    _train(replace(config, plan=few, data=data), device)
    gc.collect()
    before, peak_before = _held(device)
    held = _train(config, device)
    measured = torch.tensor(held - before, dtype=torch.float64)
    plan = make_plan(config, cluster)
    estimated = plan.device_bytes
    yield f"before the model  {before / GIB:.3f} GiB, at most {peak_before / GIB:.3f}"
    yield "estimated GiB     " + ", ".join(f"{k} {v / GIB:.3f}" for k, v in plan.device.items())
    for rank, value in enumerate(distributed.all_gather_rows(measured[None]).tolist()):
        yield (
            f"rank {rank}            measured {value / GIB:.3f} GiB, estimated {estimated / GIB:.3f} GiB, "
            f"{estimated / value - 1:+.1%}"
        )


def _train(config: PlannedRun, device: torch.device) -> int:
    """The most bytes that were held in a few steps."""
    learner = Learner(config, made_dataset(config, NUM_STEPS), device)
    learner.model.train()
    for index in range(min(NUM_STEPS, learner.stream.num_steps(0))):
        learner.step(0, index, index)
    return _held(device)[1]


def _held(device: torch.device) -> tuple[int, int]:
    """Bytes that are held, and the most that were so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return held
    return _kept("RssAnon"), peak_bytes()


def peak_bytes() -> int:
    """The most memory this process has held since `reset_peak`, without pages of files: those of libraries
    are not the model's, and come in when they are first touched."""
    return _kept("VmHWM") - _kept("RssFile")


def reset_peak() -> None:
    """`peak_bytes` counts from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def _kept(name: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[name].split()[0])
