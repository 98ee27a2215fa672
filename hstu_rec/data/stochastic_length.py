"""Stochastic length: long histories are trained on as few of their events (arXiv 2402.17152, section 3.3).

A history of n events, of at most N, with n > N ** (alpha / 2) is cut to N ** (alpha / 2) of them, but for a
share N ** alpha / n ** 2 of the times, when it is whole: so that attention costs O(N ** alpha) a history. An
event that is left out is no input; it stays the target of the event before.
"""

from typing import Literal

import numpy as np

from hstu_rec.data.hashes import mixed, uniform

Choice = Literal["uniform", "newest"]


def short_length(longest: int, alpha: float) -> int:
    """Events that histories are cut to."""
    return int(longest ** (alpha / 2))


def whole_share(lengths: np.ndarray, longest: int, alpha: float) -> np.ndarray:
    """float64 [B]: how likely histories of `lengths` are whole."""
    share = longest**alpha / np.maximum(lengths, 1).astype(np.float64) ** 2
    return np.where(lengths > short_length(longest, alpha), np.minimum(share, 1), 1.0)


def cut_lengths(
    lengths: np.ndarray, longest: int, alpha: float, generator: np.random.Generator
) -> np.ndarray:
    """int64 [B]: events of histories of `lengths` that are kept."""
    is_whole = generator.random(len(lengths)) < whole_share(lengths, longest, alpha)
    return np.where(is_whole, lengths, np.minimum(lengths, short_length(longest, alpha)))


def kept_events(
    lengths: np.ndarray, kept: np.ndarray, users: np.ndarray, key: int, choice: Choice
) -> np.ndarray:
    """bool [sum of lengths]: which events of each user's history are kept, `kept` [B] of them.

    A function of (key, user, place), so that every rank draws for its own users alone. uniform: any as
    likely as any. newest: in proportion to its place from the oldest, 1 .. n, drawn without putting back
    (Efraimidis and Spirakis, 2006).
    """
    offsets = np.append(0, np.cumsum(lengths))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(offsets[-1]) - offsets[owner]
    streams = mixed(np.array([key], dtype=np.uint64), users)
    waits = -np.log(uniform(mixed(streams[owner], place)))
    if choice == "newest":
        waits /= place + 1
    order = np.lexsort((waits, owner))
    is_kept = np.empty(len(owner), dtype=bool)
    is_kept[order] = place < kept[owner]  # the order is by owner, as the places are
    return is_kept
