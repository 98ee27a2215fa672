"""The baselines against their slow definition, and on Amazon Beauty."""

import time
from pathlib import Path

import numpy as np
import pytest

from hstu_rec import baselines
from hstu_rec.baselines import WINDOW, baseline_metrics
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.prepare import PrepareConfig, prepare
from tests import oracles
from tests.datasets import write_dataset

BEAUTY = Path(__file__).parents[2] / "shared/data/amazon2014_beauty_5core.parquet"
KS = [1, 5, 10]


def random_sequences(seed, num_users=40, num_items=30):
    random = np.random.default_rng(seed)
    # Skewed, with repeats within a user, items never in training, and users of one or two events.
    return [
        (num_items * random.random(random.integers(1, 14)) ** 2).astype(int).tolist()
        for _ in range(num_users)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("split", "num_held_out"), [("valid", 2), ("test", 1)])
def test_all_rows_equal_their_slow_definition(tmp_path, monkeypatch, split, num_held_out, seed):
    monkeypatch.setattr(baselines, "BATCH_USERS", 7)
    sequences = random_sequences(seed)
    dataset = write_dataset(tmp_path / "data", sequences, num_items=33)
    result = baseline_metrics(dataset, split, KS, with_groups=True)
    lengths = [len(one) - num_held_out for one in sequences if len(one) >= 3]
    expected = oracles.baseline_ranks(sequences, 33, num_held_out, WINDOW)
    assert result.keys() == expected.keys()
    for name in expected:
        allowed, masked = zip(*expected[name], strict=True)
        assert result[name]["seen_allowed"] == pytest.approx(oracles.metrics(allowed, KS))
        assert result[name]["seen_masked"] == pytest.approx(oracles.metrics(masked, KS))
        short = [rank for rank, length in zip(masked, lengths, strict=True) if length <= 5]
        group = result[name]["groups"]["history_length"]["1-5"]
        assert group["num_users"] == len(short) > 5
        assert group["seen_masked"]["ndcg@10"] == pytest.approx(
            oracles.metrics(short, [10])["ndcg@10"]
        )


def test_co_occurrence_finds_a_planted_companion_that_popularity_does_not(tmp_path):
    pairs = [[4, 2 * place, 2 * place + 1, 2 * place, 2 * place + 1] for place in range(3, 40)] * 3
    result = baseline_metrics(write_dataset(tmp_path / "data", pairs), "test", KS)
    assert result["co_occurrence"]["seen_allowed"]["recall@5"] == 1
    assert result["popularity"]["seen_allowed"]["recall@1"] == 0


def test_what_a_user_repeats_most_comes_first_and_of_equals_the_latest(tmp_path):
    sequences = [[1, 2, 2, 3, 1, 9, target] for target in (1, 2, 3, 9)] * 3
    result = baseline_metrics(write_dataset(tmp_path / "data", sequences), "test", [1, 2, 3, 4])
    allowed = result["own_history"]["seen_allowed"]
    assert [allowed[f"recall@{k}"] for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1]
    assert allowed["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 3) / 4)


def test_held_out_events_are_not_counted(tmp_path):
    # Item 5 is only ever a test target: never popular, never together with anything.
    result = baseline_metrics(write_dataset(tmp_path / "data", [[0, 1, 2, 3, 5]] * 4), "test", [5])
    for name in ("popularity", "co_occurrence"):
        assert result[name]["seen_allowed"] == {"recall@5": 0, "ndcg@5": 0, "mrr": 1 / 6}


@pytest.mark.skipif(not BEAUTY.exists(), reason="the data sets beside the repository are absent")
def test_beauty_gives_these_fractions(tmp_path):
    prepare(PrepareConfig(), BEAUTY, tmp_path / "beauty")
    dataset = Dataset(tmp_path / "beauty")
    begin = time.perf_counter()
    result = baseline_metrics(dataset, "test", [10])
    assert time.perf_counter() - begin < 30
    hits = {
        (name, part): round(values["recall@10"] * 22_363, 6)
        for name, parts in result.items()
        for part, values in parts.items()
    }
    assert hits == {
        ("popularity", "seen_masked"): 245,
        ("popularity", "seen_allowed"): 238,
        # Nobody's item repeats there: popularity, after the history where that is allowed.
        ("own_history", "seen_masked"): 245,
        ("own_history", "seen_allowed"): 130,
        ("co_occurrence", "seen_masked"): 1703,
        ("co_occurrence", "seen_allowed"): 1583,
    }
