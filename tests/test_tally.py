"""Tally: counts and ties of events in batches, against loops over the users."""

from collections import Counter

import numpy as np
import pytest

from hstu_rec.data.tally import Tally


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 1000])
def test_batches_of_any_size_count_what_a_loop_over_users_counts(rows: int) -> None:
    random = np.random.default_rng(rows)
    lengths = random.integers(1, 9, 60)
    train_ends = random.integers(0, lengths + 1)
    num_events = int(lengths.sum())
    items = random.integers(0, 12, num_events).astype(np.int32)
    times = np.concatenate([np.sort(random.integers(0, 6, length)) for length in lengths])
    tally = Tally(15, lengths, train_ends)
    firsts = [
        tally.add(*(values[at : at + rows] for values in (items, times // 2, times)))
        for at in range(0, num_events, rows)
    ]
    counts, train_counts, tied, tied_last_two, duplicates = Counter(), Counter(), 0, 0, 0
    ends = np.cumsum(lengths)
    for end, length, train_end in zip(ends, lengths, train_ends, strict=True):
        own, when = items[end - length : end].tolist(), times[end - length : end].tolist()
        counts.update(own)
        train_counts.update(own[:train_end])
        tied += sum(n for n in Counter(when).values() if n >= 2)
        tied_last_two += when[-2:-1] == when[-1:]
        duplicates += length - len(
            {(item, time // 2) for item, time in zip(own, when, strict=True)}
        )
    assert np.flatnonzero(np.concatenate(firsts)).tolist() == (ends - lengths).tolist()
    assert tally.counts.tolist() == [counts[item] for item in range(15)]
    assert tally.train_counts.tolist() == [train_counts[item] for item in range(15)]
    assert (tally.num_tied, tally.num_tied_last_two) == (tied, tied_last_two)
    assert tally.num_duplicates == duplicates > 0
    assert (tally.first_timestamp, tally.last_timestamp) == (times.min() // 2, times.max() // 2)
    assert tally.num_events == num_events


def test_an_empty_batch_changes_nothing() -> None:
    tally = Tally(2, np.array([2]), np.array([1]))
    for part in (slice(0, 0), slice(0, 1), slice(1, 1), slice(1, 2)):
        tally.add(*(np.array(values)[part] for values in ([1, 0], [5, 5], [5, 5])))
    assert tally.counts.tolist() == [1, 1] and tally.train_counts.tolist() == [0, 1]
    assert (tally.num_tied, tally.num_tied_last_two, tally.num_events) == (2, 1, 2)
