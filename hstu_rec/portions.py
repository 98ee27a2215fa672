"""Work in portions, which are halved when memory is short: the same result, more slowly.

chunks of a rank's own rows    each rank halves for itself: nothing in the work waits for another rank
batches of queries             all ranks halve together: parts of the work are collective, and those that
                               are not tell by `agreed` when one rank is short
"""

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from hstu_rec import distributed

T = TypeVar("T")

# How torch's allocators and the libraries under it say it, where they have no class of error for it.
SENTENCES = (
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "out of memory",
    "ALLOC_FAILED",
)


class SharedShortage(MemoryError):
    """Memory was short on one rank or more; raised on all."""


class Portion:
    """How many of something are taken at a time: `size`, at first what the setting `key` says.

    is_shared: all ranks take as many, and halve when all of them raise `SharedShortage`.
    """

    def __init__(self, key: str, size: int, least: int = 1, is_shared: bool = False) -> None:
        self.size = self._given = self._told = size
        self._key, self._least = key, min(least, size)
        self._is_shared = is_shared and distributed.world_size() > 1

    def over(self, count: int, work: Callable[[slice], T]) -> Iterator[T]:
        """`work` of slices of 0 .. count, in order; of what does not fit, again in halves.

        Raises MemoryError when the least portion does not fit either.
        """
        begin = 0
        while begin < count:
            part = slice(begin, min(begin + self.size, count))
            done, reason = _tried(lambda part=part: work(part), self._is_shared)
            if done:
                self._tell()
                begin = part.stop
                yield done[0]
            elif self.size > self._least:
                self.size = max(self.size // 2, self._least)
            else:
                # It was not for this portion's size, which therefore need not stay small.
                least, self.size = self.size, self._given
                raise MemoryError(
                    f"memory is too short, also for {least} at a time of {self._key}={self._given}: {reason}"
                )

    def _tell(self) -> None:
        if self.size == self._told:
            return
        self._told = self.size
        if not self._is_shared or distributed.is_main():
            warnings.warn(
                f"{self._key}={self._given} does not fit into memory; goes on with {self.size} at a time, "
                f"to the same result; give {self._key}={self.size}",
                stacklevel=2,
            )


def agreed(work: Callable[[], T]) -> T:
    """The result of `work`, which waits for no other rank. Collective.

    Raises SharedShortage on all ranks when memory was short on one of them.
    """
    done, reason = _tried(work)
    num_short = int(distributed.all_reduce_sum(torch.tensor(int(not done))))
    if num_short:
        where = f"on {num_short} of {distributed.world_size()} ranks"
        raise SharedShortage(f"{where}; {reason}" if reason else where)
    return done[0]


def _tried(work: Callable[[], T], is_shared: bool = False) -> tuple[list[T], str]:
    """([result], ""), or ([], why) when memory was short; where shared, on all ranks."""
    try:
        return [work()], ""
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, SharedShortage) if is_shared else is_out_of_memory(error)):
            raise
        reason = str(error).strip().partition("\n")[0]
    # The error is gone by now, and with it the tensors of the frames that it came through.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return [], reason or "out of memory"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on CUDA or in the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in SENTENCES)
