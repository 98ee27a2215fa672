"""What a history holds, against plain loops."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_rec.data.batch import SequenceBatch
from hstu_rec.seen import seen_candidates, seen_targets

ITEM = st.integers(0, 6)


def make_batch(users):
    """Users' events; the last of each is a target only."""
    lengths = [len(events) - 1 for events in users]
    items = [item for events in users for item in events[:-1]]
    targets = [item for events in users for item in events[1:]]
    times = torch.zeros(len(items), dtype=torch.int64)
    return SequenceBatch(
        item_ids=torch.tensor(items, dtype=torch.int64),
        timestamps=times,
        next_timestamps=times,
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        target_ids=torch.tensor(targets, dtype=torch.int64),
        num_targets_global=len(targets),
    )


@settings(max_examples=200, deadline=None)
@given(
    users=st.lists(st.lists(ITEM, min_size=2, max_size=9), max_size=5),
    ids=st.sets(ITEM).map(sorted),
)
def test_seen_items_equal_those_of_plain_loops(users, ids):
    batch = make_batch(users)
    histories = [events[: n + 1] for events in users for n in range(len(events) - 1)]
    pairs = [
        (p, r) for p, seen in enumerate(histories) for r, item in enumerate(ids) if item in seen
    ]
    found = seen_candidates(batch, torch.tensor(ids, dtype=torch.int64)).T.tolist()
    assert sorted((p, place) for first, end, place in found for p in range(first, end)) == pairs
    assert [place for *_, place in found] == sorted(place for *_, place in found)
    targets = batch.target_ids.tolist()
    expected = [target in seen for target, seen in zip(targets, histories, strict=True)]
    assert seen_targets(batch).tolist() == expected
