"""A run that begins as another one ended, with another catalogue of items.

    RUN/items.parquet (own ids) --match--> old row of every new row, -1 for new items      one rank, a file
    RUN/checkpoints/step_N      --verify-> dense weights and AdamW's state                  all
                                --blocks-> old rows and their optimizer state, by number    each its own rows
    known rows --sums--> mean, or means by popularity --> new rows                          all

Known items keep row and optimizer state to the bit, at any number of ranks and in any sharding, then and
now. New items' optimizer state is that of a fresh table; retired items' rows are not read. Nothing larger
than a block of rows is held, beside what training holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from hstu_rec import checkpoint, distributed, hosts, tracking
from hstu_rec.checkpoint.saved_rows import SavedRows
from hstu_rec.config import RunConfig, leaves, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.item_map import ITEM_MAP, MatchedItems, item_map_hash, keep_item_map, match_items
from hstu_rec.item_table import draw_rows, has_rows, local_shards, shards_of
from hstu_rec.layer import Calendar
from hstu_rec.learner import Learner
from hstu_rec.run_folder import settings_file

BLOCK_ROWS = 2**16
# Of training counts: 0, 1, 2 to 3, 4 to 7, ... of an int64.
NUM_GROUPS = 65
# What of the encoder may differ from the former run; the calendar's range may end later.
FREE = {"encoder.attention_kernel", "encoder.dropout"}
FREE |= {"encoder.calendar_begin", "encoder.calendar_end"}
SAME = {"table.optimizer", "loss.similarity", "loss.use_seen_bias"}


@dataclass(frozen=True)
class FormerRun:
    """The run that another begins from."""

    checkpoint: Path
    item_map: Path
    config: RunConfig

    def check(self, config: RunConfig) -> None:
        """Raises ValueError with all settings by which `config`, resolved, makes another model."""
        mine, former = leaves(config), leaves(self.config)
        keys = {key for key in mine if key.startswith("encoder.")} - FREE | SAME
        differ = [key for key in mine if key in keys and mine[key] != former[key]]
        begin, end = "encoder.calendar_begin", "encoder.calendar_end"
        differ += [begin] * (mine[begin] != former[begin]) + [end] * (mine[end] < former[end])
        if differ:
            listed = ", ".join(
                f"{key} is {former[key]} there and {mine[key]} here" for key in differ
            )
            raise ValueError(
                f"train.warm_start: {self.checkpoint} is of another model: {listed}; give the values of "
                "that run, or train anew"
            )


@dataclass(frozen=True)
class WarmStart:
    """What was carried over."""

    items: MatchedItems
    num_steps: int  # that the weights have seen, in all runs so far


def former_run(given: str) -> FormerRun:
    """The run that train.warm_start names, by its folder or one of its checkpoints. Collective.

    Raises ValueError, on all ranks, when there is none, or it does not tell its items.
    """
    path = Path(given)
    is_step = checkpoint.STEP_NAME.fullmatch(path.name) is not None
    folder = path.parent.parent if is_step else path

    def look() -> RunConfig:
        written = settings_file(folder)
        needed = [path, written, folder / ITEM_MAP]
        if missing := [str(one) for one in needed if not one.exists()]:
            raise ValueError(
                f"train.warm_start {given}: {', '.join(missing)} missing; give the folder of a run, as "
                f"apps/train.py leaves it with config.yaml, {ITEM_MAP} (the own ids of its rows) and "
                "checkpoints, or RUN/checkpoints/step_<number>"
            )
        return load(RunConfig, [str(written)])

    config = hosts.together(look)[distributed.rank()]
    found = path if is_step else checkpoint.resolve(folder / "checkpoints", "best")
    return FormerRun(found, folder / ITEM_MAP, config)


def warm_start(former: FormerRun, learner: Learner, dataset: Dataset, folder: Path) -> WarmStart:
    """Fills a new learner from `former`, and keeps the dataset's item map in `folder`, which all ranks see.

    Collective.
    Raises ValueError on all ranks: for a damaged checkpoint, a map that is not the checkpoint's, own ids of
    another type, or no item in common.
    """
    state = checkpoint.named_tensors(learner.state())
    periods = _periods(learner, state)
    meta = checkpoint.load(
        former.checkpoint, state, apart=lambda name: has_rows(name) or name in periods
    )
    num_steps = meta["progress"]["steps_before"] + meta["progress"]["step"]
    hosts.on_main(lambda: keep_item_map(dataset.path, folder))
    path = folder / "former_rows.npy"
    try:
        items = hosts.on_main(lambda: _match(former, meta["items"], folder, path))
        sums = hosts.together(lambda: _carry(former, state, dataset, learner, path))
        seed = distributed.mixed_seed(learner.config.train.seed, num_steps)
        hosts.together(lambda: _begin(torch.stack(sums).sum(0), dataset, learner, path, seed))
        hosts.together(lambda: _continue_calendars(former.checkpoint, periods))
    finally:
        hosts.on_main(lambda: path.unlink(missing_ok=True))
    learner.optimizers.continue_at(num_steps)
    return WarmStart(items, num_steps)


def _match(former: FormerRun, map_hash: str | None, folder: Path, path: Path) -> MatchedItems:
    """Writes the former row of every item of the run in `folder` as `path`."""
    if map_hash is not None and item_map_hash(former.item_map) != map_hash:
        raise ValueError(
            f"{former.item_map} does not hold the items that {former.checkpoint} was trained on; give "
            "train.warm_start a run folder as it was written"
        )
    items = match_items(former.item_map, folder / ITEM_MAP, path)
    if not items.num_known:
        raise ValueError(
            f"no item of {folder / ITEM_MAP} is in {former.item_map}: their own ids have nothing in common; "
            "prepare both from one catalogue, or train anew"
        )
    return items


@torch.no_grad()
def _carry(
    former: FormerRun, state: dict[str, Tensor], dataset: Dataset, learner: Learner, path: Path
) -> Tensor:
    """Fills this rank's known rows in all tensors that have rows; their sums and number by group,
    float64 [NUM_GROUPS, D + 1]."""
    former_rows = np.load(path, mmap_mode="r")
    num_former = pq.read_metadata(former.item_map).num_rows
    sums = torch.zeros(NUM_GROUPS, learner.table.dim + 1, dtype=torch.float64)
    for name, tensor in state.items():
        if not has_rows(name):
            continue
        saved = SavedRows(former.checkpoint, name)
        if (saved.shape, saved.dtype) != ((num_former, *tensor.shape[1:]), tensor.dtype):
            raise ValueError(
                f"{former.checkpoint}: {name!r} is {saved.dtype} {list(saved.shape)}, which does not fit "
                f"{tensor.dtype} {list(tensor.shape)} and {num_former} former items"
            )
        for rows, ids in _told(_blocks(shards_of(tensor)), name):
            known = np.flatnonzero(former_rows[ids] >= 0)
            values = saved.take(former_rows[ids][known])
            rows[torch.from_numpy(known).to(rows.device)] = values.to(rows.device)
            if name.startswith("model/"):
                values = nn.functional.pad(values.double(), (0, 1), value=1.0)
                sums.index_add_(0, _groups(learner, dataset, ids)[known], values)
    return sums


@torch.no_grad()
def _begin(sums: Tensor, dataset: Dataset, learner: Learner, path: Path, seed: int) -> None:
    """Fills this rank's new rows by table.new_rows, from the `sums` of all ranks' known ones."""
    former_rows, config = np.load(path, mmap_mode="r"), learner.config.table
    groups = sums[:, -1].nonzero()[:, 0]
    # The nearest group with known rows, of two the rarer.
    distance = (torch.arange(NUM_GROUPS)[:, None] - groups).abs()
    means = (sums[:, :-1] / sums[:, -1:])[groups[distance.argmin(1)]]
    for rows, ids in _blocks(local_shards(learner.model)):
        new = torch.from_numpy(np.flatnonzero(former_rows[ids] < 0))
        if config.new_rows == "random":
            # Not with the run's seed: an untrained row of the former run would have a double.
            values = draw_rows(torch.empty_like(rows), ids.start, config.init_std, seed)[new]
        else:
            values = means[_groups(learner, dataset, ids)[new]].to(rows)
        rows[new.to(rows.device)] = values


def _groups(learner: Learner, dataset: Dataset, ids: slice) -> Tensor:
    """int64 of items: which mean their rows begin as."""
    counts = dataset.train_counts[ids].astype(np.float64)
    if learner.config.table.new_rows != "popularity":
        counts[:] = 0
    return torch.from_numpy(np.frexp(counts)[1]).long()


def _blocks(shards: list[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, slice]]:
    """Views of at most BLOCK_ROWS rows, with the items that they are of."""
    for rows, first in shards:
        for begin in range(0, len(rows), BLOCK_ROWS):
            block = rows[begin : begin + BLOCK_ROWS]
            yield block, slice(first + begin, first + begin + len(block))


def _told(blocks: Iterator[tuple[Tensor, slice]], name: str) -> Iterator[tuple[Tensor, slice]]:
    """The blocks, with a bar on the main process where the work on them is long."""
    every = list(blocks)
    total = sum(len(rows) for rows, _ in every)
    is_shown = distributed.is_main()
    with tracking.bar(
        total, f"rows of {name}", "row", is_shown=is_shown, after_s=tracking.BAR_AFTER_S
    ) as bar:
        for rows, ids in every:
            yield rows, ids
            bar.update(len(rows))


def _periods(learner: Learner, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` with a row a period of a calendar."""
    names = []
    for name, module in learner.encoder.named_modules():
        if isinstance(module, Calendar):
            names.append(f"model/encoder.{name}.embedding")
            place = next(i for i, p in enumerate(learner.dense) if p is module.embedding)
            names += [f"dense/{place}.exp_avg", f"dense/{place}.exp_avg_sq"]
    return {name: state[name] for name in names}


@torch.no_grad()
def _continue_calendars(path: Path, periods: dict[str, Tensor]) -> None:
    """Fills the periods that the former run had; later ones begin as its last, which stood for them."""
    for name, rows in periods.items():
        saved = SavedRows(path, name)
        former = saved.take(np.arange(len(saved))).to(rows.device)
        rows[: len(former)] = former
        if name.startswith("model/"):
            rows[len(former) :] = former[-1]
