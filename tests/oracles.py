"""Ranks, metrics and baselines written out slowly in numpy, independent of the package."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np


def exact_score(left: np.ndarray, right: np.ndarray) -> float:
    """Sum of float64 products in the order the evaluator defines: neighbours half a vector apart."""
    products = [float(a) * float(b) for a, b in zip(left, right, strict=True)]
    while len(products) > 1:
        half = (len(products) + 1) // 2
        later = products[half:] + [0.0] * (2 * half - len(products))
        products = [a + b for a, b in zip(products[:half], later, strict=True)]
    return products[0]


def ranks(
    items: np.ndarray,
    queries: np.ndarray,
    targets: np.ndarray,
    seen: Sequence[Sequence[int]],
    seen_score: float = 0.0,
    num_recent: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """(ranks with seen items allowed, with seen items masked) of each query's target."""
    allowed, masked = [], []
    counts = [len(history) for history in seen] if num_recent is None else num_recent
    for query, target, history, count in zip(queries, targets, seen, counts, strict=True):
        recent = history[len(history) - count :]
        scores = [
            exact_score(query, items[item]) + (seen_score if item in recent else 0.0)
            for item in range(len(items))
        ]
        above = {i for i, score in enumerate(scores) if i != target and score >= scores[target]}
        allowed.append(len(above))
        masked.append(len(above - set(history)))
    return allowed, masked


def metrics(of_ranks: Sequence[int], ks: Sequence[int]) -> dict[str, float]:
    """One relevant item a query: Recall = share of hits, DCG = 1 / log2(position + 1), ideal DCG = 1."""
    positions = [rank + 1 for rank in of_ranks]
    result = {"mrr": sum(1 / position for position in positions) / len(positions)}
    for k in ks:
        hits = [position for position in positions if position <= k]
        result[f"recall@{k}"] = len(hits) / len(positions)
        gains = [np.log(2) / np.log(position + 1) for position in hits]
        result[f"ndcg@{k}"] = float(sum(gains)) / len(positions)
    return result


def _order_above(score: Sequence[Any], target: int, history: Sequence[int]) -> tuple[int, int]:
    above = {i for i in range(len(score)) if i != target and score[i] >= score[target]}
    return len(above), len(above - set(history))


def baseline_ranks(
    sequences: Sequence[Sequence[int]], num_items: int, num_held_out: int, window: int
) -> dict[str, list[tuple[int, int]]]:
    """{"popularity" | "own_history" | "co_occurrence": (allowed, masked) ranks by user}; targets num_held_out
    from the end.

    Users of at least three events hold two of them out of training.
    """
    train = [list(s[:-2]) if len(s) >= 3 else list(s) for s in sequences]
    popularity = Counter(item for events in train for item in events)
    together: dict[tuple[int, int], float] = defaultdict(float)
    for events in train:
        for a, left in enumerate(events):
            for b, right in enumerate(events):
                if 0 < abs(a - b) <= window and left != right:
                    together[left, right] += 2 / 2 ** abs(a - b)
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for events in sequences:
        if len(events) < 3:
            continue
        history, target = events[:-num_held_out], events[-num_held_out]
        popular = [popularity[item] for item in range(num_items)]
        near = [
            (
                sum(
                    together.get((h, item), 0) / 2**age
                    for age, h in enumerate(reversed(history[-window:]))
                ),
                popularity[item],
            )
            for item in range(num_items)
        ]
        found["popularity"].append(_order_above(popular, target, history))
        own = [
            (history.count(item), len(history) - 1 - history[::-1].index(item), 0)
            if item in history
            else (0, -1, popularity[item])
            for item in range(num_items)
        ]
        found["own_history"].append(_order_above(own, target, history))
        found["co_occurrence"].append(_order_above(near, target, history))
    return found
