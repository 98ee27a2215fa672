"""The process group, the device and the seeds: the only reader of environment variables.

One process started by `python`, or many started by torchrun or torchx, look the same to the rest of
the package: a default process group always exists after `start()`.
"""

import ctypes
import gc
import hashlib
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from ipaddress import ip_address
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from hstu_rec.meeting import Meeting

T = TypeVar("T", bound=Any)
DeviceChoice = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "tf32", "bfloat16"]
# A use's place is part of its numbers: new ones come last.
RandomUse = Literal["order of users", "rows", "negatives", "stochastic length"]
RANDOM_USES: tuple[RandomUse, ...] = get_args(RandomUse)

# A rank that dies is noticed by its peers after this long, when the launcher does not stop them first.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# torchrun ends its processes well within this after it was asked to.
STOPPED_WITHIN_S = 10.0

# glibc's mallopt: numbers of the settings, and the largest threshold that it accepts.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_MMAP_THRESHOLD = 2**25


def start(device: DeviceChoice = "auto") -> torch.device:
    """Joins (or, in a single process, makes) the process group and returns this rank's device.

    Raises ValueError when CUDA is asked for and absent, and where other hosts could not reach this one.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "train.device is 'cuda' but torch sees no CUDA device; use 'auto' or 'cpu', "
            f"or install a CUDA build of torch (installed: {torch.__version__})"
        )
    use_cuda = uses_cuda(device)
    chosen = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if use_cuda
        else torch.device("cpu")
    )
    if use_cuda:
        torch.cuda.set_device(chosen)
    else:
        _keep_freed_memory()
    if not dist.is_initialized():
        # Both back ends: CPU tensors (row counts, guards) travel over gloo also in a CUDA run.
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        if is_launched():
            _check_reachable()
            _meet(backend)
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return chosen


_is_alone = False
# Of this process's group, when a launcher started it.
_meeting: Meeting | None = None


def _meet(backend: str) -> None:
    global _meeting
    store, own, count = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    _meeting = Meeting(store, own, count, COLLECTIVE_TIMEOUT)
    dist.init_process_group(
        backend, store=_meeting.store, rank=own, world_size=count, timeout=COLLECTIVE_TIMEOUT
    )


def _check_reachable() -> None:
    """Raises ValueError where gloo would wait for other hosts at the loopback address: it takes that of this
    host's name, which many systems give to 127.0.1.1, unless it is told an interface."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    is_one_host = os.environ.get("LOCAL_WORLD_SIZE", world_size) == world_size
    if is_one_host or "GLOO_SOCKET_IFNAME" in os.environ or _is_loopback(os.environ["MASTER_ADDR"]):
        return
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        address = ""
    if not address or _is_loopback(address):
        where = f"is {address}, which no other host reaches" if address else "has no address"
        raise ValueError(
            f"the processes are on several hosts, but this one's name, {name}, {where}; set "
            "GLOO_SOCKET_IFNAME (and on CUDA NCCL_SOCKET_IFNAME) to the network interface between the "
            "hosts, one of: " + ", ".join(one for _, one in socket.if_nameindex())
        )


def _is_loopback(address: str) -> bool:
    """Of an address, or of the name that stands for it everywhere."""
    try:
        return ip_address(address.split("%")[0]).is_loopback
    except ValueError:
        return address == "localhost"


def _keep_freed_memory() -> None:
    """Keeps freed blocks in the process for the next step.

    glibc gives those of some MiB back to the kernel, and the page faults of taking them again were up to
    a fifth of a step with the exact softmax. Other C libraries have no mallopt and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def uses_cuda(device: DeviceChoice) -> bool:
    """True when that choice takes CUDA on this machine."""
    return device != "cpu" and torch.cuda.is_available()


def environment_of(slot: int, num_processes: int) -> dict[str, str]:
    """The environment of a launcher that is the `slot`-th of several: with the next `num_processes` of the
    GPUs that this process sees, going round when they are fewer."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(gpu) for gpu in range(torch.cuda.device_count())]
    first = slot * num_processes
    mine = [names[at % len(names)] for at in range(first, first + num_processes)] if names else []
    chosen = {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(mine))} if mine else {}
    return {**os.environ, **chosen}


def is_hopper(device: torch.device) -> bool:
    """Whether the device is what the fused kernels were made for and run on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def product_dtype(precision: Precision) -> torch.dtype:
    """Of the dense part's products under that precision."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def use_precision(precision: Precision) -> None:
    """Lets CUDA take TF32 for products of float32, or not, in this process."""
    torch.backends.cuda.matmul.fp32_precision = "ieee" if precision == "float32" else "tf32"


def device_name(device: torch.device) -> str:
    """What the device is called in a result: CPU, or the GPU's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def stop() -> None:
    """Leaves the process group; harmless when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # TorchRec's sharded modules hold themselves, and the group's threads and sockets with them: 3 and 4 a
        # run. Python's collector counts objects, which are few, and would come after dozens of runs.
        gc.collect()


