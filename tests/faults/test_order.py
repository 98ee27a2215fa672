"""The same folder and the same batches, whatever the order, the threads and the processes."""

import hashlib
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_rec import distributed
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import MAPPED, Dataset
from hstu_rec.data.prepare import PrepareConfig, prepare, report
from hstu_rec.data.stream import DataConfig, TrainStream
from hstu_rec.learner import Learner
from hstu_rec.pipeline import Place
from tests.datasets import write_dataset
from tests.event_files import (
    START,
    as_csv,
    parquet,
    prepared,
    table,
    text,
)
from tests.faults.tries import Tries

few = settings(max_examples=10)


def folder_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for name in ("items.parquet", *MAPPED):
        digest.update((path / name).read_bytes())
    return digest.hexdigest()


@pytest.mark.fault("R17")
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_rows_and_files_in_any_order_give_the_same_folder_byte_for_byte(
    tmp_path: Path, kind: str, tries: Tries
) -> None:
    random = np.random.default_rng(17)
    rows = [
        (f"u{user}", f"é{item}", START + int(place), 0)
        for place, (user, item) in enumerate(random.integers(0, 40, (600, 2)))
    ]
    hashes = []
    for number in range(5):
        source, output = tmp_path / f"in{number}", tmp_path / f"out{number}"
        source.mkdir()
        order = random.permutation(len(rows)) if number else np.arange(len(rows))
        for place, part in enumerate(np.array_split(order, number + 1)):
            own = [rows[row] for row in part]
            name = f"{random.integers(10**6):06d}-{place}.{kind}"
            parquet(source, table(own), name) if kind == "parquet" else text(
                source, as_csv(own), name
            )
        prepare(PrepareConfig(), source, output)
        hashes.append(folder_hash(output))
        tries.count(hashes[-1] == hashes[0])


@pytest.mark.fault("R18")
@few
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("dbca"), st.integers(0, 3)), max_size=40),
    st.integers(1, 3),
)
def test_equal_times_keep_the_order_of_rows_and_files_never_of_ids(
    rows: list[tuple[int, str, int]], num_files: int
) -> None:
    rows = [*rows, (0, "d", 0), (0, "c", 0), (0, "a", 0)]
    wanted: dict[int, list[tuple[int, str]]] = {}
    for user, item, time in rows:
        wanted.setdefault(user, []).append((time, item))
    for own in wanted.values():
        own.sort(key=lambda event: event[0])  # stable
    num_tied = sum(
        [time for time, _ in own].count(event[0]) > 1 for own in wanted.values() for event in own
    )
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "in"
        source.mkdir()
        for place, part in enumerate(np.array_split(np.arange(len(rows)), num_files)):
            own_rows = [(u, i, START + t, 0) for u, i, t in (rows[row] for row in part)]
            text(source, as_csv(own_rows), f"{place}.csv")
        stats, found = prepared(source, Path(name), min_user_events=1)
    assert found == {user: [item for _, item in own] for user, own in wanted.items()}
    assert stats["tie_share"] == num_tied / len(rows)
    assert f"ties     {num_tied / len(rows):.1%} of events" in report(stats)


def step_hash(made: Any) -> str:
    """Of all that a step is given."""
    batch, drawn = made.batch, made.negatives
    tensors = [batch.item_ids, batch.target_ids, batch.timestamps, batch.offsets, drawn.ids]
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in tensors)).hexdigest()


@pytest.mark.fault("R25")
def test_inputs_made_ahead_in_a_thread_or_not_at_all_are_the_same(
    tmp_path: Path, tries: Tries
) -> None:
    random = np.random.default_rng(25)
    users = [random.integers(0, 30, length).tolist() for length in random.integers(4, 12, 40)]
    write_dataset(tmp_path / "d", users, num_items=30)
    options = [f"data.path={tmp_path / 'd'}", "encoder.dim=8", "data.batch_users=9"]
    places = [Place(epoch, step, 5 * epoch + step) for epoch in range(2) for step in range(5)]
    found: dict[str, list[str]] = {}
    with distributed.process_group("cpu"):
        for way in ("not at all", "ahead", "in a thread"):
            data = Dataset(tmp_path / "d")
            inputs = Learner(load(RunConfig, options), data, torch.device("cpu")).inputs
            if way == "in a thread":
                inputs._thread = ThreadPoolExecutor(1)
            hashes = []
            for place in places:
                made, _ = inputs.take(place)
                hashes.append(step_hash(made))
                if way != "not at all":
                    inputs.send_ahead(place.later(1))
                    inputs.make_ahead(place.later(2))
            found[way] = hashes
    assert len(set(found["not at all"])) == len(places)
    for hashes in found.values():
        for one, wanted in zip(hashes, found["not at all"], strict=True):
            tries.count(one == wanted)


@pytest.mark.fault("R25")
@pytest.mark.parametrize("alpha", [0.0, 1.6])
def test_the_global_batch_is_the_same_for_any_number_of_processes(
    tmp_path: Path, alpha: float, monkeypatch: pytest.MonkeyPatch, tries: Tries
) -> None:
    random = np.random.default_rng(26)
    users = [random.integers(0, 99, length).tolist() for length in random.integers(4, 60, 50)]
    data = write_dataset(tmp_path / "d", users, num_items=99)
    config = DataConfig(path=str(tmp_path), batch_users=13, length_alpha=alpha)

    def histories(epoch: int, step: int, ranks: int) -> list[tuple[bytes, bytes]]:
        parts = []
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)
        for rank in range(ranks):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            batch = TrainStream(data, config, 40, seed=3).batch(epoch, step)
            ends = batch.offsets.tolist()
            for begin, end in itertools.pairwise(ends):
                own = batch.item_ids[begin:end], batch.target_ids[begin:end]
                parts.append((own[0].numpy().tobytes(), own[1].numpy().tobytes()))
        return sorted(parts)

    for epoch, step in ((0, 0), (0, 3), (1, 1)):
        wanted = histories(epoch, step, 1)
        for ranks in (2, 3, 4, 7):
            tries.count(histories(epoch, step, ranks) == wanted)
