"""Figures of integer ranks: of all users, and of groups of them."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hstu_rec import distributed

# Cut-off of the figures of groups.
GROUP_K = 10
# The least value of each bin; the last one has no end.
GROUPINGS = {
    "history_length": (1, 6, 11, 21, 51),
    "target_train_count": (0, 1, 5, 20, 100, 1000),
}


def cut_off_problems(ks: Sequence[int]) -> list[str]:
    """What is wrong with cut-offs, a sentence."""
    if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
        return [f"ks must be distinct numbers of at least 1; got {list(ks)}"]
    return []


def rank_metrics(ranks: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Recall@k, NDCG@k and MRR of all ranks' int64 `ranks` (0 is best), one target a query. Collective.

    The same to the last bit for any division of the queries over processes and threads: integers are
    gathered, and `fsum` does not depend on order. Raises ValueError when no rank has a query.
    """
    values, counts = distributed.all_gather_rows(ranks).unique(return_counts=True)
    tally = list(zip(values.tolist(), counts.tolist(), strict=True))
    total = sum(count for _, count in tally)
    if not total:
        raise ValueError("metrics of no query at all; give at least one user with a target")
    return _figures(tally, total, ks) | {
        "mrr": math.fsum(count / (rank + 1) for rank, count in tally) / total
    }


def _figures(tally: Sequence[tuple[int, int]], total: int, ks: Sequence[int]) -> dict[str, float]:
    """Recall@k and NDCG@k of (rank, how many) of `total` targets."""
    result = {}
    for k in sorted(ks):
        hits = [(rank, count) for rank, count in tally if rank < k]
        result[f"recall@{k}"] = sum(count for _, count in hits) / total
        result[f"ndcg@{k}"] = math.fsum(n / math.log2(rank + 2) for rank, n in hits) / total
    return result


def both_metrics(ranks: Tensor, ks: Sequence[int]) -> dict[str, Any]:
    """{"num_users", "seen_masked", "seen_allowed"} of int64 [2, Q] ranks with seen items allowed and masked.
    Collective; raises as `rank_metrics`."""
    return {
        "num_users": int(distributed.all_reduce_sum(torch.tensor(ranks.shape[1]))),
        "seen_masked": rank_metrics(ranks[1], ks),
        "seen_allowed": rank_metrics(ranks[0], ks),
    }


def bin_names(grouping: str) -> list[str]:
    """What the bins of a grouping are called, such as 1-5 and 51+."""
    least = GROUPINGS[grouping]
    spans = [
        f"{begin}-{after - 1}" if after - 1 > begin else f"{begin}"
        for begin, after in itertools.pairwise(least)
    ]
    return [*spans, f"{least[-1]}+"]


def group_metrics(
    ranks: Tensor, history_lengths: Tensor, train_counts: Tensor
) -> dict[str, dict[str, Any]]:
    """{GROUPING: {BIN: {"num_users", "seen_masked": {"recall@10", "ndcg@10"}, "seen_allowed": {...}}}}, an
    empty bin with num_users alone. Collective.

    ranks: int64 [2, Q] with seen items allowed and masked; history_lengths: int64 [Q] events before the
    target, at least 1; train_counts: int64 [Q] how often the target occurs in training. As `rank_metrics`,
    the same to the last bit for any division of the queries: users of a bin by rank are integers, summed.
    """
    places = ranks.cpu().clamp(max=GROUP_K)
    values = {"history_length": history_lengths, "target_train_count": train_counts}
    result = {}
    for grouping, least in GROUPINGS.items():
        names = bin_names(grouping)
        bins = torch.bucketize(values[grouping].cpu(), torch.tensor(least), right=True) - 1
        keys = bins * (GROUP_K + 1) + places  # [2, Q]
        size = len(names) * (GROUP_K + 1)
        counts = torch.stack([one.bincount(minlength=size) for one in keys])
        allowed, masked = distributed.all_reduce_sum(counts).view(2, len(names), -1).tolist()
        result[grouping] = {
            name: _of_group(*both) for name, *both in zip(names, masked, allowed, strict=True)
        }
    return result


def _of_group(masked: list[int], allowed: list[int]) -> dict[str, Any]:
    """Figures of the users of a bin, by rank 0, 1, .. and, at last, GROUP_K or more."""
    total = sum(allowed)
    if not total:
        return {"num_users": 0}
    parts = {"seen_masked": masked, "seen_allowed": allowed}
    return {"num_users": total} | {
        part: _figures([*enumerate(counts)], total, [GROUP_K]) for part, counts in parts.items()
    }
