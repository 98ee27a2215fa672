"""Figures of integer ranks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hstu_rec import distributed


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
    result = {}
    for k in sorted(ks):
        hits = [(rank, count) for rank, count in tally if rank < k]
        result[f"recall@{k}"] = sum(count for _, count in hits) / total
        result[f"ndcg@{k}"] = math.fsum(n / math.log2(rank + 2) for rank, n in hits) / total
    result["mrr"] = math.fsum(count / (rank + 1) for rank, count in tally) / total
    return result


def both_metrics(ranks: Tensor, ks: Sequence[int]) -> dict[str, Any]:
    """{"num_users", "seen_masked", "seen_allowed"} of int64 [2, Q] ranks with seen items allowed and masked.
    Collective; raises as `rank_metrics`."""
    return {
        "num_users": int(distributed.all_reduce_sum(torch.tensor(ranks.shape[1]))),
        "seen_masked": rank_metrics(ranks[1], ks),
        "seen_allowed": rank_metrics(ranks[0], ks),
    }
