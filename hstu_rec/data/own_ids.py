"""Own ids of items: what they were called before they were numbered, and which row each has."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as _compute

pc: Any = _compute  # its functions are made when it is imported


def hash_items(batches: Iterable[pa.Array]) -> str:
    """SHA-256 of the own ids in index order: equal hashes mean equal item maps."""
    lengths, values = hashlib.sha256(), hashlib.sha256()
    for ids in batches:
        if pa.types.is_integer(ids.type):
            values.update(np.ascontiguousarray(ids.to_numpy(), dtype="<i8").tobytes())
            continue
        raw = ids.cast(pa.large_binary())
        sizes = pc.binary_length(raw).to_numpy()
        lengths.update(np.ascontiguousarray(sizes, dtype="<i8").tobytes())
        values.update(b"".join(raw.to_pylist()))
    return hashlib.sha256(lengths.digest() + values.digest()).hexdigest()


def typed_ids(ids: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array of int64 or large_string. Raises ValueError for other types and nulls."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if isinstance(ids, pa.ChunkedArray):  # more text than one array of its type holds
        ids = ids.cast(pa.large_string()).combine_chunks()
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    is_text = pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)
    if not is_text and not pa.types.is_integer(ids.type):
        raise ValueError(f"ids must be integers or strings; got {ids.type}")
    if ids.null_count:
        raise ValueError(f"{ids.null_count:,} ids are null; leave such rows out")
    try:
        return ids.cast(pa.large_string() if is_text else pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(f"ids must be below 2^63; {error}") from error


def kind_of(ids: pa.Array) -> str:
    """What typed ids are, in words."""
    return "integers" if pa.types.is_integer(ids.type) else "strings"


class IdIndex:
    """Rows of items, or users, by own id, `ids` being those of rows 0, 1, ..., int64 or large_string.

    Raises ValueError for ids that are empty or in more rows than one.
    """

    def __init__(self, ids: pa.Array) -> None:
        self.ids = ids
        self._order = pc.sort_indices(ids)
        self._sorted = ids.take(self._order)
        is_again = pc.equal(self._sorted[1:], self._sorted[:-1])
        if num_again := pc.sum(is_again).as_py():
            first = self._sorted[1:].filter(is_again)[0].as_py()
            raise ValueError(f"{num_again:,} ids are in more rows than one, such as {first!r}")
        if len(ids) and self._sorted[0].as_py() == "":
            raise ValueError(f"the id of row {self._order[0]} is empty")

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: pa.Array) -> np.ndarray:
        """int64 [n] rows of ids of the same type, -1 for unknown ones."""
        if not len(self) or not len(ids):
            return np.full(len(ids), -1, dtype=np.int64)
        place = np.minimum(pc.search_sorted(self._sorted, ids).to_numpy(), len(self) - 1)
        is_known = pc.equal(self._sorted.take(pa.array(place)), ids)
        row = self._order.take(pa.array(place)).to_numpy().astype(np.int64)
        return np.where(is_known.to_numpy(zero_copy_only=False), row, -1)
