"""The best possible Recall@k of a made catalogue, against a ranking of all items by their probability."""

from typing import Any

import numpy as np
import pytest

from hstu_rec.data.known_best import best_recall
from hstu_rec.data.stream import Split
from hstu_rec.data.synthetic import SyntheticConfig, SyntheticDataset


def made(**settings: Any) -> SyntheticDataset:
    return SyntheticDataset(SyntheticConfig(**settings))


def by_ranking_all(
    data: SyntheticDataset, split: Split, k: int, min_train_count: int
) -> tuple[float, float, int]:
    """(expected, realised, users) by the process as its docstring tells it, a user and an item at a time."""
    catalogue, share = data.catalogue, data.config.rule_share
    popularity = catalogue.popularity(catalogue.ranks(np.arange(data.num_items)))
    ends = data.train_ends if split == "valid" else data.valid_ends
    expected, hits = [], []
    for user, end in enumerate(ends):
        items, _, _ = data.gather(np.array([user]), np.array([0]), np.array([end + 1]))
        last, target = items[-2:]
        if data.train_counts[target] < min_train_count:
            continue
        probability = (1 - share) * popularity
        probability[(last + catalogue._step) % data.num_items] += share
        probability[data.train_counts < min_train_count] = 0.0
        best = np.argsort(-probability, kind="stable")[:k]
        expected.append(probability[best].sum() / probability.sum())
        hits.append(target in best)
    return float(np.mean(expected)), float(np.mean(hits)), len(hits)


@pytest.mark.parametrize("k", [1, 2, 5, 40, 50])
@pytest.mark.parametrize("rule_share", [0.0, 0.05, 0.3, 0.8])
@pytest.mark.parametrize("min_train_count", [0, 35, 45])
def test_it_is_that_of_a_ranking_of_all_items(
    k: int, rule_share: float, min_train_count: int
) -> None:
    data = made(num_users=150, num_items=40, rule_share=rule_share, zipf_exponent=1.1, seed=k)
    assert min_train_count == 0 or 0 < (data.train_counts >= min_train_count).sum() < 38
    for split in ("valid", "test"):
        best = best_recall(data, split, [1, k, 30], min_train_count)[k]
        expected, realised, num_users = by_ranking_all(data, split, k, min_train_count)
        assert best.expected == pytest.approx(expected)
        assert (best.realised, best.num_users) == (pytest.approx(realised), num_users)


@pytest.mark.parametrize("min_train_count", [0, 20])
def test_what_is_expected_comes_true(min_train_count: int) -> None:
    data = made(num_users=40_000, num_items=30_000, rule_share=0.4)
    best = best_recall(data, "test", [10], min_train_count)[10]
    deviation = np.sqrt(best.expected * (1 - best.expected) / best.num_users)
    assert abs(best.expected - best.realised) < 4 * deviation
    assert min_train_count == 0 or best.num_users < 39_000


def test_targets_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="no valid target occurs 1000 times in training"):
        best_recall(made(num_users=10), "valid", [10], 1000)
