"""A prepared dataset folder, memory-mapped: only what a batch needs is read.

items.parquet   one row an item    item_id | index | count | train_count [| title]
counts.arrow    one row an item    train_count (by index) | by_train_count (indices, rarest first)
users.arrow     one row a user     user_id | start | length | train_end | valid_end
events.arrow    user after user    item | timestamp        (record batches of 2**22 rows)
features.arrow  user after user    prepare's feature_columns, if any (likewise)

     user 0                user 1
|<-- length[0] -->|<------- length[1] ------->|
[ e e e e e  v  t | e e e e e e e e e  v  t   | ...
  train_end--^  ^--valid_end
"""

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as _compute
import pyarrow.parquet as pq

from hstu_rec.data.mapped import OpenFiles, open_arrow, views, whole
from hstu_rec.durable import digest_of

pc: Any = _compute  # its functions are made when it is imported

FORMAT_VERSION = 3
EVENT_CHUNK_ROWS = 2**22
ITEMS, SEQUENCES = "items.parquet", "sequences.parquet"
MAPPED = ("counts.arrow", "users.arrow", "events.arrow")
FEATURES = "features.arrow"
MAX_ITEMS = 2**31 - 1
# Times are unix seconds below this, in the year 5138.
LATEST_S = 10**11
# Of a parquet file, what its fingerprint is of.
END_BYTES = 2**16
FILES = (ITEMS, *MAPPED, "stats.json")


def schema_of_features(names: list[str]) -> pa.Schema:
    """Of features.arrow."""
    return pa.schema([(name, pa.float32()) for name in names])


def parts(path: Path) -> list[Path]:
    """The parquet files of a file or a folder, sorted; as Spark leaves them, also in subfolders."""
    if path.is_file():
        return [path]
    return sorted(
        found
        for found in path.rglob("*.parquet")
        if found.is_file()
        and not any(name.startswith((".", "_")) for name in found.relative_to(path).parts)
    )


def fingerprint(path: Path) -> dict[str, str]:
    """Size and SHA-256 of the end of each of a dataset folder's parquet files, by name.

    Its end holds a parquet file's table of contents, with statistics: read in no time, and other for other
    rows, in all likelihood.
    """
    found = {}
    for file in [*parts(path / ITEMS), *parts(path / SEQUENCES)]:
        with file.open("rb") as content:
            size = content.seek(0, os.SEEK_END)
            content.seek(max(size - END_BYTES, 0))
            digest = hashlib.sha256(content.read()).hexdigest()
        found[str(file.relative_to(path))] = f"{size} {digest}"
    return found


def read_stats(path: Path) -> dict[str, Any]:
    """stats.json of a folder that has all FILES.

    Raises FileNotFoundError when files are missing, ValueError when another version wrote them.
    """
    missing = [name for name in FILES if not (path / name).exists()]
    try:
        stats = {} if "stats.json" in missing else json.loads((path / "stats.json").read_text())
        if stats.get("features") and not (path / FEATURES).exists():
            missing.append(FEATURES)
    except ValueError as error:
        raise ValueError(
            f"{path}/stats.json is damaged ({error}); prepare the dataset again"
        ) from error
    if stats and stats.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}/stats.json has format_version {stats.get('format_version')}, "
            f"this version reads {FORMAT_VERSION}; prepare the dataset again"
        )
    if missing and (path / SEQUENCES).exists():
        raise FileNotFoundError(
            f"data.path: {path} has {SEQUENCES} but not yet {', '.join(missing)}; check the folder "
            f"and make them with: python apps/prepare.py check={path}"
        )
    if missing:
        raise FileNotFoundError(
            f"data.path: {path} is no prepared dataset ({', '.join(missing)} missing); "
            f"make one with: python apps/prepare.py INPUT {path}"
        )
    return stats


def check_fingerprint(path: Path, stats: dict[str, Any]) -> None:
    """Raises ValueError when parquet files are others than those that stats.json was made with."""
    if fingerprint(path) != stats.get("parquet"):
        how = f"check={path}" if (path / SEQUENCES).exists() else f"INPUT {path} overwrite=true"
        raise ValueError(
            f"{path}: its parquet files are not those that the mapped files were made with; make these "
            f"again with: python apps/prepare.py {how}"
        )


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of each of a folder's mapped files, by name."""
    names = [*MAPPED, *([FEATURES] if (path / FEATURES).exists() else [])]
    return {name: digest_of(path / name)["sha256"] for name in names}


