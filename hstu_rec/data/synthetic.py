"""A made catalogue of any size, with a planted rule and a known best result: data.path=synthetic.

    item[0]     = a draw by popularity
    item[t + 1] = successor of item[t]   with probability rule_share
                  a draw by popularity   otherwise

Following successors visits the whole catalogue before it returns. Every number is a function of (seed, user,
position), so that any window of any history is made alone, a batch at a time, equal on all ranks; nothing is
of the catalogue's size. A length is floor(x), where x in [shortest, longest + 1) has a density in proportion
to x ** -length_exponent.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hstu_rec import distributed, tracking
from hstu_rec.data.dataset import MAX_ITEMS, by_count, offsets_of
from hstu_rec.data.hashes import mixed, stream, uniform
from hstu_rec.data.zipf_catalogue import PowerLaw, ZipfCatalogue
from hstu_rec.settings import at_least, within

SYNTHETIC = "synthetic"
MAX_LENGTH = 2**24
CHUNK_EVENTS = 2**19

FIRST_DAY_S = 1_577_836_800  # 2020-01-01
STARTING_SPAN_S = 2 * 365 * 86_400
# Sessions of 8 events, each within 2 minutes of its own, begin within 2**17 s of every third day.
EVENT_S, SESSION_S, SESSION_EVENTS_LOG2, JITTER_LOG2 = 120, 3 * 86_400, 3, 17


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """A made catalogue and its users."""

    num_users: int = 4000
    """Users."""
    num_items: int = 600
    """Items of the catalogue."""
    shortest: int = 3
    """Fewest events of a user."""
    longest: int = 30
    """Most events of a user."""
    length_exponent: float = 1.0
    """Lengths n are likely in proportion to n ** -this; 0 for all alike."""
    rule_share: float = 0.8
    """Probability that an event follows the rule; the others are drawn by popularity."""
    zipf_exponent: float = 1.0
    """Popularity of the item of rank r is about in proportion to (r + 1) ** -this."""
    own_ids: Literal["integer", "string"] = "integer"
    """Own ids of users and items: their numbers, or strings such as u0000012 and i0000345."""
    seed: int = 7
    """Seed of everything."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "num_users")
        if not 1 <= self.num_items <= MAX_ITEMS:
            found.append(f"num_items must be in 1..{MAX_ITEMS}; got {self.num_items}")
        if not 3 <= self.shortest <= self.longest <= MAX_LENGTH:
            found.append(
                f"need 3 <= shortest <= longest <= {MAX_LENGTH}; got {self.shortest} and {self.longest}"
            )
        found += within(self, "[0, inf)", "length_exponent", "zipf_exponent")
        found += within(self, "[0, 1]", "rule_share")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed must be in 0..{2**63 - 1}; got {self.seed}")
        return found


