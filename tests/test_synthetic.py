"""Made catalogues: their laws are those that are told, and any window of any history is made alone."""

import itertools
import multiprocessing
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps import make_events
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import FILES, MAX_ITEMS, Dataset
from hstu_rec.data.demo import prepare_demo
from hstu_rec.data.hashes import mixed, uniform
from hstu_rec.data.prepare import PrepareConfig, prepare
from hstu_rec.data.stream import DataConfig, open_dataset
from hstu_rec.data.synthetic import (
    SyntheticConfig,
    SyntheticDataset,
    event_tables,
    names,
    write_events,
)
from hstu_rec.data.zipf_catalogue import ZipfCatalogue
from hstu_rec.trainer import train

SIZES = [1, 2, 3, 64, 97, 600]


def made(**settings: Any) -> SyntheticDataset:
    return SyntheticDataset(SyntheticConfig(**settings))


def whole(data: SyntheticDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    users = np.arange(data.num_users)
    return data.gather(users, np.zeros_like(users), data.lengths)


def pairs(data: SyntheticDataset) -> tuple[np.ndarray, np.ndarray]:
    """(item, next item) of the same user."""
    items, _, offsets = whole(data)
    same = np.ones(len(items), dtype=bool)
    same[offsets[:-1]] = False
    return np.roll(items, 1)[same], items[same]


def mass(low: float, high: float, exponent: float) -> float:
    """The integral of x ** -exponent, by Gauss and Legendre."""
    points, weights = np.polynomial.legendre.leggauss(40)
    edges = np.geomspace(low, high, 50)
    half = np.diff(edges)[:, None] / 2
    x = edges[:-1, None] + half * (1 + points)
    return float((half * weights * x**-exponent).sum())


def test_random_bits_are_those_of_splitmix64() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mixed(np.zeros(1, dtype=np.uint64), np.arange(3)).tolist() == published
    ends = uniform(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert 0 < ends[0] < 1e-15 and 1 - 1e-15 < ends[1] < 1


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.0 + 1e-9, 2.5])
def test_popularity_is_the_law_that_is_told_and_draws_follow_it(exponent: float) -> None:
    catalogue, ranks = ZipfCatalogue(30, exponent, seed=7), np.arange(30)
    total = mass(1, 31, exponent)
    expected = [mass(r + 1, r + 2, exponent) / total for r in ranks]
    np.testing.assert_allclose(catalogue.popularity(ranks), expected, rtol=1e-6)
    drawn = catalogue.draw(np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64))
    counted = np.bincount(drawn, minlength=30) / len(drawn)
    deviations = np.sqrt(np.array(expected) / len(drawn))
    assert (np.abs(counted - expected) < 5 * deviations + 1e-6).all()


@pytest.mark.parametrize("num_items", SIZES)
def test_items_are_a_permutation_of_ranks_and_the_rule_visits_them_all(num_items: int) -> None:
    catalogue, ranks = ZipfCatalogue(num_items, 1.0, seed=7), np.arange(num_items)
    items = catalogue.items(ranks)
    assert sorted(items) == ranks.tolist()
    assert catalogue.ranks(items).tolist() == ranks.tolist()
    visited = catalogue.successors(np.zeros(num_items, dtype=np.int64), ranks)
    assert sorted(visited) == ranks.tolist()
    assert catalogue.successors(visited, -ranks).tolist() == [0] * num_items


