"""Ids and places that no prepared folder has: counted and shown, never row 0."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_rec import distributed
from hstu_rec.config import RunConfig, load
from hstu_rec.data.check import check
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.mapped import arrow_writer, open_arrow
from hstu_rec.item_table import check_ids
from hstu_rec.learner import Learner
from tests.datasets import write_dataset
from tests.folders import portable

few = settings(max_examples=10)


@pytest.mark.fault("R15")
@given(
    st.integers(1, 2**40),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 12), max_size=30),
)
def test_ids_outside_the_table_are_counted_and_shown(num_items: int, ids: list[int]) -> None:
    bad = [one for one in ids if not 0 <= one < num_items]
    if not bad:
        check_ids(torch.tensor(ids, dtype=torch.int64), num_items)
        return
    with pytest.raises(ValueError) as caught:
        check_ids(torch.tensor(ids, dtype=torch.int64), num_items)
    assert f"{len(bad)} item ids are outside the catalogue 0..{num_items - 1}" in str(caught.value)
    assert f"for example {bad[:5]};" in str(caught.value)


@pytest.mark.fault("R15")
@few
@given(
    st.lists(
        st.lists(st.integers(-2, 4) | st.integers(2**31 - 2, 2**33), min_size=3, max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_indices_of_another_engine_are_counted_and_shown(users: list[list[int]]) -> None:
    bad = [user for user in users if not all(0 <= one <= 2 for one in user)]
    rows = {
        "user_id": list(range(len(users))),
        "item_indices": users,
        "timestamps": [list(range(len(user))) for user in users],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = portable(Path(folder) / "d", sequences=rows)
        if not bad:
            assert check(path)["events"] == sum(map(len, users))
            return
        with pytest.raises(ValueError) as caught:
            check(path)
    shown = [str(next(one for one in user if not 0 <= one <= 2)) for user in bad[:5]]
    rows_of = "1 row where" if len(bad) == 1 else f"{len(bad)} rows where"
    assert f"{rows_of} an item index is outside 0..2, first" in str(caught.value)
    assert f": {', '.join(shown)}; use the indices of items.parquet" in str(caught.value)


def changed(path: Path, name: str, column: str, rows: list[int], value: int) -> None:
    """Writes `value` into a mapped file, as one does by hand."""
    content = open_arrow(path / name)
    columns = {one: content.column(one).to_pylist() for one in content.column_names}
    for row in rows:
        columns[column][row] = value
    (path / name).unlink()
    with arrow_writer(path / name, content.schema) as writer:
        writer.write_table(pa.table(columns, schema=content.schema))


USERS = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2], [1, 1, 2, 3, 4]]


@pytest.mark.fault("R15")
@pytest.mark.parametrize("value", [-1, 6, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("row", [0, 4, 5])  # trained on, validation target, test target
def test_a_mapped_id_changed_by_hand_stops_whatever_reads_it(
    tmp_path: Path, row: int, value: int
) -> None:
    write_dataset(tmp_path / "d", USERS)
    changed(tmp_path / "d", "events.arrow", "item", [row], value)
    data = Dataset(tmp_path / "d")
    users = np.arange(3)
    with pytest.raises(ValueError) as caught:
        data.gather(users, np.zeros_like(users), data.lengths)
    assert (
        f"events.arrow has been changed: 1 of 15 values of item are outside 0..5, such as [{value}]"
        in str(caught.value)
    )
    assert f"python apps/prepare.py check={tmp_path / 'd'}" in str(caught.value)
    data.gather(users[1:], np.zeros_like(users[1:]), data.lengths[1:])  # the others are sound


@pytest.mark.fault("R15")
@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("start", -5), ("start", 2**40), ("length", -1), ("length", 10**6)),
        *(("train_end", -3), ("train_end", 10**6), ("valid_end", 10**6), ("valid_end", -1)),
    ],
)
def test_users_changed_by_hand_are_refused_when_opened(
    tmp_path: Path, column: str, value: int
) -> None:
    write_dataset(tmp_path / "d", USERS)
    for user in range(3):
        shutil.copytree(tmp_path / "d", tmp_path / f"{user}")
        changed(tmp_path / f"{user}", "users.arrow", column, [user], value)
        with pytest.raises(
            ValueError, match=r"users\.arrow has been changed: \d rows are wrong, such as \["
        ):
            Dataset(tmp_path / f"{user}")


@pytest.mark.fault("R15")
def test_counts_changed_by_hand_draw_no_negative_outside_the_catalogue(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", USERS)
    changed(tmp_path / "d", "counts.arrow", "by_train_count", [4, 5], 99)
    settings = [f"data.path={tmp_path / 'd'}", "encoder.dim=8", "loss.negatives=frequency"]
    with distributed.process_group("cpu"):
        learner = Learner(load(RunConfig, settings), Dataset(tmp_path / "d"), torch.device("cpu"))
        with pytest.raises(
            ValueError, match=r"1 item ids are outside the catalogue 0\.\.5.*\[99\]"
        ):
            learner.step(0, 0, 0)