class SyntheticDataset:
    """The interface of `Dataset`, made on the fly, divided by leave-one-out. It holds users' lengths.

    Raises ValueError with every problem of `config`.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config, self.path = config, Path(SYNTHETIC)
        self.catalogue = ZipfCatalogue(config.num_items, config.zipf_exponent, config.seed)
        self.num_users, self.num_items = config.num_users, config.num_items
        self._seeds = {use: stream(config.seed, use) for use in ("length", "begin", "events")}
        self.lengths = self._make_lengths()
        self.train_ends, self.valid_ends = self.lengths - 2, self.lengths - 1
        self.num_events = int(self.lengths.sum())

    def _make_lengths(self) -> np.ndarray:
        config = self.config
        law = PowerLaw(config.shortest, config.longest + 1, config.length_exponent)
        lengths = np.full(config.num_users, config.longest)
        if config.shortest < config.longest:
            for users in self.chunks():
                shares = uniform(mixed(self._seeds["length"], users))
                lengths[users] = np.minimum(law.at(shares), config.longest)
        return lengths

    def chunks(self) -> Iterator[np.ndarray]:
        """int64: all users, in order, in parts of at most CHUNK_EVENTS events (or one user)."""
        size = max(1, CHUNK_EVENTS // self.config.longest)
        for begin in range(0, self.num_users, size):
            yield np.arange(begin, min(begin + size, self.num_users))

    def told_chunks(self, what: str) -> Iterator[np.ndarray]:
        """`chunks`, with a bar on the main process where the work on them is long."""
        with tracking.bar(
            self.num_users,
            what,
            "user",
            is_shown=distributed.is_main(),
            after_s=tracking.BAR_AFTER_S,
        ) as bar:
            for users in self.chunks():
                yield users
                bar.update(len(users))

    @cached_property
    def stats(self) -> dict[str, Any]:
        """Statistics like those of a prepared folder, and the configuration."""
        made_of = asdict(self.config)
        return {
            "users": self.num_users,
            "items": self.num_items,
            "events": self.num_events,
            "length": {
                "mean": round(self.num_events / self.num_users, 3),
                "min": int(self.lengths.min()),
                "max": int(self.lengths.max()),
            },
            "density": self.num_events / (self.num_users * self.num_items),
            "valid_targets": self.num_users,
            "test_targets": self.num_users,
            "split": {"kind": "leave_one_out"},
            "item_map_hash": hashlib.sha256(repr(made_of).encode()).hexdigest(),
            "synthetic": made_of,
        }

    @property
    def facts(self) -> dict[str, int | float | str]:
        """The statistics that are single values."""
        return {k: v for k, v in self.stats.items() if isinstance(v, int | float | str)}

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it the same on two hosts."""
        return asdict(self.config)

    @property
    def item_ids(self) -> pa.ChunkedArray:
        """Own id of every item, by index."""
        return pa.chunked_array([self.own_item_ids(np.arange(self.num_items))])

    @property
    def user_ids(self) -> pa.ChunkedArray:
        """Own id of every user, by index."""
        return pa.chunked_array([self.own_user_ids(np.arange(self.num_users))])

    def own_item_ids(self, items: np.ndarray) -> pa.Array:
        """Own ids of these items."""
        has_names = self.config.own_ids == "string"
        return names("i", items, self.num_items) if has_names else pa.array(items)

    def labels(self, items: np.ndarray) -> list[dict[str, Any]]:
        """Own id of each, "item_id"."""
        return [{"item_id": own} for own in self.own_item_ids(items).to_pylist()]

    def own_user_ids(self, users: np.ndarray) -> pa.Array:
        """Own ids of these users."""
        has_names = self.config.own_ids == "string"
        return names("u", users, self.num_users) if has_names else pa.array(users)

    @cached_property
    def train_counts(self) -> np.ndarray:
        """int64 [N]: events of each item in the training part. All histories are made for it, once."""
        counts = np.zeros(self.num_items, dtype=np.int64)
        for users in self.told_chunks("counting items"):
            items, _, _ = self.gather(users, np.zeros_like(users), self.train_ends[users])
            np.add.at(counts, items, 1)
        return counts

    @cached_property
    def items_by_count(self) -> np.ndarray:
        """int64 [N]: items by rising count in the training part, equal ones by index."""
        return by_count(self.train_counts)

    def train_time_range(self) -> tuple[int, int]:
        """Times in s of the first and last training event."""
        first, last = [], []
        for users in self.chunks():
            ends = self.train_ends[users]
            _, begins_s, _ = self.gather(users, np.zeros_like(ends), np.ones_like(ends))
            _, ends_s, _ = self.gather(users, ends - 1, ends)
            first.append(begins_s.min())
            last.append(ends_s.max())
        return int(min(first)), int(max(last))

    def gather(
        self, users: np.ndarray, begins: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Events [begins[b], ends[b]) of each user, as (items [T], timestamps [T] in s, offsets [B+1]).

        Positions count from the user's first event. All int64.
        """
        counts = ends - begins
        offsets = offsets_of(counts)
        place = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], counts)
        keys = mixed(self._seeds["events"], users)
        bits = mixed(np.repeat(keys, counts), place)
        times = self._timestamps(users, counts, place, bits)
        return self._items(keys, offsets, place, bits), times, offsets

    def _items(
        self, keys: np.ndarray, offsets: np.ndarray, place: np.ndarray, bits: np.ndarray
    ) -> np.ndarray:
        """int64 [T] items: the rule leads from the last draw at or before each event to it."""
        windows = np.flatnonzero(np.diff(offsets))
        first = offsets[windows]
        is_start = self._is_drawn(bits, place)
        is_start[first] = True
        run = np.cumsum(is_start) - 1
        starts = np.flatnonzero(is_start)
        drawn_at, drawn_by = place[starts], bits[starts]
        # The last draw may be before the window.
        drawn_at[run[first]] = last = self._last_drawn(keys[windows], place[first])
        drawn_by[run[first]] = mixed(keys[windows], last)
        drawn = self.catalogue.items(self.catalogue.draw(mixed(drawn_by, np.zeros(1, np.int64))))
        origins = self.catalogue.successors(drawn, -drawn_at)
        return self.catalogue.successors(origins[run], place)

    def _is_drawn(self, bits: np.ndarray, place: np.ndarray) -> np.ndarray:
        """bool: events that are drawn by popularity; a user's first is."""
        # In 53 bits, so that a share of 1 is a number too.
        return ((bits >> np.uint64(11)) >= np.uint64(self.config.rule_share * 2**53)) | (place == 0)

    def _last_drawn(self, keys: np.ndarray, places: np.ndarray) -> np.ndarray:
        """int64 [B]: position of the last drawn event at or before `places` of each user."""
        found = np.zeros_like(places)
        if self.config.rule_share == 1:
            return found
        waiting, width = np.arange(len(places)), 8
        until = places
        while len(waiting):
            # Newest first; a column before the user's first event is clipped to it.
            seen = np.maximum(until[:, None] - np.arange(width), 0)
            is_drawn = self._is_drawn(mixed(keys[waiting, None], seen), seen)
            newest = is_drawn.argmax(1)
            is_found = is_drawn[np.arange(len(seen)), newest]
            found[waiting[is_found]] = seen[is_found, newest[is_found]]
            waiting, until = waiting[~is_found], until[~is_found] - width
            width *= 2
        return found

    def _timestamps(
        self, users: np.ndarray, counts: np.ndarray, place: np.ndarray, bits: np.ndarray
    ) -> np.ndarray:
        """int64 [T] unix s, rising within a user."""
        begin = mixed(self._seeds["begin"], users)
        begin_s = FIRST_DAY_S + (begin % np.uint64(STARTING_SPAN_S)).astype(np.int64)
        session = place >> SESSION_EVENTS_LOG2
        jitter = mixed(np.repeat(begin, counts), session) >> np.uint64(64 - JITTER_LOG2)
        # The lowest 11 bits decide nothing else.
        within_s = (bits & np.uint64(2**11 - 1)).astype(np.int64) * EVENT_S >> 11
        event_s = (place & (2**SESSION_EVENTS_LOG2 - 1)) * EVENT_S + within_s
        session_s = session * SESSION_S + jitter.astype(np.int64)
        return np.repeat(begin_s, counts) + session_s + event_s


def names(mark: str, numbers: np.ndarray, count: int) -> pa.Array:
    """Own ids string of numbers below `count`, such as i0000012, in the order of the numbers."""
    compute: Any = pc
    width = max(7, len(str(count - 1)))
    digits = compute.utf8_lpad(pa.array(numbers).cast(pa.string()), width, "0")
    return compute.binary_join_element_wise(mark, digits, "")


def event_table(users: Any, items: Any, timestamps: np.ndarray) -> pa.Table:
    """Events (user_id, item_id: own ids, timestamp int64 s)."""
    return pa.table({"user_id": users, "item_id": items, "timestamp": timestamps})


def event_tables(config: SyntheticConfig) -> Iterator[pa.Table]:
    """All events of `SyntheticDataset`, user by user in time order, some users at a time."""
    dataset = SyntheticDataset(config)
    for users in dataset.told_chunks("making events"):
        lengths = dataset.lengths[users]
        items, timestamps, _ = dataset.gather(users, np.zeros_like(users), lengths)
        owners = dataset.own_user_ids(np.repeat(users, lengths))
        yield event_table(owners, dataset.own_item_ids(items), timestamps)


def write_events(events: pa.Table | Iterable[pa.Table], path: str | Path) -> int:
    """Writes events, one table or at least one, as parquet, a table at a time; how many there were."""
    tables: Iterator[pa.Table] = iter([events] if isinstance(events, pa.Table) else events)
    table = next(tables)
    num_events = len(table)
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        for table in tables:
            writer.write_table(table)
            num_events += len(table)
    return num_events