@contextmanager
def process_group(device: DeviceChoice = "auto") -> Iterator[torch.device]:
    """`start()` on entry and, if this call made the group, `stop()` on exit.

    A failure is told to all processes, and one that waited for the process that failed raises what was told:
    ValueError for a mistake, else PeerLost. The process is to end then: a group of several that has lost one
    is left as it is, because NCCL's would wait for the lost one on its way down (seen on two H200s).
    """
    is_ours = not dist.is_initialized()
    try:
        yield start(device)
    except BaseException as error:
        if is_ours and world_size() == 1:
            stop()
        if isinstance(error, Exception) and _meeting is not None:
            explained = _meeting.explained(error)
            if explained is not error:
                raise explained from error
        raise
    else:
        if is_ours:
            stop()


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process takes itself for the only one, so that what else is collective is not."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def has_group() -> bool:
    """Whether there is a process group, and it counts here (see `alone`)."""
    return dist.is_initialized() and not _is_alone


def rank() -> int:
    """This process's number among all, 0 when there is no process group."""
    return dist.get_rank() if has_group() else 0


def world_size() -> int:
    """The number of processes, 1 when there is no process group."""
    return dist.get_world_size() if has_group() else 1


def local_world_size() -> int:
    """The number of processes on this host, as the launcher gives it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def num_cores() -> int:
    """CPU cores that are this process's share of those it may run on."""
    return max(len(os.sched_getaffinity(0)) // max(local_world_size(), 1), 1)


def host_memory() -> int:
    """Bytes of this host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_launched() -> bool:
    """True in a process that torchrun or torchx started."""
    return "RANK" in os.environ


def launched_rank() -> int:
    """The rank the launcher gave this process, known before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def job() -> str | None:
    """What the launcher calls the job that this process is of, the same each time that it is started again;
    None without a launcher."""
    if not is_launched():
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"{socket.gethostname()} {os.getppid()}"


def num_restarts() -> int:
    """How often the launcher has started the processes of this job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def end_restarts() -> None:
    """Where torchrun would start this process again: has it end all of its own instead, and waits for that.

    For a failure that would come again. One process of a host asks, because a torchrun that is asked twice
    leaves its work half done.
    """
    if num_restarts() < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to be saved
        is_first = os.environ["LOCAL_RANK"] == "0"
        if _meeting is not None:
            is_first = _meeting.is_first(f"of host {os.environ['GROUP_RANK']}", is_first)
        if is_first:
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(STOPPED_WITHIN_S)


def seed_torch(device: torch.device, *parts: int) -> None:
    """Seeds torch's generator of `device`, this process's own, with several numbers of at least 0.

    torch.manual_seed would seed every back end there is: 0.4 ms, 2 % of a small step.
    """
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed_seed(*parts))
    else:
        torch.default_generator.manual_seed(mixed_seed(*parts))


def generator(use: RandomUse, seed: int, number: int) -> np.random.Generator:
    """Random numbers that are a function of their use, the run's seed and one number (epoch, step, block).

    Counter-based, so that any of them are made on any rank, at any time, without those before. Philox
    counts to 2**256; each use has a quarter of its own.
    """
    counter = [0, 0, 0, RANDOM_USES.index(use) << 62]
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=counter))


def mixed_seed(*parts: int) -> int:
    """One seed of 32 bits (all that torch's CPU generator reads) from several int64 numbers.

    numpy's SeedSequence mixes as well, in 0.4 ms, a tenth of a small model's step on a GPU.
    """
    packed = struct.pack(f"{len(parts)}q", *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little")


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def another_group() -> dist.ProcessGroup:
    """All ranks, on CPU, once more: its collectives come between those of others in any order. Collective."""
    made = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    assert isinstance(made, dist.ProcessGroup)
    return made


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place, on every rank."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def start_all_reduce_sum(tensor: torch.Tensor) -> Callable[[], None]:
    """Begins the sum over ranks, in place; what is returned waits until it is there."""
    if world_size() == 1:
        return lambda: None
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    return work.wait  # pyright: ignore[reportReturnType]


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """The maximum over ranks, in place, on every rank."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def all_gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """All ranks' `rows` [n_r, ...] concatenated by rank: [sum n_r, ...]; n_r may differ and be 0."""
    return all_gather_placed(rows)[0]


def all_gather_placed(rows: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """`all_gather_rows`, and where this rank's own are among them."""
    if world_size() == 1:
        return rows, slice(0, len(rows))
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    sizes[rank()] = rows.shape[0]
    counts = all_reduce_sum(sizes).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    gathered = all_gather_stacked(padded)
    begin = sum(counts[: rank()])
    every = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
    return every, slice(begin, begin + len(rows))


def all_gather_stacked(tensor: torch.Tensor) -> torch.Tensor:
    """All ranks' `tensor` [...], equal in shape: [ranks, ...]."""
    if world_size() == 1:
        return tensor[None]
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.stack(gathered)


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's values, in place, on every rank."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor
