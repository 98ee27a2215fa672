"""Own ids are found, and events become histories, as a dict and a sort would do it."""

import numpy as np
import pyarrow as pa
import pytest

from hstu_rec.data.histories import read_histories
from hstu_rec.data.own_ids import ItemIndex, typed_ids


@pytest.mark.parametrize(
    "ids",
    [
        [5, -3, 2**62, 0, 7],
        ["b", "a\0", "ä", "a", "aa", "日本", "A"],
        ["only"],
        [],
    ],
)
def test_rows_are_found_by_own_id(ids):
    index = ItemIndex(typed_ids(pa.array(ids, None if ids else pa.int64())))
    of = {own: row for row, own in enumerate(ids)}
    asked = [*ids, *ids[::-1]]
    asked += (
        [1, -4, 2**63 - 1] if not ids or isinstance(ids[0], int) else ["", "b ", "z", "aaa", "ö"]
    )
    found = index.rows(typed_ids(pa.array(asked)))
    assert found.tolist() == [of.get(own, -1) for own in asked]


def test_histories_are_those_of_a_plain_loop():
    random = np.random.default_rng(2)
    index = ItemIndex(pa.array([*range(100, 150)]))
    users = random.permutation(np.repeat(np.arange(20), random.integers(1, 9, 20)))
    items, times = random.integers(90, 150, len(users)), random.integers(0, 5, len(users))
    expected: dict[int, list[tuple[int, int]]] = {user: [] for user in users.tolist()}
    for user, item, time in zip(users.tolist(), items.tolist(), times.tolist(), strict=True):
        if item >= 100:
            expected[user].append((time, item - 100))
    expected = {user: sorted(one, key=lambda e: e[0]) for user, one in expected.items() if one}
    events = {"user_id": users, "item_id": items.astype(np.int32), "timestamp": times}
    found = read_histories(events, index, "ignore")
    assert found.user_ids.to_pylist() == [*expected]
    for place, history in enumerate(expected.values()):
        part = slice(*found.offsets[place : place + 2])
        assert [*zip(found.times[part], found.items[part], strict=True)] == history
