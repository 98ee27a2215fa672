"""Popularity, co-occurrence and the user's own history, ranked by the model's own rule, so that a run can be
held against them.

Popularity and co-occurrence are counted on the training part alone. Own history: the user's items by how
often, then how lately, they occurred, before all others by popularity; hard to beat where events repeat.
Co-occurrence: an item's score is the sum over the last WINDOW events h of 2^-age c_hj (see co_occurrence),
age 0 being the newest, with popularity to break ties. The pairs of all users are held in memory: for very
large data set eval.with_baselines=false.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hstu_rec import distributed, tracking
from hstu_rec.co_occurrence import WINDOW, Pairs, count_pairs
from hstu_rec.data.stream import EvalBatch, Sequences, Split, eval_batches, eval_users
from hstu_rec.evaluator import train_counts_of
from hstu_rec.metrics import group_metrics, rank_metrics
from hstu_rec.tracking import BAR_AFTER_S

BATCH_USERS = 1024


def baseline_metrics(
    dataset: Sequences, split: Split, ks: Sequence[int], with_groups: bool = False
) -> dict[str, Any]:
    """{"popularity": {"seen_masked": {...}, "seen_allowed": {...}}, "own_history": ...,
    "co_occurrence": ...}, each with_groups also with "groups" (`group_metrics`). Collective.
    """
    popularity = dataset.train_counts.astype(np.float64)
    pairs = count_pairs(dataset)
    names = ("popularity", "own_history", "co_occurrence")
    ranks: dict[str, list[np.ndarray]] = {name: [] for name in names}
    lengths, train_counts = [], []
    num_users = len(eval_users(dataset, split)[0])
    bar = tracking.bar(
        num_users, "baselines", "user", is_shown=distributed.is_main(), after_s=BAR_AFTER_S
    )
    for batch in eval_batches(dataset, split, WINDOW, BATCH_USERS):
        bar.update(min(BATCH_USERS * distributed.world_size(), num_users - bar.n))
        lengths.append(batch.seen_offsets.diff())
        train_counts.append(train_counts_of(dataset, batch.history.target_ids))
        targets = batch.history.target_ids.numpy()
        user, item = _distinct_seen(batch, dataset.num_items)
        is_other = item != targets[user]
        user, item = user[is_other], item[is_other]
        popular = _popularity_ranks(popularity, targets, user, item)
        ranks["popularity"].append(popular)
        ranks["own_history"].append(_own_history_ranks(batch, dataset.num_items, popular[1]))
        ranks["co_occurrence"].append(_co_occurrence_ranks(pairs, popularity, batch, (user, item)))
    bar.close()
    result = {}
    for name, parts in ranks.items():
        allowed, masked = np.concatenate(parts, axis=1)
        result[name] = {
            "seen_masked": rank_metrics(torch.from_numpy(masked), ks),
            "seen_allowed": rank_metrics(torch.from_numpy(allowed), ks),
        }
        if with_groups:
            both = torch.from_numpy(np.stack([allowed, masked]))
            result[name]["groups"] = group_metrics(
                both, torch.cat(lengths), torch.cat(train_counts)
            )
    return result


def _distinct_seen(batch: EvalBatch, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """(row in the batch, item) of every distinct seen item."""
    rows = np.repeat(np.arange(len(batch.users)), np.diff(batch.seen_offsets.numpy()))
    keys = np.unique(rows * num_items + batch.seen_ids.numpy())
    return keys // num_items, keys % num_items


def _popularity_ranks(
    popularity: np.ndarray, targets: np.ndarray, user: np.ndarray, item: np.ndarray
) -> np.ndarray:
    """int64 [2, Q]: ranks with seen items allowed and masked."""
    at_least = len(popularity) - np.searchsorted(np.sort(popularity), popularity[targets])
    is_above = popularity[item] >= popularity[targets[user]]
    seen = np.bincount(user[is_above], minlength=len(targets))
    return np.stack([at_least - 1, at_least - 1 - seen])


def _own_history_ranks(batch: EvalBatch, num_items: int, popular: np.ndarray) -> np.ndarray:
    """int64 [2, Q]: ranks with seen items allowed and masked; `popular` [Q]: those of popularity, masked."""
    targets, offsets = batch.history.target_ids.numpy(), batch.seen_offsets.numpy()
    num_seen = np.diff(offsets)
    owner = np.repeat(np.arange(len(targets)), num_seen)
    keys, inverse, counts = np.unique(
        owner * num_items + batch.seen_ids.numpy(), return_inverse=True, return_counts=True
    )
    last = np.zeros(len(keys), dtype=np.int64)
    last[inverse] = np.arange(len(owner)) - offsets[owner]  # the latest assignment stays
    strength = counts * (num_seen.max(initial=0) + 1) + last
    wanted = np.arange(len(targets)) * num_items + targets
    own = _values_of(wanted, keys, strength)
    user = keys // num_items
    above = np.bincount(user[strength > own[user]], minlength=len(targets))
    # Every seen item has a strength above 0.
    rest = np.where(own > 0, 0, popular)
    return np.stack([above + rest, rest])


def _co_occurrence_ranks(
    pairs: Pairs,
    popularity: np.ndarray,
    batch: EvalBatch,
    seen: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """int64 [2, Q]: ranks with seen items allowed and masked."""
    num_items = len(popularity)
    targets = batch.history.target_ids.numpy()
    history = batch.history.item_ids.numpy()
    history_offsets = batch.history.offsets.numpy()
    rows = np.repeat(np.arange(len(targets)), np.diff(history_offsets))
    age = history_offsets[1:][rows] - 1 - np.arange(len(history))
    first, counts = pairs.starts[history], np.diff(pairs.starts)[history]
    offsets = np.cumsum(counts) - counts
    at = np.repeat(first - offsets, counts) + np.arange(counts.sum())
    keys, inverse = np.unique(
        np.repeat(rows, counts) * num_items + pairs.neighbours[at], return_inverse=True
    )
    scores = np.bincount(
        inverse, weights=pairs.scores[at] * np.repeat(0.5**age, counts), minlength=len(keys)
    )

    def score_of(user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Score of each pair, 0 for items that occur with nothing of the history."""
        return _values_of(user * num_items + item, keys, scores)

    own = score_of(np.arange(len(targets)), targets)

    def is_above(user: np.ndarray, item: np.ndarray, score: np.ndarray) -> np.ndarray:
        """By score, then by popularity; equal in both counts as above."""
        is_tied = (score == own[user]) & (popularity[item] >= popularity[targets[user]])
        return (score > own[user]) | is_tied

    user, item = keys // num_items, keys % num_items
    is_other = item != targets[user]
    user, item, score = user[is_other], item[is_other], scores[is_other]
    ranks = np.bincount(user[is_above(user, item, score)], minlength=len(targets))
    # A target without co-occurrence is also behind the scoreless items that are more popular.
    more_popular = num_items - np.searchsorted(np.sort(popularity), popularity[targets]) - 1
    is_popular = popularity[item] >= popularity[targets[user]]
    counted = np.bincount(user[is_popular], minlength=len(targets))
    ranks = ranks + np.where(own == 0, more_popular - counted, 0)
    seen_user, seen_item = seen
    seen_above = is_above(seen_user, seen_item, score_of(seen_user, seen_item))
    masked = ranks - np.bincount(seen_user[seen_above], minlength=len(targets))
    return np.stack([ranks, masked])


def _values_of(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values of `wanted` among the sorted `keys`; 0 for those that are not there."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=values.dtype)
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
