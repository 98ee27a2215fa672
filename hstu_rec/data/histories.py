"""Events in own ids as users' histories: what is given when recommendations are asked for.

user_id  item_id  timestamp          users: b a      items (rows)  7 2 7 | 5      offsets  0 3 4
b        "y"      12                 "y" is row 7, "x" row 2, "z" row 5, "?" unknown
b        "x"      12       -->
a        "z"      99
b        "y"      34
a        "?"      11
"""

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from hstu_rec.data.dataset import LATEST_S, offsets_of
from hstu_rec.data.own_ids import IdIndex, kind_of, typed_ids
from hstu_rec.data.tables import COLUMNS, arrow_of

# A table: of pandas, polars or Arrow, or columns by name, each a list, a numpy or an arrow array.
Events = Any
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


def read_histories(events: Events, index: IdIndex, on_unknown: OnUnknown = "warn") -> Histories:
    """The histories that `events` tell: columns user_id (integers or strings), item_id (as in `index`) and
    timestamp (unix time, timestamps or ISO text), rows in any order; further columns are not read.

    Events of unknown items are left out, with a warning, or not at all: ValueError, by `on_unknown`; of
    users without a known event there is always a warning. Raises ValueError for columns of other types or
    with nulls, and times that are no seconds.
    """
    columns = _columns(events)
    users, own_items = (ids_of(columns[name], name) for name in ("user_id", "item_id"))
    times = seconds_of(columns["timestamp"])
    items = _rows(own_items, index, ("item_id", "events", "items"), on_unknown)
    is_known = items >= 0
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


def rows_of(
    ids: Any, index: IdIndex, what: str, on_unknown: OnUnknown, kind: str = "items"
) -> np.ndarray:
    """int64 [n] rows of own ids, a list or an array of numpy or Arrow; unknown ones are left out, with a
    warning, or not at all: ValueError, by `on_unknown`."""
    if isinstance(ids, str | bytes) or not hasattr(ids, "__len__"):
        raise ValueError(f"{what} must be a list or an array of own ids; got {ids!r}")
    column = _array(ids, f"{what} must be own ids, all integers or all strings")
    rows = _rows(ids_of(column, what), index, (what, what, kind), on_unknown)
    return rows[rows >= 0]


def seconds_of(times: Any) -> np.ndarray:
    """int64 [n] unix seconds of times, a list or an array of numpy or Arrow: whole numbers, also as text, in
    s, ms, us or ns, which their size tells; timestamps and dates; ISO text. What has no zone is UTC.

    Raises ValueError for others, nulls, several units, and times that are no seconds from 1970 on.
    """
    column = _array(times, "timestamps must be unix times or ISO text")
    if not len(column):
        return np.zeros(0, dtype=np.int64)
    if column.null_count:
        raise ValueError(
            f"timestamp must be without nulls; got {column.type}, {column.null_count:,} nulls"
        )
    with contextlib.suppress(pa.ArrowException):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = column.cast(pa.int64())
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return _in_seconds(column.to_numpy())
    moments = _moments(column)
    return _checked(
        moments.cast(pa.timestamp("s", tz=moments.type.tz), safe=False).cast(pa.int64()).to_numpy()
    )


def _array(values: Any, wanted: str) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{wanted}: {error}") from error


def _rows(
    own: pa.Array, index: IdIndex, names: tuple[str, str, str], on_unknown: OnUnknown
) -> np.ndarray:
    """int64 [n] rows of typed ids, -1 for unknown ones, which are told or refused.

    names: of the ids, of what has them, and of whose they are.
    """
    if on_unknown not in get_args(OnUnknown):
        allowed = ", ".join(get_args(OnUnknown))
        raise ValueError(f"on_unknown must be one of {allowed}; got {on_unknown!r}")
    if len(own) and own.type != index.ids.type:
        raise ValueError(
            f"{names[0]} holds {kind_of(own)}, the model's {names[2]} are {kind_of(index.ids)}, such as "
            f"{index.ids[0].as_py()!r}; give the ids that it was trained on"
        )
    rows = index.rows(own.cast(index.ids.type))
    if (rows < 0).any() and on_unknown != "ignore":
        _tell_unknown(own, rows >= 0, names, len(index), on_unknown)
    return rows


