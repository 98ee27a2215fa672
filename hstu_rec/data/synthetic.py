"""Made events with a planted rule, for the demonstration and for tests with a known answer.

Each item has one successor, and following successors visits the whole catalogue before it returns:

    item[t + 1] = rule[item[t]]         with probability rule_share
                  a draw by popularity  otherwise (Zipf, as the first item of every user)
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_rec.data.prepare import PrepareConfig, prepare
from hstu_rec.data.stream import DataConfig

SHORTEST = 3
FIRST_DAY_S = 1_577_836_800  # 2020-01-01
STARTING_SPAN_S = 2 * 365 * 86_400
DEMO_USERS, DEMO_ITEMS, DEMO_SEED = 4_000, 600, 7


def make_events(
    num_users: int,
    num_items: int,
    seed: int,
    *,
    mean_length: float = 12.0,
    rule_share: float = 0.8,
    zipf_exponent: float = 1.0,
    shuffled: bool = False,
) -> pa.Table:
    """Events (user_id string, item_id string, timestamp int64 unix s), user by user in time order.

    A user has at least 3 events. `shuffled` deals the items out again over all events: the same
    popularity, no rule. Raises ValueError for sizes that make no events.
    """
    if num_users < 1 or num_items < 2 or mean_length <= SHORTEST or not 0 <= rule_share <= 1:
        raise ValueError(
            "need num_users >= 1, num_items >= 2, mean_length > 3 and rule_share in [0, 1]; got "
            f"{num_users}, {num_items}, {mean_length}, {rule_share}"
        )
    rule, popularity = planted_rule(num_items, seed, zipf_exponent)
    random = np.random.default_rng([seed, 1])
    lengths = SHORTEST - 1 + random.geometric(1 / (mean_length - SHORTEST + 1), num_users)
    starts = np.cumsum(lengths) - lengths
    items = random.choice(num_items, lengths.sum(), p=popularity)
    has_rule = random.random(len(items)) < rule_share
    for step in range(1, lengths.max()):
        rows = starts[lengths > step] + step
        rows = rows[has_rule[rows]]
        items[rows] = rule[items[rows - 1]]
    if shuffled:
        items = random.permutation(items)
    users = np.repeat(np.arange(num_users), lengths)
    return event_table(users, item_names(num_items)[items], _timestamps(random, starts, lengths))


def item_names(num_items: int) -> np.ndarray:
    """Own ids of made items, by index."""
    return np.array([f"i{item:07d}" for item in range(num_items)])


def event_table(users: np.ndarray, items: np.ndarray, timestamps: np.ndarray) -> pa.Table:
    """Events (user_id string, item_id string, timestamp int64 s) of users by number and items by own id."""
    user_names = np.array([f"u{user:07d}" for user in range(int(users.max()) + 1)])
    return pa.table(
        {
            "user_id": pa.array(user_names[users]),
            "item_id": pa.array(items),
            "timestamp": pa.array(timestamps),
        }
    )


def with_planted_rule(
    num_users: int, num_items: int, seed: int, *, shuffled: bool = False
) -> pa.Table:
    """Events that always follow the rule (best Recall@1 is 1), or shuffled the same without one."""
    return make_events(num_users, num_items, seed, rule_share=1.0, shuffled=shuffled)


def planted_rule(
    num_items: int, seed: int, zipf_exponent: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """(rule int64 [N]: successor of each item, popularity float64 [N]: sum 1) of `make_events`."""
    random = np.random.default_rng([seed, 0])
    cycle = random.permutation(num_items)
    rule = np.empty(num_items, dtype=np.int64)
    rule[cycle] = np.roll(cycle, -1)
    popularity = 1.0 / np.arange(1, num_items + 1) ** zipf_exponent
    return rule, random.permutation(popularity / popularity.sum())


def best_recall_at_1(
    num_items: int, seed: int, *, rule_share: float = 0.8, zipf_exponent: float = 1.0
) -> float:
    """The Recall@1 of who knows rule and popularity, seen items allowed; nothing can be better.

    sum_i pi_i max_j (rule_share [j = rule_i] + (1 - rule_share) popularity_j), where pi is how
    often an item is the last one of a long history. For a rule_share of 0.8 a little above 0.8.
    """
    rule, popularity = planted_rule(num_items, seed, zipf_exponent)
    last = popularity
    for _ in range(1000):
        following = (1 - rule_share) * popularity
        following[rule] += rule_share * last
        last = following
    follow_rule = rule_share + (1 - rule_share) * popularity[rule]
    return float(last @ np.maximum(follow_rule, (1 - rule_share) * popularity.max()))


def prepare_demo(path: str | Path) -> None:
    """Makes the demonstration's dataset folder at `path` unless it is there; every time the same.

    Safe when several processes call it at once: whoever is first makes the folder appear.
    Raises ValueError when something else is at `path`.
    """
    path = Path(path)
    if _is_dataset(path):
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "events.parquet"
        pq.write_table(make_events(DEMO_USERS, DEMO_ITEMS, DEMO_SEED), source)
        try:
            prepare(PrepareConfig(), source, path)
        except ValueError:
            if not _is_dataset(path):
                raise


def prepare_if_demo(path: str) -> None:
    """`prepare_demo` when `path` is the default of data.path."""
    if path == DataConfig().path:
        prepare_demo(path)


def _is_dataset(path: Path) -> bool:
    return (path / "stats.json").is_file()


def _timestamps(random: np.random.Generator, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [T] unix s, rising within a user: sessions of minutes with days between them."""
    num_events = int(lengths.sum())
    minutes = random.lognormal(np.log(120), 1.0, num_events)
    days = random.lognormal(np.log(6 * 86_400), 1.0, num_events)
    gaps = np.where(random.random(num_events) < 0.6, minutes, days).astype(np.int64) + 1
    gaps[starts] = 0
    elapsed = np.cumsum(gaps)
    elapsed -= np.repeat(elapsed[starts], lengths)
    begins = FIRST_DAY_S + random.integers(0, STARTING_SPAN_S, len(lengths))
    return elapsed + np.repeat(begins, lengths)
