"""What one pass over all events, users one after another, counts.

Memory: some numbers an item, and the batch that is looked at.
"""

import numpy as np


class Tally:
    """Events by item, ties, duplicates and the range of times of the batches added so far.

    lengths, train_ends: int64 [users], in the order of their events; no length is 0.
    """

    def __init__(self, num_items: int, lengths: np.ndarray, train_ends: np.ndarray) -> None:
        self.counts = np.zeros(num_items, dtype=np.int64)
        self.train_counts = np.zeros(num_items, dtype=np.int64)
        self.num_events = 0
        self.num_tied = 0
        """Events at the time of another event of their user."""
        self.num_tied_last_two = 0
        """Users whose last two events have one time."""
        self.num_duplicates = 0
        """Events of the user, item and second of an earlier one."""
        self.first_timestamp = np.iinfo(np.int64).max
        self.last_timestamp = 0
        self._ends = np.cumsum(lengths)
        self._train_lengths = lengths - train_ends  # events after training, from a user's end
        self._last_time: np.ndarray | None = None
        self._is_last_tied = False
        self._last_timestamp = -1
        self._last_items = np.zeros(0, dtype=np.int64)  # of the last user's last second, distinct

    def add(self, items: np.ndarray, timestamps: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Counts the next events, and tells which of them begin a user (bool [events]).

        timestamps: s; times: the same in the precision that decides what a tie is.
        """
        begin, end = self.num_events, self.num_events + len(items)
        if begin == end:
            return np.zeros(0, dtype=bool)
        # Users with events in [begin, end), and where theirs end within it.
        low, high = np.searchsorted(self._ends, (begin, end - 1), side="right")
        users = slice(int(low), int(high) + 1)
        ends = np.minimum(self._ends[users], end)
        num_here = np.diff(ends, prepend=begin)
        train_ends = self._ends[users] - self._train_lengths[users]
        is_train = np.arange(begin, end) < np.repeat(train_ends, num_here)
        # Not bincount, which would be of the catalogue's length each time.
        np.add.at(self.counts, items, 1)
        np.add.at(self.train_counts, items[is_train], 1)
        is_first = np.zeros(len(items), dtype=bool)
        is_first[ends[:-1] - begin] = True
        is_first[0] = begin == 0 or begin == self._ends[max(low - 1, 0)]
        self._add_ties(times, is_first, self._ends[users] - 1 - begin)
        self._add_duplicates(items, timestamps, is_first)
        self.first_timestamp = min(self.first_timestamp, int(timestamps.min()))
        self.last_timestamp = max(self.last_timestamp, int(timestamps.max()))
        self.num_events = end
        return is_first

    def _add_ties(self, times: np.ndarray, is_first: np.ndarray, last_rows: np.ndarray) -> None:
        is_tied = np.zeros(len(times) + 1, dtype=bool)  # with the event before; one from before
        is_tied[0] = self._is_last_tied
        is_tied[2:] = times[1:] == times[:-1]
        is_tied[1] = self._last_time is not None and times[0] == self._last_time
        is_tied[1:] &= ~is_first
        # Of n events of one time n - 1 are tied with the one before; the first of them begins a run.
        self.num_tied += int(is_tied[1:].sum() + (is_tied[1:] & ~is_tied[:-1]).sum())
        self.num_tied_last_two += int(is_tied[1:][last_rows[last_rows < len(times)]].sum())
        self._last_time, self._is_last_tied = times[-1], bool(is_tied[-1])

    def _add_duplicates(
        self, items: np.ndarray, timestamps: np.ndarray, is_first: np.ndarray
    ) -> None:
        is_new = is_first.copy()  # begins a user's second
        is_new[1:] |= timestamps[1:] != timestamps[:-1]
        is_new[0] |= timestamps[0] != self._last_timestamp
        # Only seconds of two events or more have any, and most often few events are in one.
        is_shared = ~is_new
        is_shared[:-1] |= ~is_new[1:]
        keys = np.cumsum(is_new)[is_shared] * len(self.counts) + items[is_shared]
        if not is_new[0]:  # second 0 is the one that the batch before ended in
            keys = np.concatenate([self._last_items, keys])
        keys.sort()
        self.num_duplicates += int((keys[1:] == keys[:-1]).sum())
        self._last_timestamp = int(timestamps[-1])
        if is_new.any():
            self._last_items = np.unique(items[np.flatnonzero(is_new)[-1] :]).astype(np.int64)
        else:
            self._last_items = np.union1d(self._last_items, items)