def _columns(events: Events) -> pa.Table:
    table = arrow_of(events)
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise ValueError(
            f"events need the columns {', '.join(COLUMNS)}; {', '.join(missing)} missing, there are "
            f"{', '.join(table.column_names) or 'none'}"
        )
    return table


def ids_of(column: pa.Array | pa.ChunkedArray, name: str) -> pa.Array:
    """Typed ids of a column, int64 of an empty one; whole floats, as pandas makes of integers beside a NaN,
    are integers. Raises ValueError, with its name, for what is none."""
    if not len(column):
        return pa.array([], pa.int64())
    is_float = pa.types.is_float32(column.type) or pa.types.is_float64(column.type)
    try:
        return _whole(column) if is_float else typed_ids(column)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _whole(ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Floats as integers. Raises ValueError where they hold none exactly."""
    if ids.null_count:
        raise ValueError(f"{ids.null_count:,} ids are null; leave such rows out")
    values = np.asarray(ids)
    largest = 2**24 if ids.type == pa.float32() else 2**53
    is_exact = (np.abs(values) <= largest) & (values == np.floor(values))
    if not is_exact.all():
        bad = values[~is_exact]
        raise ValueError(
            f"{len(bad):,} ids are floats that are no whole numbers, or too large to be exact, such as "
            f"{bad[0]}; give integers or strings"
        )
    return pa.array(values.astype(np.int64))


def _moments(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    if pa.types.is_timestamp(column.type):
        return column
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if is_text or pa.types.is_date(column.type):
        for zone in (None, "UTC"):  # text that names none, text that does
            with contextlib.suppress(pa.ArrowException):
                return column.cast(pa.timestamp("us", tz=zone))
    told = f", such as {column[0].as_py()!r}" if is_text else ""
    raise ValueError(
        "timestamp must be integers (unix time in s, ms, us or ns), timestamps, dates or ISO text; got "
        f"{column.type}{told}"
    )


def _in_seconds(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{bad:,} timestamps are NaN or infinite; leave such rows out")
    largest, ticks = values.max(), 1
    while largest / ticks >= LATEST_S and ticks < 10**9:
        ticks *= 1000
    if ticks > 1 and values.min() < LATEST_S * (ticks // 1000):
        raise ValueError(
            f"timestamps are of several units, from {values.min()} to {largest}; give all of them in s, ms, "
            "us or ns"
        )
    return _checked(np.floor_divide(values, ticks).astype(np.int64))


def _checked(seconds: np.ndarray) -> np.ndarray:
    is_outside = (seconds < 0) | (seconds >= LATEST_S)
    if is_outside.any():
        raise ValueError(
            f"{int(is_outside.sum()):,} timestamps are outside 0..{LATEST_S - 1} s, such as "
            f"{seconds[is_outside][0]}; give times from 1970 on"
        )
    return seconds


def _tell_unknown(
    own: pa.Array,
    is_known: np.ndarray,
    names: tuple[str, str, str],
    num_known: int,
    on_unknown: OnUnknown,
) -> None:
    unknown = own.filter(pa.array(~is_known))
    distinct = unknown.unique()
    told = (
        f"{len(unknown):,} of {len(own):,} {names[1]} are of {len(distinct):,} {names[2]} that are not among "
        f"the model's {num_known:,}, for example {distinct[:NUM_EXAMPLES].to_pylist()}"
    )
    if on_unknown == "raise":
        raise ValueError(f"{told}; leave them out, or give on_unknown='warn' or 'ignore'")
    warnings.warn(f"{told}; they are left out", stacklevel=5)


def _tell_lost(user_ids: pa.Array, lengths: np.ndarray) -> None:
    lost = user_ids.filter(pa.array(lengths == 0))
    warnings.warn(
        f"{len(lost):,} of {len(user_ids):,} users have no event of a known item and get no rows, for "
        f"example {lost[:NUM_EXAMPLES].to_pylist()}",
        stacklevel=4,
    )
