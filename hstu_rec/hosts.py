"""What the processes of a run, on one host or several, must have in common, looked at when it starts.

One folder that all see, the same settings, data and code: what is wrong on one of them is told by all.
"""

import json
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from hstu_rec import distributed
from hstu_rec.durable import make_folder
from hstu_rec.meeting import is_mistake

T = TypeVar("T")

# A network file system may show a new file to other hosts this late: NFS keeps names for up to a minute.
SHOWN_WITHIN_S = 60.0


class RankError(ValueError):
    """What failed on one process or more; raised on all."""

    is_of_system = False
    """Whether it is no mistake: what the system did not do may go well another time."""


class SystemRankError(RankError):
    """An OSError of one process or more, as of a disk; raised on all."""

    is_of_system = True


def together(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Every process's result, by rank. Collective. Raises RankError on all when any fails, naming the hosts
    where not all of them do.

    group: the processes by another group of them all, for a thread beside the main one.
    """
    result: T | None = None
    failure: Exception | None = None
    sentence: str | None = None
    try:
        result = function()
    except (ValueError, FileNotFoundError) as error:
        failure, sentence = error, str(error)
    except Exception as error:
        failure, sentence = error, f"{type(error).__name__}: {error}"
    is_of_system = failure is not None and not is_mistake(failure)
    everyone = gathered((result, sentence, socket.gethostname(), is_of_system), group)
    if any(text is not None for _, text, _, _ in everyone):
        kind = SystemRankError if any(one for *_, one in everyone) else RankError
        raise kind(_told([(text, host) for _, text, host, _ in everyone])) from failure
    return [value for value, *_ in everyone]  # type: ignore[misc]


def _told(sentences: list[tuple[str | None, str]]) -> str:
    """The sentences of (sentence, host) by rank, each once; with their hosts when hosts differ in it."""
    texts = dict.fromkeys(text for text, _ in sentences if text is not None)
    if {text for text, _ in sentences} == set(texts) and len(texts) == 1:
        return next(iter(texts))
    if len({host for _, host in sentences}) == 1:
        return "; ".join(texts)
    return "; ".join(f"on {host}: {text}" for text, host in dict.fromkeys(sentences) if text)


def on_main(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Process 0's result on every process; its failure raises RankError on all. Collective."""
    return together(lambda: function() if distributed.is_main() else None, group)[0]  # type: ignore[return-value]


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every process's `value`, of what pickles, by rank. Collective."""
    everyone = [value] * distributed.world_size()
    if distributed.world_size() > 1:
        dist.all_gather_object(everyone, value, group)
    return everyone


def check_alike(what: str, value: dict[str, Any], advice: str) -> None:
    """Raises RankError on all processes, with what differs and where, unless what two of them both have in
    `value` is the same. Collective."""
    everyone = gathered((json.dumps(value, sort_keys=True, default=str), socket.gethostname()))
    ranks = [(json.loads(text), host) for text, host in everyone]
    first, first_host = ranks[0]
    for rank, (other, host) in enumerate(ranks):
        names = [name for name in first if name in other and first[name] != other[name]]
        if names:
            shown = ", ".join(f"{name} {first[name]} and {other[name]}" for name in names[:3])
            raise RankError(
                f"{what} differ between process 0 on {first_host} and process {rank} on {host}: "
                f"{shown}; {advice}"
            )


def make_shared(folder: Path, key: str) -> None:
    """Makes `folder`, the value of `key`, and waits until all processes see in it what process 0 writes.

    Collective. Raises RankError on all when one does not within SHOWN_WITHIN_S or the folder cannot be made,
    which with one process is an OSError.
    """
    if distributed.world_size() == 1:
        make_folder(folder, f"{key} {folder}", exist_ok=True)
        return

    def write() -> tuple[str, str]:
        make_folder(folder, f"{key} {folder}", exist_ok=True)
        (folder / name).touch()
        return name, socket.gethostname()

    name = f".seen_by_all_{uuid.uuid4().hex}"
    name, host = on_main(write)
    try:
        together(lambda: _wait_for(folder / name, key, host))
    finally:
        if distributed.is_main():
            (folder / name).unlink()


def _wait_for(path: Path, key: str, host: str) -> None:
    deadline = time.monotonic() + SHOWN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{key} {path.parent} is not the folder of that name on {host}, where process 0 writes; "
                "give one on a file system that all hosts share"
            )
        time.sleep(0.1)
