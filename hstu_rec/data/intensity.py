"""Made events in which counts decide, not shares alone: what sums can see and averages cannot (intensity).

Two kinds, after the claim of arXiv 2402.17152, section 3.2, that the number of earlier events is lost in
softmax attention. The definitions are this module's own. Both know their best possible result.

    dirichlet_events   a Pitman-Yor process a user (discount 0: Dirichlet process) over a growing catalogue
    counting_events    two kinds of users with the same shares of items, told apart by a count alone
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from hstu_rec.data.synthetic import FIRST_DAY_S, event_table, names
from hstu_rec.settings import above, at_least, within

DAY_S = 86_400
MARKER, FILLER, QUERY = "marker", "filler", "query"
# Days before which the validation answers and the test answers of `counting_events` do not come.
COUNTING_DAYS = (100, 200)


@dataclass(frozen=True, kw_only=True)
class DirichletConfig:
    """The process of `dirichlet_events`."""

    num_users: int = 4000
    """Users, who arrive one a minute."""
    num_items: int = 300
    """Items born by the end."""
    initial_share: float = 0.4
    """Share of the items that are there from the start; the others are born evenly over the users."""
    alpha: float = 30.0
    """Concentration: how many events outweigh the taste that all users share."""
    discount: float = 0.0
    """Taken off every count, in [0, 1); new items are likelier by as much."""
    zipf_exponent: float = 1.0
    """Popularity of the item of rank r is in proportion to r ** -this; ranks are drawn, not by birth."""
    shortest: int = 4
    """Fewest events of a user."""
    longest: int = 100
    """Most events; the logarithm of the length is uniform between the two."""
    seed: int = 7
    """Seed of everything."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "num_users") + at_least(self, 0, "zipf_exponent", "seed")
        found += within(self, "(0, 1]", "initial_share") + above(self, 0, "alpha")
        found += within(self, "[0, 1)", "discount")
        if not 3 <= self.shortest <= self.longest:
            found.append(f"need 3 <= shortest <= longest; got {self.shortest} and {self.longest}")
        if self.num_items * self.initial_share < self.longest + 1:
            found.append(
                "num_items * initial_share must be above longest, so that a new item is always left; "
                f"got {self.num_items} * {self.initial_share} and {self.longest}"
            )
        return found


@dataclass(frozen=True)
class Histories:
    """Users' items as a padded block."""

    items: np.ndarray  # int64 [U, longest], valid before lengths
    lengths: np.ndarray  # int64 [U]
    born: np.ndarray  # int64 [U]: items 0 .. born - 1 are there for that user
    popularity: np.ndarray  # float64 [N], sum 1


def dirichlet_histories(config: DirichletConfig) -> Histories:
    """Sequences of a Dirichlet process a user over the items born before the user arrived.

    After n events, of which c_i were item i and K items were different, the next event is

        item i, seen before   with probability  (c_i - d) / (n + alpha)
        item i, new, born     with probability  (alpha + d K) / (n + alpha)  *  p_i / sum of p over new, born

    where d is the discount and p the popularity. With d = 0 an event after n is new with probability
    alpha / (alpha + n). User u of U sees N (s + (1 - s) u / U) items, s being the initial share.
    Raises ValueError with every problem of `config`.
    """
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    random = np.random.default_rng([config.seed, 2])
    users = np.arange(config.num_users)
    share = config.initial_share + (1 - config.initial_share) * users / config.num_users
    born = np.maximum((config.num_items * share).astype(np.int64), 1)
    popularity = random.permutation(np.arange(1, config.num_items + 1.0) ** -config.zipf_exponent)
    popularity /= popularity.sum()
    spread = np.log((config.longest + 1) / config.shortest)
    lengths = config.shortest * np.exp(spread * random.random(config.num_users))
    lengths = np.minimum(lengths.astype(np.int64), config.longest)
    items = np.full((config.num_users, config.longest), -1)
    is_first = np.zeros((config.num_users, config.longest), dtype=bool)
    distinct = np.zeros(config.num_users)
    cumulative = np.cumsum(popularity)
    for n in range(config.longest):
        rows = np.flatnonzero(lengths > n)
        weight = config.alpha + config.discount * distinct[rows]
        is_new = random.random(len(rows)) * (n + config.alpha) < weight
        new, old = rows[is_new], rows[~is_new]
        items[new, n] = _draw_new(random, items[new, :n], cumulative, cumulative[born[new] - 1])
        items[old, n] = _draw_seen(random, items[old, :n], is_first[old, :n], config.discount)
        is_first[new, n] = True
        distinct[new] += 1
    return Histories(items, lengths, born, popularity)