class Dataset:
    """Users' event sequences of one prepared folder.

    train_counts: int64 [N], events of each item in the training part; items_by_count: int64 [N],
    indices of items by rising train count, ties by index. starts, lengths, train_ends, valid_ends:
    int64 [users]. All of them, and the events, are views of mapped files.

    Raises FileNotFoundError when `path` is no dataset folder, ValueError when another version wrote it, or
    its parquet files have changed since.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.stats = read_stats(self.path)
        check_fingerprint(self.path, self.stats)
        self.feature_names = [*self.stats.get("features", {})]
        names = [*MAPPED, *([FEATURES] if self.feature_names else [])]
        self._files = OpenFiles(self.path / name for name in names)
        users = open_arrow(self.path / "users.arrow")
        self._user_ids = users.column("user_id")
        self.starts, self.lengths, self.train_ends, self.valid_ends = (
            whole(self.path / "users.arrow", users, name)
            for name in ("start", "length", "train_end", "valid_end")
        )
        counts = open_arrow(self.path / "counts.arrow")
        self.train_counts, self.items_by_count = (
            whole(self.path / "counts.arrow", counts, name)
            for name in ("train_count", "by_train_count")
        )
        events = open_arrow(self.path / "events.arrow")
        self._items, self._timestamps = (views(events.column(n)) for n in ("item", "timestamp"))
        self.num_events = len(events)
        self._features = self._open_features()
        self.num_users = len(users)
        self.num_items = len(counts)
        found = {"users": self.num_users, "items": self.num_items, "events": self.num_events}
        for name, number in found.items():
            if self.stats[name] != number:
                raise ValueError(
                    f"{self.path}: stats.json tells of {self.stats[name]} {name}, the files hold "
                    f"{number}; prepare the dataset again"
                )
        self._check_users()

    @property
    def facts(self) -> dict[str, int | float | str]:
        """The statistics that are single values, and the split in words."""
        split = " ".join(str(value) for value in self.stats.get("split", {}).values())
        single = {k: v for k, v in self.stats.items() if isinstance(v, int | float | str)}
        return single | {"split": split}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What copies of the folder have in common: statistics, the hash of item ids, the files' content."""
        facts = {name: value for name, value in self.facts.items() if name != "prepare_s"}
        return facts | {"split": self.stats.get("split")} | self.stats["mapped"]

    @cached_property
    def item_ids(self) -> pa.ChunkedArray:
        """Own id of every item, by index; read from items.parquet, into memory."""
        files = [pq.ParquetFile(part) for part in parts(self.path / ITEMS)]
        items = pa.concat_tables([file.read(columns=["item_id", "index"]) for file in files])
        index = items.column("index").to_numpy()
        if (index == np.arange(len(index))).all():
            return items.column("item_id")
        return items.column("item_id").take(np.argsort(index))

    def labels(self, items: np.ndarray) -> list[dict[str, Any]]:
        """Own id of each, "item_id", and "title" where it has one; no more of the files is read than holds
        them."""
        wanted = pc.field("index").isin(pa.array(np.unique(items)))
        found: dict[int, dict[str, Any]] = {}
        for part in parts(self.path / ITEMS):
            names = [n for n in ("index", "item_id", "title") if n in pq.read_schema(part).names]
            table = pq.read_table(pa.OSFile(str(part)), columns=names, filters=wanted)
            for row in table.to_pylist():
                known = {name: value for name, value in row.items() if value is not None}
                found[known.pop("index")] = known
        return [found[item] for item in items.tolist()]

    @property
    def user_ids(self) -> pa.ChunkedArray:
        """Own id of every user, by index."""
        return self._user_ids

    def train_time_range(self) -> tuple[int, int]:
        """Times in s of the first and last training event. Raises ValueError when there is none."""
        users = np.flatnonzero(self.train_ends > 0)
        if not len(users):
            raise ValueError(
                f"{self.path}: no user has a training event; check the split of prepare"
            )
        ends = self.train_ends[users]
        first = _take(self._timestamps, self.starts[users])
        last = _take(self._timestamps, self.starts[users] + ends - 1)
        return int(first.min()), int(last.max())

    def gather(
        self, users: np.ndarray, begins: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Events [begins[b], ends[b]) of each user, as (items [T], timestamps [T] in s, offsets [B+1]).

        Positions count from the user's first event. All int64. Raises ValueError when a mapped file was cut,
        and for items and times that no prepared folder has.
        """
        self._files.check()
        rows, offsets = places_of(self.starts[users] + begins, ends - begins)
        items, timestamps = _take(self._items, rows), _take(self._timestamps, rows)
        self._check_range("item", items, self.num_items)
        self._check_range("timestamp", timestamps, LATEST_S)
        return items, timestamps, offsets

    def features(
        self, users: np.ndarray, begins: np.ndarray, ends: np.ndarray
    ) -> dict[str, np.ndarray]:
        """float32 [T] of each of `feature_names`, for the events that `gather` gives, NaN where an event has
        none; raises as it does."""
        self._files.check()
        rows, _ = places_of(self.starts[users] + begins, ends - begins)
        found = {name: _take(chunks, rows) for name, chunks in self._features.items()}
        facts = self.stats["features"] if found else {}
        for name, values in found.items():
            may_lack = facts[name].get("num_missing", 0) > 0
            is_odd = np.isinf(values) if may_lack else ~np.isfinite(values)
            if is_odd.any():
                self._refuse(FEATURES, f"column {name!r} holds NaN or infinity")
        return found

    def _open_features(self) -> dict[str, list[np.ndarray]]:
        if not self.feature_names:
            return {}
        table = open_arrow(self.path / FEATURES)
        if table.schema != schema_of_features(self.feature_names) or len(table) != self.num_events:
            self._refuse(
                FEATURES,
                f"it holds {len(table):,} rows of {table.schema.names}, {self.num_events:,} float32 rows of "
                f"{self.feature_names} are wanted",
            )
        return {name: views(table.column(name)) for name in self.feature_names}

    def _check_users(self) -> None:
        """Raises ValueError unless users' parts are those of all events, with their targets within."""
        ends = np.cumsum(self.lengths)
        is_sound = (
            (self.starts == ends - self.lengths) & (self.lengths > 0) & (self.train_ends >= 0)
        )
        is_sound &= (self.train_ends <= self.valid_ends) & (self.valid_ends <= self.lengths)
        is_sound[-1:] &= ends[-1:] == self.num_events
        if not is_sound.all():
            bad = np.flatnonzero(~is_sound)
            self._refuse(
                "users.arrow", f"{len(bad):,} rows are wrong, such as {(bad[:5] + 1).tolist()}"
            )

    def _check_range(self, name: str, values: np.ndarray, limit: int) -> None:
        if len(values) and (values.min() < 0 or values.max() >= limit):
            bad = values[(values < 0) | (values >= limit)]
            told = f"{len(bad):,} of {len(values):,} values of {name} are outside 0..{limit - 1}"
            self._refuse("events.arrow", f"{told}, such as {bad[:5].tolist()}")

    def _refuse(self, name: str, told: str) -> None:
        raise ValueError(
            f"{self.path / name} has been changed: {told}; prepare the dataset again, or look at all that "
            f"is wrong with: python apps/prepare.py check={self.path}"
        )


def by_count(train_counts: np.ndarray) -> np.ndarray:
    """int64 [N]: indices of items, the rarest in training first, ties by index."""
    return np.argsort(train_counts, kind="stable")


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """int64 [B + 1]: where each user's part of a jagged array begins, and the end, for parts of `counts`."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def places_of(begins: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [T]: begins[b], begins[b] + 1, .. of each part of `counts` [B], and their offsets [B + 1]."""
    offsets = offsets_of(counts)
    return np.repeat(begins - offsets[:-1], counts) + np.arange(offsets[-1]), offsets


def _take(chunks: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Values at global `rows` of a column whose chunks, but the last, hold EVENT_CHUNK_ROWS; integers as
    int64."""
    kind = chunks[0].dtype
    dtype = np.dtype(np.int64) if kind.kind == "i" else kind
    if len(chunks) == 1:
        return chunks[0][rows].astype(dtype)
    taken = np.empty(len(rows), dtype=dtype)
    chunk_of = rows // EVENT_CHUNK_ROWS
    for index in np.unique(chunk_of):
        here = chunk_of == index
        taken[here] = chunks[index][rows[here] - index * EVENT_CHUNK_ROWS]
    return taken
