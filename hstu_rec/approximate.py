"""What approximate forms of a model lose, measured on users: vectors in int8, an index of the items."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu_rec.asked import Asked
from hstu_rec.bundle import Rows, model_of
from hstu_rec.item_index import IndexKind, ItemIndex
from hstu_rec.quantised import Int8Rows
from hstu_rec.scores import ItemShard
from hstu_rec.serving import ServingModel

K = 10
METRIC = f"recall@{K}"
BLOCK_USERS = 1024


def int8_loss(exact: ServingModel, users: Asked) -> dict[str, Any]:
    """Recall@10 of the users' targets, seen items masked, by float32 and by int8 vectors, and sizes."""
    # Through the target, which evaluation takes off again.
    histories, _ = replace(users, ends=users.ends + 1).histories(slice(None), 0)
    both = [model.evaluate_last(histories, [K]) for model in (exact, in_int8(exact))]
    before, after = (float(one["seen_masked"][METRIC]) for one in both)
    num_items, dim = rows_of(exact).shape
    return {
        "users": both[0]["num_users"],
        f"{METRIC}, float32": before,
        f"{METRIC}, int8": after,
        "loss": before - after,
        "bytes, float32": 4 * num_items * dim,
        "bytes, int8": num_items * (dim + 4),
    }


def int8_sentence(measured: Mapping[str, Any]) -> str:
    """What `int8_loss` gives, in words."""
    before, after = (measured[f"{METRIC}, {kind}"] for kind in ("float32", "int8"))
    large, small = (measured[f"bytes, {kind}"] / 2**10 for kind in ("float32", "int8"))
    return (
        f"Recall@{K} of {measured['users']:,} test users is {after:.4f}, in float32 {before:.4f}; the item "
        f"vectors take {small:,.0f} KiB, in float32 {large:,.0f} KiB"
    )


def index_sentence(measured: Mapping[str, Any]) -> str:
    """What `measured_index` gives beside the index, in words."""
    cells = f"{measured['cells searched']:,} of {measured['cells']:,} cells are searched"
    return (
        f"{measured['kind']} finds {measured[METRIC]:.2%} of the {K} best items of "
        f"{measured['users']:,} test users; "
        f"{'all items are compared' if measured['kind'] == 'exact' else cells}"
    )


def in_int8(exact: ServingModel) -> ServingModel:
    """The same model with item vectors in int8."""
    rows = Int8Rows.of(rows_of(exact))
    model = model_of(exact.config.encoder, exact.config.scoring, rows)
    model.load_state_dict(exact.model.state_dict(), assign=True)
    return ServingModel(exact.config, model.requires_grad_(False), exact.items)


def rows_of(exact: ServingModel) -> Tensor:
    """Its item vectors, float32 [N, D], as they are trained."""
    table = exact.model.table
    assert isinstance(table, Rows) and isinstance(table.rows, Tensor)
    return table.rows


def measured_index(
    exact: ServingModel, users: Asked, kind: IndexKind, least_recall: float
) -> tuple[ItemIndex, dict[str, Any]]:
    """An index of the items, and the share of the ten best unseen items of the users that it finds; of ivf
    with the fewest cells to search, a power of two, that find `least_recall` of them."""
    rows = rows_of(exact)
    shard = ItemShard(rows, 0, len(rows), exact.model.loss.item_vectors)
    index = ItemIndex.build(kind, shard)
    approximate = exact.with_index(index)
    wanted = _found(exact, users)
    recall = _recall(wanted, _found(approximate, users))
    while recall < least_recall and index.num_probed < index.num_cells:
        index.num_probed = min(2 * index.num_probed, index.num_cells)
        recall = _recall(wanted, _found(approximate, users))
    return index, {
        "kind": kind,
        "users": len(users.users),
        METRIC: recall,
        "cells": index.num_cells,
        "cells searched": index.num_probed,
    }


def _found(model: ServingModel, users: Asked) -> np.ndarray:
    """int64 [n], rising: user and item in one number of the ten best."""
    histories, times = users.histories(slice(None), 0)
    found, every = [torch.zeros(0, dtype=torch.int64)], len(histories.user_ids)
    for begin in range(0, every, BLOCK_USERS):
        part = slice(begin, min(begin + BLOCK_USERS, every))
        user, row, _ = model.best_rows(histories, times, part, K)
        found.append(user * len(model.items) + row)
    return torch.cat(found).sort().values.numpy()


def _recall(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(np.isin(wanted, found, assume_unique=True).mean())