def dirichlet_events(config: DirichletConfig) -> pa.Table:
    """The sequences of `dirichlet_histories` as events (user_id, item_id string, timestamp s)."""
    made = dirichlet_histories(config)
    user = np.repeat(np.arange(len(made.lengths)), made.lengths)
    place = np.arange(len(user)) - np.repeat(np.cumsum(made.lengths) - made.lengths, made.lengths)
    items = names("i", made.items[user, place], config.num_items)
    users = names("u", user, config.num_users)
    return event_table(users, items, FIRST_DAY_S + 60 * user + place)


def best_recall(config: DirichletConfig, k: int) -> dict[str, float]:
    """Expected Recall@k, seen items allowed, of users' last events for rankers that know the process.

    "counts" ranks by the true probabilities: nothing is better. "shares" ranks by the same formula with
    every count scaled to one history length, the best of many: it knows p, alpha and the shares c_i / n,
    but not how many events there were. "popularity" ranks all born items by p.
    """
    made = dirichlet_histories(config)
    lengths = np.unique(np.geomspace(1, config.longest, 30).astype(int))
    sums = {"counts": 0.0, "popularity": 0.0}
    by_length = np.zeros(len(lengths))
    for items, length, born in zip(made.items, made.lengths - 1, made.born, strict=True):
        counts = np.bincount(items[:length], minlength=born).astype(float)
        popularity = made.popularity[:born]
        truth = next_probabilities(counts, popularity, config)
        sums["counts"] += float(np.partition(truth, -k)[-k:].sum())
        sums["popularity"] += float(truth[np.argpartition(popularity, -k)[-k:]].sum())
        for index, pretended in enumerate(lengths):
            guess = next_probabilities(counts * pretended / length, popularity, config)
            by_length[index] += truth[np.argpartition(guess, -k)[-k:]].sum()
    return {
        "counts": sums["counts"] / config.num_users,
        "shares": float(by_length.max()) / config.num_users,
        "popularity": sums["popularity"] / config.num_users,
    }


def next_probabilities(
    counts: np.ndarray, popularity: np.ndarray, config: DirichletConfig
) -> np.ndarray:
    """float64 [born]: the probability of each item as the next; the formula of `dirichlet_histories`."""
    is_seen = counts > 0
    mass = config.alpha + config.discount * is_seen.sum()
    unseen = np.where(is_seen, 0.0, popularity)
    scores = np.where(is_seen, counts - config.discount, mass * unseen / unseen.sum())
    return scores / (counts.sum() + config.alpha)


