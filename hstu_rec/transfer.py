"""Tensors on their way between host and device, without a wait of one for the other."""

import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch

T = TypeVar("T", bound=Any)


def on_device(values: T, device: torch.device, but: Collection[str] = ()) -> T:
    """A copy of a dataclass, its tensors and those of dataclasses in it on `device`, but for some fields.

    From CPU to CUDA they travel as one, through pinned memory: nothing waits for the device.
    """
    found = list(tensors_of(values, but))
    is_sent = device.type == "cuda" and all(tensor.device.type == "cpu" for tensor in found)
    moved = sent(found, device) if is_sent else [tensor.to(device) for tensor in found]
    return with_tensors(values, iter(moved), but)


def tensors_of(values: Any, but: Collection[str] = ()) -> Iterator[torch.Tensor]:
    """The tensors of a dataclass and of dataclasses in it."""
    for field in fields(values):
        value = getattr(values, field.name)
        if field.name in but:
            continue
        if isinstance(value, torch.Tensor):
            yield value
        elif is_dataclass(value):
            yield from tensors_of(value)


def with_tensors(values: T, tensors: Iterator[torch.Tensor], but: Collection[str] = ()) -> T:
    """A copy of a dataclass with others in place of its `tensors_of`."""
    changed = {}
    for field in fields(values):
        value = getattr(values, field.name)
        if field.name in but:
            continue
        if isinstance(value, torch.Tensor):
            changed[field.name] = next(tensors)
        elif is_dataclass(value):
            changed[field.name] = with_tensors(value, tensors)
    return replace(values, **changed)


def sent(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copies of CPU tensors, views of one piece of memory on `device`, each on a multiple of 16 bytes."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    begins = [0, *accumulate(-(-size // 16) * 16 for size in sizes)]
    packed = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")

    def parts(memory: torch.Tensor) -> list[torch.Tensor]:
        return [
            memory[begin : begin + size].view(tensor.dtype).view(tensor.shape)
            for tensor, begin, size in zip(tensors, begins, sizes, strict=False)
        ]

    for part, tensor in zip(parts(packed), tensors, strict=True):
        part.copy_(tensor)
    return parts(packed.to(device, non_blocking=True))


def start_reading(
    values: torch.Tensor, wait: Callable[[], None] | None = None
) -> Callable[[], list[float]]:
    """Begins to bring a scalar or vector to the host, once `wait`, where given, is through; what is returned
    waits for it alone, not for what a GPU is given to do meanwhile."""
    if not values.is_cuda:

        def read() -> list[float]:
            if wait is not None:
                wait()
            return values.reshape(-1).tolist()

        return read
    stream = torch.cuda.current_stream(values.device)
    if wait is not None:
        # What the GPU does next is not to wait for other ranks.
        side = _side_stream(values.device)
        side.wait_stream(stream)
        stream = side
    with torch.cuda.stream(stream):
        if wait is not None:
            wait()
        host = values.reshape(-1).to("cpu", non_blocking=True)
        done = stream.record_event()
    values.record_stream(stream)

    def read_host() -> list[float]:
        done.synchronize()
        return host.tolist()

    return read_host


def beside(device: torch.device, work: Callable[[], T]) -> T:
    """The dataclass that `work` makes; on CUDA without a wait for what the device is doing, and there before
    it does what comes next."""
    if device.type != "cuda":
        return work()
    now, stream = torch.cuda.current_stream(device), _side_stream(device)
    with torch.cuda.stream(stream):
        made = work()
    now.wait_stream(stream)
    for tensor in tensors_of(made):
        tensor.record_stream(now)
    return made


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
