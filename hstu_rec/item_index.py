"""A FAISS index of the items: few of them are scored, the best among them exactly.

    queries --search--> the nearest of the index, and seen items --exact scores--> the best

exact compares every item in FAISS' float32; ivf those of the cells nearest to the query.
"""

import math
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hstu_rec.scores import Catalogue, ItemShard, Seen, exact_scores

IndexKind = Literal["exact", "ivf"]

BLOCK_ROWS = 2**16
# Vectors that the cells are made of, for each of them.
TRAINING_ROWS = 64
# Numbers of the vectors that are scored at a time.
MAX_NUMBERS = 2**24
SEED = 1


def _faiss() -> Any:
    try:
        return import_module("faiss")
    except ImportError as error:
        raise ValueError(
            "an index of items needs FAISS: pip install faiss-cpu (requirements/serve.txt has it)"
        ) from error


class ItemIndex:
    """Items by inner product of what is scored. Raises ValueError without FAISS."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def build(cls, kind: IndexKind, shard: ItemShard) -> "ItemIndex":
        """That of all rows; ivf has about 4 sqrt(N) cells, and searches one of them until
        `num_probed` is set."""
        faiss, (num_items, dim) = _faiss(), shard.rows.shape
        index = faiss.IndexFlatIP(dim)
        if kind == "ivf":
            cells = min(math.ceil(4 * math.sqrt(num_items)), num_items)
            index = faiss.IndexIVFFlat(index, dim, cells, faiss.METRIC_INNER_PRODUCT)
            index.cp.seed, index.cp.min_points_per_centroid = SEED, 1
            index.cp.max_points_per_centroid = TRAINING_ROWS
            drawn = torch.randperm(num_items, generator=torch.Generator().manual_seed(SEED))
            index.train(shard.vectors(drawn[: cells * TRAINING_ROWS]).numpy())
        for begin in range(0, num_items, BLOCK_ROWS):
            index.add(shard.vectors(slice(begin, begin + BLOCK_ROWS)).numpy())
        return cls(index)

    @classmethod
    def read(cls, path: Path, num_items: int, dim: int) -> "ItemIndex":
        """The index of a file, which FAISS parses: of a file whose maker is trusted. Raises ValueError for
        what is none of `build`, or of other items."""
        faiss = _faiss()
        try:
            index = faiss.read_index(str(path))
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"FAISS cannot read it: {str(error).splitlines()[0]}") from error
        found = index.ntotal, index.d
        is_known = isinstance(index, faiss.IndexFlatIP | faiss.IndexIVFFlat)
        if not is_known or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(f"it is a {type(index).__name__}, no inner product, flat or IVF")
        if found != (num_items, dim):
            raise ValueError(f"it holds {found[0]} items of {found[1]}, not {num_items} of {dim}")
        return cls(index)

    def write(self, path: Path) -> None:
        """Writes the file that `read` takes."""
        _faiss().write_index(self._index, str(path))

    @property
    def num_cells(self) -> int:
        """Of ivf; 1 for exact."""
        return getattr(self._index, "nlist", 1)

    @property
    def num_probed(self) -> int:
        """Cells that a search looks into."""
        return getattr(self._index, "nprobe", 1)

    @num_probed.setter
    def num_probed(self, number: int) -> None:
        self._index.nprobe = number

    def best_items(
        self, queries: Tensor, catalogue: Catalogue, num_best: int, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        """As `hstu_rec.scores.best_items`, of what the index finds and of `seen`: scores are exact, items
        that the index does not find are missing."""
        num_items, dim = catalogue.shard.rows.shape
        num_best, num_seen = min(num_best, num_items), torch.bincount(seen.owners, minlength=1)
        depth = min(num_best + int(num_seen.max()), num_items)
        size = max(MAX_NUMBERS // (depth * dim), 1)
        best = torch.full((len(queries), num_best), -torch.inf, dtype=torch.float64)
        items = torch.zeros(best.shape, dtype=torch.int64)
        for begin in range(0, len(queries), size):
            part = slice(begin, begin + size)
            is_mine = (seen.owners >= begin) & (seen.owners < begin + size)
            mine = Seen(seen.owners[is_mine] - begin, seen.items[is_mine], seen.added)
            found = self._search(queries[part], depth, mine)
            best[part], items[part] = _best(queries[part], catalogue.shard, found, mine, num_best)
        return best, items

    def _search(self, queries: Tensor, depth: int, seen: Seen) -> Tensor:
        """int64 [Q, m] items, rising, once each; -1 for none."""
        # Of torch's number, which a server may have set.
        _faiss().omp_set_num_threads(torch.get_num_threads())
        found = self._found(queries, depth)
        counts = torch.bincount(seen.owners, minlength=len(queries))
        if len(seen.owners) and seen.added > -torch.inf:
            order = seen.owners.argsort(stable=True)
            place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[seen.owners[order]]
            added = torch.full((len(queries), int(counts.max())), -1)
            added[seen.owners[order], place] = seen.items[order]
            found = torch.cat([found, added], 1)
        found = found.sort(1).values
        is_again = found[:, 1:] == found[:, :-1]
        found[:, 1:][is_again] = -1
        return found

    def _found(self, queries: Tensor, depth: int) -> Tensor:
        """int64 [Q, depth] items; of ivf, cells are added for queries whose cells hold fewer."""
        _, found = self._index.search(queries.contiguous().numpy(), depth)
        found, num_probed = torch.from_numpy(found), self.num_probed
        while num_probed < self.num_cells and (is_short := (found < 0).any(1)).any():
            num_probed = min(2 * num_probed, self.num_cells)
            parameters = _faiss().SearchParametersIVF(nprobe=num_probed)
            again = queries[is_short].contiguous().numpy()
            _, more = self._index.search(again, depth, params=parameters)
            found[is_short] = torch.from_numpy(more)
        return found


def _best(
    queries: Tensor, shard: ItemShard, items: Tensor, seen: Seen, num_best: int
) -> tuple[Tensor, Tensor]:
    """The best of rising `items` [Q, m]; of equal scores the lower item first."""
    vectors = shard.vectors(items.clamp(min=0).flatten()).unflatten(0, items.shape)
    scores = exact_scores(queries[:, None], vectors)
    keys = items + torch.arange(len(items))[:, None] * shard.num_items
    is_seen = torch.isin(keys, seen.owners * shard.num_items + seen.items)
    scores[is_seen] += seen.added
    scores[items < 0] = -torch.inf
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :num_best], items.gather(1, order[:, :num_best])
