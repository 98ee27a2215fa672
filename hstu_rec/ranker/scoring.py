"""How well probabilities rank and fit: AUC, normalised entropy, AUC within users."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu_rec import distributed

LEAST_PROBABILITY = 1e-12


def binary_metrics(probabilities: Tensor, labels: Tensor, users: Tensor) -> dict[str, Any]:
    """Figures of all ranks' examples: float probabilities [n], labels [n] of 0 and 1, int64 users [n].
    Collective.

        auc    the chance that an example of label 1 has the higher probability than one of 0, ties half
        ne     cross entropy over that of the mean label for all (He et al. 2014, section 3); below 1 is
               better than knowing the mean
        gauc   the mean of users' own AUCs, weighted by their examples, over users with both labels
               (Zhu et al. 2017, section 4.1.2); num_gauc_users of them

    None where there is no such figure: all labels are the same, or are within every user. Raises ValueError
    for no example, and FloatingPointError for probabilities that are none.
    """
    columns = (probabilities.double(), labels.double(), users.double())
    whole = distributed.all_gather_rows(torch.stack(columns, dim=1).cpu()).numpy()
    if not len(whole):
        raise ValueError("metrics of no event at all; give at least one user with a target")
    scores, truth, owner = whole[:, 0], whole[:, 1], whole[:, 2].astype(np.int64)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise FloatingPointError("probabilities are outside 0..1: the model holds NaN or infinity")
    share = truth.mean()
    found: dict[str, Any] = {"num_events": len(truth), "num_users": len(np.unique(owner))}
    found |= {"share_positive": share, "auc": None, "ne": None, "gauc": None, "num_gauc_users": 0}
    if 0 < share < 1:
        clipped = scores.clip(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        entropy = -np.where(truth == 1, np.log(clipped), np.log1p(-clipped)).mean()
        mean_entropy = -(share * np.log(share) + (1 - share) * np.log1p(-share))
        found["ne"] = float(entropy / mean_entropy)
        found["auc"] = float(grouped_auc(scores, truth, np.zeros_like(owner))[0][0])
        own, sizes = grouped_auc(scores, truth, owner)
        has_both = ~np.isnan(own)
        if has_both.any():
            found["gauc"] = float(np.average(own[has_both], weights=sizes[has_both]))
            found["num_gauc_users"] = int(has_both.sum())
    return found


def grouped_auc(
    scores: np.ndarray, truth: np.ndarray, owner: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float64 AUC of each owner, NaN with one label alone, and how many examples it has, by rising owner.

    From the sums of ranks (Mann and Whitney 1947); equal scores share the mean of their ranks.
    """
    _, owner = np.unique(owner, return_inverse=True)
    order = np.lexsort((scores, owner))
    scores, truth, owner = scores[order], truth[order], owner[order]
    is_new = np.append(True, (np.diff(scores) != 0) | (np.diff(owner) != 0))
    first = np.flatnonzero(is_new)
    tie = np.cumsum(is_new) - 1
    last = np.append(first[1:], len(scores)) - 1
    sizes = np.bincount(owner)
    begin = np.cumsum(sizes) - sizes
    rank = ((first + last) / 2)[tie] - begin[owner] + 1
    positives = np.bincount(owner, weights=truth)
    of_positives = np.bincount(owner, weights=rank * truth)
    pairs = positives * (sizes - positives)
    with np.errstate(invalid="ignore", divide="ignore"):
        auc = (of_positives - positives * (positives + 1) / 2) / pairs
    return np.where(pairs > 0, auc, np.nan), sizes
