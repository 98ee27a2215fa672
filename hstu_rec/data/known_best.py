"""The best possible Recall@k on a made catalogue, over the very targets that a model is measured on.

Given the item before it, a target is

    j  with probability  rule_share [j = successor] + (1 - rule_share) popularity_j

and nothing earlier tells more. Nothing beats k items of highest probability, seen items allowed: mostly the
successor and the k - 1 most popular others. Over the targets that occur at least min_train_count times in
training, what does not occur so often is no candidate, and probabilities are given that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hstu_rec.data.stream import Split
from hstu_rec.data.synthetic import SyntheticConfig, SyntheticDataset

BLOCK = 2**22


@dataclass(frozen=True)
class BestRecall:
    """Of the best k items."""

    expected: float
    """Mean probability that they hold the target."""
    realised: float
    """Share of these targets that they do hold."""
    num_users: int
    """Over how many."""


def best_recall(
    dataset: SyntheticDataset, split: Split, ks: Sequence[int], min_train_count: int = 0
) -> dict[int, BestRecall]:
    """The best possible Recall@k by k. Raises ValueError when no target occurs so often."""
    candidates = _candidates(dataset, max(ks), min_train_count)
    ends = dataset.train_ends if split == "valid" else dataset.valid_ends
    expected, hits, num_users = dict.fromkeys(ks, 0.0), dict.fromkeys(ks, 0), 0
    for users in dataset.chunks():
        end = ends[users]
        pairs = dataset.gather(users, end - 1, end + 1)[0].reshape(-1, 2)
        if min_train_count:
            pairs = pairs[dataset.train_counts[pairs[:, 1]] >= min_train_count]
        for k in expected:
            probability, is_hit = _of_best(dataset, candidates, pairs, k)
            expected[k] += float(probability.sum())
            hits[k] += int(is_hit.sum())
        num_users += len(pairs)
    if not num_users:
        raise ValueError(f"no {split} target occurs {min_train_count} times in training; lower it")
    return {
        k: BestRecall(expected[k] / num_users, hits[k] / num_users, num_users) for k in expected
    }


def best_catalogue_recall(config: SyntheticConfig, k: int) -> dict[str, float]:
    """Expected Recall@k, seen items allowed, of users' last events for who knows rule and popularity."""
    return {"the rule": best_recall(SyntheticDataset(config), "test", [k])[k].expected}


@dataclass(frozen=True)
class _Candidates:
    """What can be a target. `chosen` tells it by item; None: everything can."""

    most_popular: np.ndarray  # int64 [at most k + 1] ranks
    share: float  # probability that a draw is one of them all
    chosen: np.ndarray | None


def _candidates(dataset: SyntheticDataset, k: int, min_train_count: int) -> _Candidates:
    catalogue = dataset.catalogue
    if not min_train_count:
        return _Candidates(np.arange(min(k + 1, dataset.num_items)), 1.0, None)
    chosen = dataset.train_counts >= min_train_count
    popular, share = np.zeros(0, dtype=np.int64), 0.0
    for begin in range(0, dataset.num_items, BLOCK):
        ranks = np.arange(begin, min(begin + BLOCK, dataset.num_items))
        ranks = ranks[chosen[catalogue.items(ranks)]]
        popular = np.append(popular, ranks[: k + 1 - len(popular)])
        share += float(catalogue.popularity(ranks).sum())
    return _Candidates(popular, share, chosen)


def _of_best(
    dataset: SyntheticDataset, candidates: _Candidates, pairs: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [Q] probability of the best k after pairs[:, 0], bool [Q] whether they hold pairs[:, 1])."""
    catalogue, rule_share = dataset.catalogue, dataset.config.rule_share
    popular, chosen = candidates.most_popular, candidates.chosen
    item = catalogue.successors(pairs[:, 0])
    is_candidate = np.full(len(item), True) if chosen is None else chosen[item]
    successor, target = catalogue.ranks(item), catalogue.ranks(pairs[:, 1])
    drawn = (1 - rule_share) * catalogue.popularity(popular)
    followed = rule_share + (1 - rule_share) * catalogue.popularity(successor)
    is_taken = is_candidate & (len(popular) < k or followed >= drawn[k - 1])
    # The best are the successor, if taken, and the most popular: one more of them where it is one of them.
    place = np.searchsorted(popular, successor)
    num_popular = np.where(is_taken, k - 1 + (place < k - 1), k).clip(max=len(popular))
    by_draws = np.append(0.0, np.cumsum(drawn))[num_popular]
    of_successor = np.where(place < num_popular, rule_share, followed) * is_taken
    total = rule_share * is_candidate + (1 - rule_share) * candidates.share
    is_hit = (np.searchsorted(popular, target) < num_popular) | (is_taken & (target == successor))
    return (by_draws + of_successor) / total, is_hit
