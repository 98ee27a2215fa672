"""Saver: checkpoints written beside training, which waits for a copy in memory and not for the disk.

save(step, state, meta)   the former one is waited for; tensors are copied; a thread writes the copies:
                          step_N.tmp -> fsync -> manifest -> rename -> pointer `last` -> older removed
wait()                    until it is durable
"""

import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hstu_rec import distributed
from hstu_rec.checkpoint.folder import CheckpointError, Group, point, purge
from hstu_rec.checkpoint.tensors import named_tensors, save
from hstu_rec.settings import at_least

# A save in progress is given so long to end when the run ends in an error.
LAST_WAIT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves what it needs to go on, and how much of it is kept."""

    every_minutes: float = 10.0
    """Minutes of training between checkpoints, beside those of validations; 0 for these alone."""
    every_steps: int = 0
    """Steps between checkpoints; 0 for none by steps."""
    keep: int = 2
    """Newest checkpoints kept, besides the best."""
    in_background: bool = True
    """Writes a copy, in the host's memory, beside training; else training waits for the disk."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        return at_least(self, 0, "every_minutes", "every_steps") + at_least(self, 1, "keep")


class Saver:
    """Saves into `root`, one checkpoint at a time. Every method is collective.

    What fails in the background is raised, as CheckpointError on all ranks, by the next `save` or `wait`.
    """

    def __init__(self, root: Path, config: CheckpointConfig) -> None:
        self._root, self._config = root, config
        self._copies = Copies()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._path: Path | None = None
        # Its collectives come between those of training in any order.
        self._group: Group = None
        if config.in_background and distributed.world_size() > 1:
            self._group = distributed.another_group()

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Begins to save, once the former save is through; `state` may change as soon as this returns."""
        self.wait()
        if not self._config.in_background:
            self._write(step, state, meta)
            return
        copied = self._copies.of(state)
        self._thread = threading.Thread(
            target=self._write_or_note, args=(step, copied, meta), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> Path | None:
        """Waits until the save that was begun is durable; its folder, None before the first."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return self._path

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
            elif self._thread is not None:
                # Not for ever: another rank may be gone.
                self._thread.join(LAST_WAIT_S)
        finally:
            if self._thread is None or not self._thread.is_alive():
                self._copies.forget()
                if self._group is not None:
                    dist.destroy_process_group(self._group)

    def _write_or_note(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        try:
            self._write(step, state, meta)
        except BaseException as failure:  # raised in the main thread
            self._failure = failure

    def _write(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        self._path = save(self._root, step, state, meta, self._group)
        point(self._root, "last", self._path, self._group)
        try:
            purge(self._root, self._config.keep, self._group)
        except CheckpointError as error:
            # What is saved is durable; the next purge tries again.
            warnings.warn(f"older checkpoints could not be removed: {error}", stacklevel=2)


class Copies:
    """Copies in the host's memory, which is kept from one time to the next: fresh pages take as long as the
    copy itself."""

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Gives the memory back."""
        for room in self._room.values():
            if room.nbytes and torch.cuda.is_initialized():
                _cudart().cudaHostUnregister(room.data_ptr())
        self._room.clear()

    def of(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Copies of the tensors of `state`, which hold until the next call, by their paths in it."""
        return {name: self._copied(name, value) for name, value in named_tensors(state).items()}

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return self._filled(name, tensor)
        local: Any = tensor.to_local()
        if hasattr(local, "local_shards"):  # TorchRec's
            shards = [
                self._filled(f"{name}/{i}", one) for i, one in enumerate(local.local_shards())
            ]
            copied = type(local)(shards, local.local_offsets())
        else:
            copied = self._filled(name, local)
        # from_local would bring it back to the mesh's device.
        return DTensor(copied, tensor._spec, requires_grad=False)

    @torch.no_grad()
    def _filled(self, name: str, tensor: Tensor) -> Tensor:
        room = self._room.get(name)
        if room is None or (room.shape, room.dtype) != (tensor.shape, tensor.dtype):
            room = torch.empty(tensor.shape, dtype=tensor.dtype)
            if tensor.is_cuda and room.nbytes:
                # Not by pin_memory, which takes the next power of two.
                _register(room)
            self._room[name] = room
        return room.copy_(tensor)


def _cudart() -> Any:
    return torch.cuda.cudart()


def _register(room: Tensor) -> None:
    """Lets a GPU copy into it directly, as fast as its bus."""
    error = _cudart().cudaHostRegister(room.data_ptr(), room.nbytes, 0)
    if int(error):
        warnings.warn(
            f"{room.nbytes} bytes of the host's memory cannot be page-locked ({error}): copies of "
            "checkpoints are slower",
            stacklevel=2,
        )
