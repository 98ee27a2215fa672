"""Made events: the rule is there, its best Recall@1 is right, the demonstration is made once."""

import multiprocessing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hstu_rec.data.dataset import FILES, Dataset
from hstu_rec.data.synthetic import (
    best_recall_at_1,
    make_events,
    planted_rule,
    prepare_demo,
    with_planted_rule,
)


def pairs(events: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(item, next item) of the same user, as numbers."""
    users = np.array(events["user_id"].to_pylist())
    items = np.array([int(item[1:]) for item in events["item_id"].to_pylist()])
    same = users[1:] == users[:-1]
    return items[:-1][same], items[1:][same]


def test_the_same_seed_makes_the_same_events() -> None:
    assert make_events(50, 20, 1).equals(make_events(50, 20, 1))
    assert not make_events(50, 20, 1).equals(make_events(50, 20, 2))


def test_events_have_own_ids_and_rising_times() -> None:
    events = make_events(2000, 100, 0)
    assert events.schema.names == ["user_id", "item_id", "timestamp"]
    assert events.schema.types == [pa.string(), pa.string(), pa.int64()]
    users, times = np.array(events["user_id"].to_pylist()), events["timestamp"].to_numpy()
    assert (np.diff(times)[users[1:] == users[:-1]] > 0).all()
    lengths = np.unique(users, return_counts=True)[1]
    assert len(lengths) == 2000 and lengths.min() == 3
    assert lengths.mean() == pytest.approx(12, abs=1)


def test_following_the_rule_visits_every_item() -> None:
    rule, popularity = planted_rule(37, 5)
    item, seen = 0, []
    for _ in range(37):
        seen.append(item)
        item = rule[item]
    assert sorted(seen) == list(range(37)) and item == 0
    assert popularity.sum() == pytest.approx(1)
    assert sorted(popularity)[-1] == pytest.approx(2 * sorted(popularity)[-2])


def test_a_rule_share_of_one_is_always_followed_and_shuffling_destroys_it() -> None:
    rule, _ = planted_rule(50, 3)
    before, after = pairs(with_planted_rule(500, 50, 3))
    assert (rule[before] == after).all()
    shuffled = with_planted_rule(500, 50, 3, shuffled=True)
    before, after = pairs(shuffled)
    assert (rule[before] == after).mean() < 0.05
    ordered = with_planted_rule(500, 50, 3)
    assert sorted(shuffled["item_id"].to_pylist()) == sorted(ordered["item_id"].to_pylist())


@pytest.mark.parametrize("rule_share", [0.0, 0.1, 0.8, 1.0])
def test_best_recall_is_what_knowing_the_rule_gives(rule_share: float) -> None:
    rule, popularity = planted_rule(40, 9)
    before, after = pairs(make_events(3000, 40, 9, mean_length=40, rule_share=rule_share))
    follow = rule_share + (1 - rule_share) * popularity[rule] >= (1 - rule_share) * popularity.max()
    guess = np.where(follow, rule, popularity.argmax())
    best = best_recall_at_1(40, 9, rule_share=rule_share)
    assert (guess[before] == after).mean() == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize(
    "sizes", [{"num_users": 0}, {"num_items": 1}, {"mean_length": 3.0}, {"rule_share": 1.5}]
)
def test_sizes_that_make_no_events_are_refused(sizes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need num_users >= 1"):
        make_events(**({"num_users": 5, "num_items": 5, "seed": 0} | sizes))  # pyright: ignore[reportArgumentType]


def test_the_demonstration_is_made_once_and_always_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare_demo(tmp_path / name)
    for name in ("events.arrow", "users.arrow"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    made = (tmp_path / "a" / "stats.json").stat().st_mtime_ns
    prepare_demo(tmp_path / "a")
    assert (tmp_path / "a" / "stats.json").stat().st_mtime_ns == made
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
