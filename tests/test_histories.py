"""Own ids are found, and events become histories, as a dict and a sort would do it."""

from datetime import UTC, date, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pytest

from hstu_rec.data.histories import read_histories
from hstu_rec.data.own_ids import IdIndex, typed_ids


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
    index = IdIndex(typed_ids(pa.array(ids, None if ids else pa.int64())))
    of = {own: row for row, own in enumerate(ids)}
    asked = [*ids, *ids[::-1]]
    asked += (
        [1, -4, 2**63 - 1] if not ids or isinstance(ids[0], int) else ["", "b ", "z", "aaa", "ö"]
    )
    found = index.rows(typed_ids(pa.array(asked)))
    assert found.tolist() == [of.get(own, -1) for own in asked]


def test_histories_are_those_of_a_plain_loop():
    random = np.random.default_rng(2)
    index = IdIndex(pa.array([*range(100, 150)]))
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


MOMENT, NEXT_DAY = 1_700_000_000, 1_700_006_400  # 2023-11-14 22:13:20 and 2023-11-15 00:00:00
CET = timezone(timedelta(hours=1))
AT = datetime(2023, 11, 14, 22, 13, 20)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([MOMENT, 5], [MOMENT, 5]),
        ([MOMENT * 1000 + 999], [MOMENT]),
        ([MOMENT * 10**6 + 1], [MOMENT]),
        (pa.array([MOMENT * 10**9 + 1], pa.uint64()), [MOMENT]),
        ([MOMENT + 0.5], [MOMENT]),
        ([AT, AT.replace(microsecond=7)], [MOMENT, MOMENT]),
        (pa.array([AT], pa.timestamp("ns")), [MOMENT]),
        ([AT.replace(tzinfo=UTC)], [MOMENT]),
        ([AT.replace(hour=23, tzinfo=CET)], [MOMENT]),
        ([date(2023, 11, 15)], [NEXT_DAY]),
        (["2023-11-15"], [NEXT_DAY]),
        (["2023-11-14 22:13:20", "2023-11-15"], [MOMENT, NEXT_DAY]),
        (["2023-11-14T23:13:20+01:00"], [MOMENT]),
        (["2023-11-14T22:13:20Z"], [MOMENT]),
    ],
)
def test_times_of_every_kind_become_seconds(times, expected):
    index = IdIndex(typed_ids(pa.array(["x"])))
    events = {
        "user_id": [*range(len(times))],
        "item_id": ["x"] * len(times),
        "timestamp": times,
    }
    assert read_histories(events, index).times.tolist() == expected


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ([MOMENT, MOMENT * 1000], "of several units, from 1700000000 to 1700000000000"),
        ([MOMENT, float("nan")], "1 timestamps are NaN or infinite"),
        ([MOMENT, None], "must be without nulls; got int64, 1 nulls"),
        ([-1], "1 timestamps are outside 0"),
        ([date(1969, 12, 31)], "1 timestamps are outside 0"),
        (["14.11.2023"], "got string, such as '14.11.2023'"),
        ([True], "ISO text; got bool"),
        ([2**63], "the table cannot be read: .*too large"),
    ],
)
def test_times_that_are_none_are_told(times, told):
    index = IdIndex(typed_ids(pa.array(["x"])))
    with pytest.raises(ValueError, match=told):
        read_histories(
            {"user_id": [1] * len(times), "item_id": ["x"] * len(times), "timestamp": times}, index
        )
