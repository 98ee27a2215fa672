"""What a model recommends to test users, exact over the sharded table: how much of the catalogue, how novel,
and some lists to look at.

    queries of all ranks  --all-gather-->  the best of every rank's own rows  --all-gather-->  the best of all
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu_rec import distributed, hosts, tracking
from hstu_rec.data.stream import EvalBatch, Sequences, eval_batches, eval_users
from hstu_rec.evaluator import EvalConfig, encoded, shard_of
from hstu_rec.model import NextItemModel
from hstu_rec.portions import Portion, agreed
from hstu_rec.scores import Catalogue, Seen, best_items
from hstu_rec.tracking import BAR_AFTER_S

# Items of a list.
NUM_LISTED = 10
# What is shown of an example.
NUM_SHOWN = 5


@dataclass(frozen=True)
class TopLists:
    """Lists of test users, seen items masked, the same on every rank."""

    users: np.ndarray
    """int64 [U], rising."""
    items: np.ndarray
    """int64 [U, NUM_LISTED], best first; -1 where no candidate is left."""


@torch.no_grad()
def top_lists(
    sharded: Any,
    dataset: Sequences,
    config: EvalConfig,
    device: torch.device,
    after_batch: Callable[[], None] = lambda: None,
) -> TopLists:
    """The best items for config.num_listed_users of the test users, evenly spaced among them, or for all.

    The score of a pair is that of `hstu_rec.ranking`; of equal scores the lower index comes first.
    Collective; `after_batch` as in `hstu_rec.evaluator.evaluate`. Raises, on all ranks, RankError for rows
    that are not finite and MemoryError when a single query does not fit.
    """
    model: NextItemModel = sharded.module
    num_users = len(eval_users(dataset, "test")[0])
    num_chosen = min(config.num_listed_users, num_users)
    places = np.arange(num_chosen) * num_users // num_chosen
    portion = Portion("eval.batch_users", config.batch_users, is_shared=True)
    longest = model.encoder.config.max_history_len
    was_training = sharded.training
    sharded.eval()
    try:
        finder = _Finder.of(sharded, model, dataset, device)
        users, items = [], []
        with tracking.bar(
            num_chosen, "listing", "user", is_shown=distributed.is_main(), after_s=BAR_AFTER_S
        ) as bar:
            for batch in eval_batches(dataset, "test", longest, config.batch_users, places):
                for found in portion.over(
                    config.batch_users, lambda part, batch=batch: finder.found(batch.part(part))
                ):
                    users.append(found[0])
                    items.append(found[1])
                    bar.update(len(found[0]))
                after_batch()
    finally:
        sharded.train(was_training)
    every, lists = torch.cat(users).numpy(), torch.cat(items).numpy()
    order = np.argsort(every)
    return TopLists(every[order], lists[order])


@dataclass(frozen=True)
class _Finder:
    """The rows of this rank, to find the best among those of all ranks."""

    model: NextItemModel
    catalogue: Catalogue
    device: torch.device

    @classmethod
    def of(
        cls, sharded: Any, model: NextItemModel, dataset: Sequences, device: torch.device
    ) -> "_Finder":
        shard = shard_of(sharded, model, dataset.num_items, device)
        catalogues: list[Catalogue] = []
        hosts.together(lambda: catalogues.append(Catalogue.of(shard)))
        return cls(model, catalogues[0], device)

    def found(self, batch: EvalBatch) -> tuple[Tensor, Tensor]:
        """(int64 [Q] users, int64 [Q, NUM_LISTED] items) of all ranks' batches, on CPU."""
        queries = encoded(self.model, batch, self.catalogue.shard, self.device)
        vectors = distributed.all_gather_rows(queries.vectors)
        seen = distributed.all_gather_rows(queries.seen_ids)
        num_seen = distributed.all_gather_rows(queries.seen_offsets.diff())
        owner = torch.repeat_interleave(
            torch.arange(len(num_seen), device=num_seen.device), num_seen
        )
        scores, items = agreed(lambda: self._own_best(vectors, owner, seen))
        # [ranks, Q, k] to [Q, ranks * k], by item, so that a stable sort leaves the lower one first.
        scores, items = (
            distributed.all_gather_stacked(one).transpose(0, 1).flatten(1)
            for one in (scores, items)
        )
        items, order = items.sort(dim=1)
        scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        items = items.gather(1, order).masked_fill(scores.isneginf(), -1)[:, :NUM_LISTED]
        users = distributed.all_gather_rows(torch.from_numpy(batch.users))
        return users, items.cpu()

    def _own_best(self, vectors: Tensor, owner: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """float64 and int64 [Q, NUM_LISTED]: the best scores and items of this rank; -inf for none."""
        shard, shape = self.catalogue.shard, (len(vectors), NUM_LISTED)
        scores = vectors.new_full(shape, -torch.inf, dtype=torch.float64)
        items = torch.zeros(shape, dtype=torch.int64, device=vectors.device)
        if len(shard.rows):
            place = seen - shard.first_id
            is_here = (place >= 0) & (place < len(shard.rows))
            masked = Seen(owner[is_here], place[is_here], -torch.inf)
            best, found = best_items(vectors, self.catalogue, NUM_LISTED, masked)
            scores[:, : best.shape[1]], items[:, : best.shape[1]] = best, found + shard.first_id
        return scores, items


def beyond_accuracy(lists: TopLists, dataset: Sequences) -> dict[str, Any]:
    """Coverage and novelty of the lists.

    coverage    the share of the catalogue that is in any of the lists; it grows with the number of users
    novelty     in bits, the mean over users of the mean over their list of -log2 p(i), where p(i) is the
                item's share of all training events: the mean self-information of Zhou et al. (PNAS 107, 2010,
                "Solving the apparent diversity-accuracy dilemma of recommender systems"), with events in
                place of users. An item that never occurs in training counts as one that occurs once.

    `target_novelty` is that of the same users' targets: what they went on to.
    """
    counts = np.maximum(dataset.train_counts, 1)
    surprise = math.log2(int(dataset.train_counts.sum())) - np.log2(counts)
    is_item = lists.items >= 0
    of_users = [
        float(surprise[items[here]].mean())
        for items, here in zip(lists.items, is_item, strict=True)
        if here.any()
    ]
    ends = dataset.valid_ends[lists.users]
    targets, _, _ = dataset.gather(lists.users, ends, ends + 1)
    num_covered = len(np.unique(lists.items[is_item]))
    return {
        "num_users": len(lists.users),
        "k": NUM_LISTED,
        "coverage": num_covered / dataset.num_items,
        "num_items": num_covered,
        "novelty": math.fsum(of_users) / max(len(of_users), 1),
        "target_novelty": math.fsum(surprise[targets].tolist()) / len(targets),
    }


def examples(lists: TopLists, dataset: Sequences, num_examples: int) -> list[dict[str, Any]]:
    """Some users, evenly spaced among those of the lists: {"user", "num_events", "history", "target",
    "recommended", "place", "is_repeat"}, the newest NUM_SHOWN events of the history and the first NUM_SHOWN
    of the list, items as `Dataset.labels` has them; the target's place in the whole list, from 1 or None, and
    whether it is anywhere in the history."""
    num_users = len(lists.users)
    count = min(num_examples, num_users)
    places = np.arange(count) * num_users // max(count, 1)
    found = []
    for place, user in zip(places, lists.users[places], strict=True):
        end = dataset.valid_ends[[user]]
        every, _, _ = dataset.gather(lists.users[[place]], np.zeros_like(end), end + 1)
        events, target = every[-NUM_SHOWN - 1 :], every[-1]
        hits = np.flatnonzero(lists.items[place] == target)
        listed = lists.items[place, :NUM_SHOWN]
        listed = listed[listed >= 0]
        labels = dataset.labels(np.concatenate([events, listed]))
        found.append(
            {
                "user": dataset.user_ids[int(user)].as_py(),
                "num_events": int(end[0]),
                "history": labels[: len(events) - 1],
                "target": labels[len(events) - 1],
                "recommended": labels[len(events) :],
                "place": int(hits[0]) + 1 if len(hits) else None,
                "is_repeat": bool((every[:-1] == target).any()),
            }
        )
    return found