@dataclass(frozen=True, kw_only=True)
class CountingConfig:
    """The users of `counting_events`."""

    num_users: int = 6000
    """Users: 60 % to train, 20 % for validation, 20 % for test."""
    threshold: int = 6
    """k: the answer tells whether there were more than k markers, of 1 to 2 k."""
    fillers_per_marker: int = 2
    """Filler events for each marker: the same share of markers in every history."""
    num_answers: int = 8
    """Items of each of the two groups of answers; with marker and filler a group fills a top 10."""
    has_query: bool = False
    """Whether an item of its own, once in every history, stands between history and answer."""
    seed: int = 7
    """Seed of everything."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 10, "num_users") + at_least(self, 0, "seed")
        return found + at_least(self, 1, "threshold", "fillers_per_marker", "num_answers")


def counting_events(config: CountingConfig) -> pa.Table:
    """Events (user_id, item_id string, timestamp s) whose last item is decided by a count alone.

        m ~ uniform on 1 .. 2 k;  history: m markers and f m fillers in random order, then the query if any
        answer: uniform on group "low" if m <= k, on group "high" otherwise

    The answer's group is all that can be known, and a count alone tells it: the share of markers is
    1 / (1 + f) in every history. Histories begin on 2020-01-01 and end long before day COUNTING_DAYS[0]
    of the answers of validation users; those of test users come on day COUNTING_DAYS[1]. Prepare with
    split=time valid_time=2020-02-01 test_time=2020-06-01.
    """
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    random = np.random.default_rng([config.seed, 3])
    tables = []
    markers = random.integers(1, 2 * config.threshold + 1, config.num_users)
    lengths = markers * (1 + config.fillers_per_marker)
    user = np.repeat(np.arange(config.num_users), lengths)
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(user)) - starts[user]
    order = np.lexsort((random.random(len(user)), user))
    items = np.where(place < markers[user], MARKER, FILLER)[order]
    tables.append((user, items, FIRST_DAY_S + 60 * place))
    everyone = np.arange(config.num_users)
    if config.has_query:
        tables.append((everyone, np.full(len(everyone), QUERY), FIRST_DAY_S + 60 * lengths))
    group = np.where(markers > config.threshold, "high", "low")
    one = random.integers(0, config.num_answers, config.num_users)
    answers = np.char.add(group, np.char.zfill(one.astype(str), 3))
    part = random.permutation(everyone) * 5 // config.num_users  # 0 .. 4: train, and last two
    day = np.array([0, 0, 0, *COUNTING_DAYS])[part]
    tables.append((everyone, answers, FIRST_DAY_S + DAY_S * day + 60 * (lengths + 1)))
    user, items, times = (np.concatenate(column) for column in zip(*tables, strict=True))
    order = np.lexsort((times, user))
    return event_table(names("u", user[order], config.num_users), items[order], times[order])


def best_counting_recall(config: CountingConfig, k: int) -> dict[str, float]:
    """Expected Recall@k on `counting_events`, of who knows "counts" and of who knows "shares" alone.

    Without a query the history does not tell that it ended: marker and filler are likelier than any one
    answer and take two of the k places. The rest hold answers of the right group, or of both.
    """
    places = k if config.has_query else max(k - 2, 0)
    groups = {"counts": 1, "shares": 2}
    return {what: min(1.0, places / (n * config.num_answers)) for what, n in groups.items()}


def _draw_new(
    random: np.random.Generator, seen: np.ndarray, cumulative: np.ndarray, total: np.ndarray
) -> np.ndarray:
    """int64 [R]: by popularity among the born items that are not in `seen` [R, n]; total [R]: their sum."""
    drawn = np.full(len(seen), -1)
    waiting = np.arange(len(seen))
    while len(waiting):
        drawn[waiting] = np.searchsorted(
            cumulative, random.random(len(waiting)) * total[waiting], side="right"
        )
        waiting = waiting[(seen[waiting] == drawn[waiting, None]).any(1)]
    return drawn


def _draw_seen(
    random: np.random.Generator, seen: np.ndarray, is_first: np.ndarray, discount: float
) -> np.ndarray:
    """int64 [R]: item i of `seen` [R, n] in proportion to its count less the discount."""
    place = np.zeros(len(seen), dtype=np.int64)
    waiting = np.arange(len(seen))
    while len(waiting):
        place[waiting] = random.integers(0, seen.shape[1], len(waiting))
        # A first event stands for 1 - discount, a repeat for 1.
        is_off = random.random(len(waiting)) < discount
        waiting = waiting[is_first[waiting, place[waiting]] & is_off]
    return seen[np.arange(len(seen)), place]