def test_the_largest_catalogue_overflows_nowhere() -> None:
    catalogue = ZipfCatalogue(MAX_ITEMS, 1.0, seed=7)
    ranks = np.array([0, 1, MAX_ITEMS // 2, MAX_ITEMS - 1])
    stride, step, offset = catalogue._stride, catalogue._step, catalogue._offset
    expected = [(rank * stride + offset) % MAX_ITEMS for rank in ranks.tolist()]
    items = catalogue.items(ranks)
    assert items.tolist() == expected
    assert catalogue.ranks(items).tolist() == ranks.tolist()
    far = 2**24
    assert catalogue.successors(items, far).tolist() == [
        (item + far * step) % MAX_ITEMS for item in expected
    ]
    top = np.array([0, 2**64 - 1], dtype=np.uint64)
    for exponent in (0.0, 1.0, 1.2, 40.0):
        law = ZipfCatalogue(MAX_ITEMS, exponent, seed=7)
        assert law.draw(top).min() >= 0 and law.draw(top).max() < MAX_ITEMS


@pytest.mark.parametrize("rule_share", [0.0, 0.3, 0.8, 1.0])
def test_the_rule_is_followed_as_often_as_told(rule_share: float) -> None:
    data = made(num_users=3000, num_items=997, rule_share=rule_share, zipf_exponent=0.0)
    before, after = pairs(data)
    is_followed = data.catalogue.successors(before) == after
    expected = rule_share + (1 - rule_share) / 997
    assert is_followed.mean() == pytest.approx(expected, abs=0.01)
    assert is_followed.all() or rule_share < 1
    drawn = data.catalogue.ranks(after[~is_followed])
    assert rule_share == 1 or drawn.mean() == pytest.approx(498, abs=20)  # any item alike


@pytest.mark.parametrize("rule_share", [0.0, 0.8, 0.99, 1.0])
@given(seed=st.integers(0, 2**32))
def test_windows_of_histories_are_parts_of_the_whole(rule_share: float, seed: int) -> None:
    data = made(num_users=40, num_items=101, longest=120, rule_share=rule_share, seed=seed)
    items, times, offsets = whole(data)
    random = np.random.default_rng(seed)
    users = random.integers(0, 40, 25)  # in any order, some twice
    begins = random.integers(0, data.lengths[users] + 1)
    ends = random.integers(begins, data.lengths[users] + 1)  # some are empty
    some_items, some_times, some_offsets = data.gather(users, begins, ends)
    rows = [
        np.arange(offsets[u] + b, offsets[u] + e)
        for u, b, e in zip(users, begins, ends, strict=True)
    ]
    assert np.diff(some_offsets).tolist() == (ends - begins).tolist()
    assert some_items.tolist() == items[np.concatenate(rows)].tolist()
    assert some_times.tolist() == times[np.concatenate(rows)].tolist()
    assert {one.dtype for one in (some_items, some_times, some_offsets)} == {np.dtype(np.int64)}


def test_the_same_seed_makes_the_same_events_and_another_others() -> None:
    first, again, other = (whole(made(seed=seed)) for seed in (1, 1, 2))
    for one, same in zip(first, again, strict=True):
        assert one.tolist() == same.tolist()
    assert first[0].tolist() != other[0].tolist() and first[1].tolist() != other[1].tolist()


def test_users_are_independent_and_times_rise_within_each() -> None:
    data = made(num_users=2000, num_items=10_000, longest=60, zipf_exponent=0.0)
    items, times, offsets = whole(data)
    rises = np.delete(np.diff(times), offsets[1:-1] - 1)
    assert rises.min() > 0 and np.median(rises) < 600 and np.quantile(rises, 0.95) > 86_400
    first = items[offsets[:-1]]
    assert len(np.unique(first)) == pytest.approx(10_000 * (1 - np.exp(-0.2)), rel=0.03)
    assert data.train_time_range() == (
        times[offsets[:-1]].min(),
        times[offsets[:-1] + data.train_ends - 1].max(),
    )


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_lengths_follow_their_law(exponent: float) -> None:
    data = made(num_users=100_000, shortest=5, longest=50, length_exponent=exponent)
    counted = np.bincount(data.lengths, minlength=51) / data.num_users
    expected = [mass(n, n + 1, exponent) / mass(5, 51, exponent) for n in range(5, 51)]
    np.testing.assert_allclose(counted[5:], expected, atol=0.004)
    assert counted[:5].sum() == 0 and len(counted) == 51
    assert (data.train_ends == data.lengths - 2).all() and (
        data.valid_ends == data.lengths - 1
    ).all()


def test_training_counts_are_those_of_the_histories() -> None:
    data = made(num_users=500, num_items=80)
    items, _, offsets = whole(data)
    counts = np.zeros(80, dtype=int)
    for begin, end in itertools.pairwise(offsets):
        for item in items[begin : end - 2]:
            counts[item] += 1
    assert data.train_counts.tolist() == counts.tolist()
    by_count = sorted(range(80), key=lambda item: (counts[item], item))
    assert data.items_by_count.tolist() == by_count


def test_a_billion_items_take_no_memory_and_a_batch_little_time() -> None:
    tracemalloc.start()
    data = made(num_users=100_000, num_items=10**9, shortest=203, longest=203)
    users = np.random.default_rng(0).permutation(100_000)[:655]
    begins = np.full(655, 2)
    began_at = time.process_time()
    items, _, _ = data.gather(users, begins, begins + 200)
    spent_s = time.process_time() - began_at
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 2**20 and spent_s < 0.5  # 3 ms on a core that has nothing else to do
    assert len(items) == 131_000 and items.min() >= 0 and items.max() < 10**9
    assert np.bincount(items // 10**8, minlength=10).min() > 10_000  # everywhere alike


@pytest.mark.parametrize("own_ids", ["integer", "string"])
def test_written_events_prepared_are_the_dataset_made_on_the_fly(
    own_ids: Any, tmp_path: Path
) -> None:
    config = SyntheticConfig(num_users=300, num_items=2000, own_ids=own_ids)
    write_events(event_tables(config), tmp_path / "events.parquet")
    prepare(PrepareConfig(), tmp_path / "events.parquet", tmp_path / "data")
    prepared, data = Dataset(tmp_path / "data"), SyntheticDataset(config)
    assert prepared.user_ids.to_pylist() == data.user_ids.to_pylist()
    for name in ("lengths", "train_ends", "valid_ends"):
        assert getattr(prepared, name).tolist() == getattr(data, name).tolist()
    users = np.arange(300)
    theirs, their_times, _ = prepared.gather(users, 0 * users, prepared.lengths)
    items, times, _ = whole(data)
    assert prepared.item_ids.take(theirs).to_pylist() == data.item_ids.take(items).to_pylist()
    assert their_times.tolist() == times.tolist()


def test_events_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu_rec.data.synthetic.CHUNK_EVENTS", 1000)
    config = SyntheticConfig(num_users=500)
    num_events = write_events(event_tables(config), tmp_path / "events.parquet")
    file = pq.ParquetFile(tmp_path / "events.parquet")
    data = SyntheticDataset(config)
    assert file.num_row_groups == 16 and num_events == data.num_events == file.metadata.num_rows
    assert file.read()["item_id"].to_pylist() == whole(data)[0].tolist()


def test_names_are_in_the_order_of_numbers() -> None:
    assert names("i", np.array([0, 12]), 600).to_pylist() == ["i0000000", "i0000012"]
    assert names("u", np.array([9, 10**8]), 10**8 + 1).to_pylist() == ["u000000009", "u100000000"]


def test_the_app_writes_a_catalogue_and_its_best(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "events.parquet"
    make_events.main(["catalogue", str(path), "num_users=50", "num_items=9"])
    printed = capsys.readouterr().out
    assert f"{pq.read_metadata(path).num_rows:,} events" in printed
    assert "best Recall@10 of who knows    the rule 1.0000" in printed


def test_wrong_settings_are_all_told() -> None:
    with pytest.raises(ValueError) as caught:
        load(
            RunConfig,
            [
                "data.synthetic.num_items=0",
                "data.synthetic.shortest=2",
                "data.synthetic.rule_share=2",
            ],
        )
    for sentence in (
        "data.synthetic.num_items must be in 1..2147483647; got 0",
        "data.synthetic.need 3 <= shortest <= longest <= 16777216; got 2 and 30",
        "data.synthetic.rule_share must be in [0, 1]; got 2.0",
        "data.synthetic.* has no effect but with path=synthetic; got data/demo",
    ):
        assert sentence in str(caught.value)
    with pytest.raises(ValueError, match=r"zipf_exponent must be in \[0, inf\); got nan"):
        made(zipf_exponent=float("nan"))


def test_a_run_on_a_made_catalogue_comes_near_the_best(tmp_path: Path) -> None:
    settings = [
        "data.path=synthetic",
        "data.synthetic.num_items=60",
        "data.synthetic.num_users=600",
    ]
    settings += ["encoder.dim=32", "encoder.dropout=0", "loss.negatives=all", "data.batch_users=32"]
    settings += ["train.max_epochs=10", "train.eval_every_epochs=5", "train.device=cpu"]
    settings += ["eval.min_train_count=20", "eval.ks=[1,10]", "eval.with_baselines=false"]
    config = load(
        RunConfig, [*settings, "train.select=seen_allowed/ndcg@10", f"train.run_dir={tmp_path}"]
    )
    result = train(config)
    further, protocol = result["further"], result["protocol"]
    best = further["best possible"]["seen_allowed"]["recall@1"]
    assert 0.8 < best < 0.83
    assert best - 0.1 < result["test"]["seen_allowed"]["recall@1"] < best + 0.04
    assert set(further) == {"model, 20+ events", "best possible", "best possible, 20+ events"}
    assert 0 < protocol["num_frequent_targets"] <= protocol["num_users"] == 600
    report = (tmp_path / "report.md").read_text()
    assert "| best possible, 20+ events | allowed" in report
    assert "20+ events: over the " in report
    with pytest.raises(
        ValueError, match=r"eval.min_train_count=9999: no valid target occurs so often"
    ):
        train(
            load(RunConfig, [*settings, "eval.min_train_count=9999", f"train.run_dir={tmp_path}/2"])
        )


def test_a_dataset_is_opened_by_its_path(tmp_path: Path) -> None:
    data = open_dataset(DataConfig(path="synthetic", synthetic=SyntheticConfig(num_items=5)))
    assert (data.num_users, data.num_items, data.facts["items"]) == (4000, 5, 5)
    with pytest.raises(FileNotFoundError, match="is no prepared dataset"):
        open_dataset(DataConfig(path=str(tmp_path)))


def test_the_demonstration_is_made_once_and_always_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare_demo(tmp_path / name)
    for name in ("events.arrow", "users.arrow"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    first = (tmp_path / "a" / "stats.json").stat().st_mtime_ns
    prepare_demo(tmp_path / "a")
    assert (tmp_path / "a" / "stats.json").stat().st_mtime_ns == first
    data = Dataset(tmp_path / "a")
    assert (data.num_users, data.num_items) == (4000, 600)
    assert data.stats["test_targets"] == 4000


def test_processes_that_make_the_demonstration_at_once_all_succeed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=prepare_demo, args=(tmp_path / "demo",)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == sorted(FILES)


def test_something_else_in_the_place_of_the_demonstration_is_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="already there"):
        prepare_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
