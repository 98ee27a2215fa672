"""Events in own ids as users' histories: what is given when recommendations are asked for.

user_id  item_id  timestamp          users: b a      items (rows)  7 2 7 | 5      offsets  0 3 4
b        "y"      12                 "y" is row 7, "x" row 2, "z" row 5, "?" unknown
b        "x"      12       -->
a        "z"      99
b        "y"      34
a        "?"      11
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from hstu_rec.data.dataset import LATEST_S, offsets_of
from hstu_rec.data.own_ids import ItemIndex, kind_of, typed_ids

COLUMNS = ("user_id", "item_id", "timestamp")
# A table, or what makes one: columns by name, each a list, a numpy or an arrow array.
Events = pa.Table | Mapping[str, Any]
OnUnknown = Literal["warn", "raise", "ignore"]
NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Histories:
    """The known events of users who have any, user after user, oldest first, equal times as given."""

    user_ids: pa.Array
    """[B] own ids, in the order in which they first appear."""
    items: np.ndarray
    """int64 [T] rows."""
    times: np.ndarray
    """int64 [T] s."""
    offsets: np.ndarray
    """int64 [B + 1]."""


def read_histories(events: Events, index: ItemIndex, on_unknown: OnUnknown = "warn") -> Histories:
    """The histories that `events` tell: columns user_id (integers or strings), item_id (as in `index`) and
    timestamp (integers, unix seconds), rows in any order; further columns are not read.

    Events of unknown items are left out, with a warning, or not at all: ValueError, by `on_unknown`; of
    users without a known event there is always a warning. Raises ValueError for columns of other types or
    with nulls, and times that are no seconds.
    """
    if on_unknown not in get_args(OnUnknown):
        allowed = ", ".join(get_args(OnUnknown))
        raise ValueError(f"on_unknown must be one of {allowed}; got {on_unknown!r}")
    columns = _columns(events)
    users, own_items = (_ids(columns[name], name) for name in ("user_id", "item_id"))
    times = _seconds(columns["timestamp"])
    if len(own_items) and own_items.type != index.ids.type:
        raise ValueError(
            f"item_id holds {kind_of(own_items)}, the model's items are {kind_of(index.ids)}, such as "
            f"{index.ids[0].as_py()!r}; give the ids that it was trained on"
        )
    items = index.rows(own_items.cast(index.ids.type))
    is_known = items >= 0
    if not is_known.all() and on_unknown != "ignore":
        _tell_unknown(own_items, is_known, len(index), on_unknown)
    encoded = users.dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    lengths = np.bincount(codes[is_known], minlength=len(encoded.dictionary))
    if not lengths.all():
        _tell_lost(encoded.dictionary, lengths)
    order = np.lexsort((times, codes))
    order = order[is_known[order]]
    return Histories(
        encoded.dictionary.filter(pa.array(lengths > 0)),
        items[order],
        times[order],
        offsets_of(lengths[lengths > 0]),
    )


def _columns(events: Events) -> pa.Table:
    try:
        table: pa.Table = events if isinstance(events, pa.Table) else pa.table(dict(events))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(
            f"events must be a pyarrow table, or columns of equal length by name: {error}"
        ) from error
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise ValueError(
            f"events need the columns {', '.join(COLUMNS)}; {', '.join(missing)} missing, there are "
            f"{', '.join(table.column_names) or 'none'}"
        )
    return table


def _ids(column: pa.ChunkedArray, name: str) -> pa.Array:
    if not len(column):
        return pa.array([], pa.int64())
    try:
        return typed_ids(column)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _seconds(column: pa.ChunkedArray) -> np.ndarray:
    if not len(column):
        return np.zeros(0, dtype=np.int64)
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(
            "timestamp must be integers without nulls, unix seconds; got "
            f"{column.type}, {column.null_count:,} nulls"
        )
    times = column.cast(pa.int64(), safe=False).to_numpy()
    is_outside = (times < 0) | (times >= LATEST_S)
    if is_outside.any():
        raise ValueError(
            f"{int(is_outside.sum()):,} timestamps are outside 0..{LATEST_S - 1}, such as "
            f"{times[is_outside][0]}; give unix seconds, not milliseconds"
        )
    return times


def _tell_unknown(
    own_items: pa.Array, is_known: np.ndarray, num_items: int, on_unknown: OnUnknown
) -> None:
    unknown = own_items.filter(pa.array(~is_known))
    distinct = unknown.unique()
    told = (
        f"{len(unknown):,} of {len(own_items):,} events are of {len(distinct):,} items that are not among "
        f"the model's {num_items:,}, for example {distinct[:NUM_EXAMPLES].to_pylist()}"
    )
    if on_unknown == "raise":
        raise ValueError(f"{told}; leave them out, or give on_unknown='warn' or 'ignore'")
    warnings.warn(f"{told}; they are left out", stacklevel=4)


def _tell_lost(user_ids: pa.Array, lengths: np.ndarray) -> None:
    lost = user_ids.filter(pa.array(lengths == 0))
    warnings.warn(
        f"{len(lost):,} of {len(user_ids):,} users have no event of a known item and get no rows, for "
        f"example {lost[:NUM_EXAMPLES].to_pylist()}",
        stacklevel=4,
    )
