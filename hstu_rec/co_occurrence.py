"""Co-occurrence of items in users' training events, for a baseline and for first rows.

c_ij = sum over users' pairs of events i, j at most WINDOW apart of 2^(1 - gap). Halves, because they are
exact in float64: equal scores compare equal. The pairs of all users are held in memory.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hstu_rec.data.stream import Sequences

WINDOW = 5
# Word2vec's power of context counts, which keeps rare items from being everyone's neighbour.
CONTEXT_POWER = 0.75
# Of the randomised decomposition (Halko, Martinsson and Tropp, arXiv 0909.4061): what it draws beyond the
# wanted number of dimensions, and its power iterations.
EXTRA_DIMS, POWER_ITERATIONS = 32, 4


@dataclass(frozen=True)
class Pairs:
    """Sparse symmetric scores: item i's neighbours are neighbours[starts[i] : starts[i + 1]]."""

    starts: np.ndarray
    neighbours: np.ndarray
    scores: np.ndarray


def count_pairs(dataset: Sequences) -> Pairs:
    """Co-occurrence of the training part."""
    users = np.arange(dataset.num_users)
    items, _, offsets = dataset.gather(users, np.zeros_like(users), dataset.train_ends)
    owner = np.repeat(users, np.diff(offsets))
    num_items = dataset.num_items
    keys, weights = [], []
    for gap in range(1, WINDOW + 1):
        left, right = items[:-gap], items[gap:]
        is_pair = (owner[:-gap] == owner[gap:]) & (left != right)
        left, right = left[is_pair], right[is_pair]
        keys += [left * num_items + right, right * num_items + left]
        weights.append(np.full(2 * len(left), 2.0 ** (1 - gap)))
    distinct, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    scores = np.bincount(inverse, weights=np.concatenate(weights), minlength=len(distinct))
    starts = np.searchsorted(distinct // num_items, np.arange(num_items + 1))
    return Pairs(starts, distinct % num_items, scores)


def item_vectors(pairs: Pairs, dim: int, seed: int) -> Tensor:
    """float32 [N, dim]: U sqrt(S) of the positive pointwise mutual information of items, norm 1 in the mean.

    Items that occur with nothing, and dimensions that the data do not have, are 0. (Levy and Goldberg,
    "Neural word embedding as implicit matrix factorization", 2014.)
    """
    num_items = len(pairs.starts) - 1
    counts = np.diff(pairs.starts)
    item = np.repeat(np.arange(num_items), counts)
    total = np.bincount(item, weights=pairs.scores, minlength=num_items)
    context = total**CONTEXT_POWER
    context /= max(context.sum(), np.finfo(np.float64).tiny)
    information = np.log(pairs.scores / total[item] / context[pairs.neighbours])
    is_positive = information > 0
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([item, pairs.neighbours])[:, is_positive]),
        torch.from_numpy(information[is_positive]).float(),
        (num_items, num_items),
        check_invariants=True,
    ).coalesce()
    vectors = torch.zeros(num_items, dim)
    if matrix.values().numel():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            num_drawn = min(dim + EXTRA_DIMS, num_items)
            left, values, _ = torch.svd_lowrank(matrix, num_drawn, POWER_ITERATIONS)
        kept = min(dim, num_drawn)
        vectors[:, :kept] = left[:, :kept] * values[:kept].sqrt()
        # What rounding leaves of rows without entries.
        vectors[torch.from_numpy(np.bincount(item[is_positive], minlength=num_items) == 0)] = 0
    norms = vectors.norm(dim=1)
    return vectors / norms[norms > 0].mean() if (norms > 0).any() else vectors
