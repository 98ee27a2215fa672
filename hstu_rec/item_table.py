"""ItemTable: the catalogue's vectors in one sharded TorchRec EmbeddingCollection, stepped inside backward.

TorchRec is imported here when a table is made, so that the configuration can be read without it.
"""

import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hstu_rec import distributed
from hstu_rec.guards import StepGuard
from hstu_rec.settings import above, within, without_effect
from hstu_rec.versions import check_triple

if TYPE_CHECKING:
    from torchrec.distributed import DistributedModelParallel

TABLE = "item"
# Of the rows in the state of a model whose `table` is an ItemTable.
ROWS_NAME = f"table.collection.embeddings.{TABLE}.weight"
FEATURE = "item_id"
# Rows are initialised in blocks of this many, each from its own seed, so that a row's first value
# depends neither on the number of ranks nor on the sharding plan.
INIT_BLOCK_ROWS = 4096
# Bags that the ids of a lookup are put in: rows come back one an id whatever the bags, but on a GPU fbgemm
# reads the ids of a bag one after another, in one warp.
NUM_BAGS = {"cpu": 1, "cuda": 4096}
DEFAULT_LOAD_FACTOR = 0.2  # fbgemm's own
# Of a rank's memory, what the planner leaves to all that is not the table.
RESERVED_FRACTION = 0.15

NewRows = Literal["random", "mean", "popularity"]


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """The item table and its optimizer."""

    sharding: Literal["row_wise", "table_wise"] = "row_wise"
    """How rows are placed: spread over all ranks, or all on one. (TorchRec has no placement on the ranks of
    one host, table_row_wise, for tables whose rows are not pooled.)"""
    kernel: Literal["fused", "uvm", "uvm_caching"] = "fused"
    """Where rows and their optimizer's state are: in the device's memory; or in the host's, read by a GPU
    through unified memory; or there with a cache of rows in the GPU's."""
    cache_load_factor: float = DEFAULT_LOAD_FACTOR
    """Share of a rank's rows that the cache of uvm_caching has room for."""
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    """Optimizer fused into the backward pass; adam needs CUDA."""
    lr: float = 0.1
    """Learning rate of the rows."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    init: Literal["normal", "co_occurrence"] = "normal"
    """How rows begin: N(0, init_std), or as a decomposition of the training events' co-occurrence, which
    process 0 holds whole; items that occur with no other begin as normal."""
    init_std: float = 0.02
    """Standard deviation of normal rows."""
    init_norm: float = 0.5
    """Mean length of co-occurrence rows."""
    new_rows: NewRows = "random"
    """How rows of items new since the run of train.warm_start begin: random, N(0, init_std), whatever init;
    as the mean of the known rows; or as the mean of those of like popularity (within the same powers of
    two of training events). Equal rows tie until they are trained, and ties are never hits."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = above(self, 0, "lr", "eps", "init_std", "init_norm")
        found += within(self, "(0, 1]", "cache_load_factor")
        if self.kernel != "uvm_caching":
            found += without_effect(self, f"with kernel '{self.kernel}'", "cache_load_factor")
        if self.init != "co_occurrence":
            found += without_effect(self, f"with init '{self.init}'", "init_norm")
        return found


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes that a table is spread over, and the memory that each has."""

    num_ranks: int
    """All processes."""
    ranks_per_host: int
    """Those of one host."""
    device_type: Literal["cpu", "cuda"]
    """What a rank computes on."""
    device_bytes: int
    """Memory of a rank's GPU; 0 on CPU."""
    host_bytes: int
    """A rank's share of its host's memory."""

    @classmethod
    def present(cls, device: torch.device) -> "Cluster":
        """That of the process group, with the least memory of any rank. Collective."""
        ranks = distributed.world_size()
        local = min(distributed.local_world_size(), ranks)
        is_cuda = device.type == "cuda"
        device_bytes = torch.cuda.get_device_properties(device).total_memory if is_cuda else 0
        least = -torch.tensor([device_bytes, distributed.host_memory() // local])
        # The same on all ranks, so that all make the same plan, or none.
        device_bytes, host_bytes = (-distributed.all_reduce_max(least)).tolist()
        return cls(
            num_ranks=ranks,
            ranks_per_host=local,
            device_type="cuda" if is_cuda else "cpu",
            device_bytes=device_bytes,
            host_bytes=host_bytes,
        )


class ItemTable(nn.Module):
    """Rows of item ids 0 .. num_items - 1, looked up once a step for all uses together.

    Made on the meta device; `shard_model` places it. Raises ValueError for an optimizer that the device
    does not support.
    """

    def __init__(self, config: TableConfig, num_items: int, dim: int, device: torch.device) -> None:
        super().__init__()
        check_triple()
        from torchrec import EmbeddingCollection, EmbeddingConfig
        from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

        self.num_items, self.dim = num_items, dim
        self.collection = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=TABLE, embedding_dim=dim, num_embeddings=num_items, feature_names=[FEATURE]
                )
            ],
            device=torch.device("meta"),
        )
        optimizer, arguments = _fused_optimizer(config, device)
        apply_optimizer_in_backward(optimizer, self.collection.parameters(), arguments)

    def send(self, ids: Tensor, is_checked: bool = False) -> "SentIds":
        """Starts the way of `ids` (distinct, sorted int64 [R]; R may be 0) to their owners. Collective.

        Raises ValueError as `check_ids` does, which waits for a GPU, unless `is_checked` already.
        """
        from torchrec import KeyedJaggedTensor

        if not is_checked:
            check_ids(ids, self.num_items)
        # As many on every rank, which TorchRec's exchange of lengths takes.
        count = NUM_BAGS[ids.device.type]
        lengths = torch.arange(len(ids), len(ids) + count, device=ids.device) // count
        return SentIds(
            self.collection, KeyedJaggedTensor(keys=[FEATURE], values=ids, lengths=lengths)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [R, D] of distinct sorted `ids`, int64 [R]; R may be 0. Collective; raises as `send`."""
        return self.send(ids).rows()


class SentIds:
    """Ids on their way to the ranks that own their rows, and the rows on their way back.

    TorchRec's three exchanges (sizes, ids, rows), each begun ahead of its use. Every method is collective
    the first time: all ranks call them in the same order.
    """

    def __init__(self, collection: Any, features: Any) -> None:
        self._collection, self._context = collection, collection.create_context()
        self._sizes = collection.input_dist(self._context, features)
        self._ids: Any = None
        self._found: Any = None
        self._guard: StepGuard | None = None
        self._rows: Tensor | None = None

    def advance(self) -> None:
        """Once the sizes are exchanged, starts the exchange of the ids; harmless when it has begun."""
        if self._ids is None:
            self._ids = self._sizes.wait()

    def fetch(self, guard: StepGuard | None = None) -> None:
        """Reads the rows as they are now and starts their way back; harmless when it has begun.

        In backward the guard weighs the gradient of `rows` before it is sent, and gives their owners zeros
        in its place where the step is not finite.
        """
        if self._found is None:
            self.advance()
            owned = self._collection.compute(self._context, self._ids.wait())
            for rows in owned:
                if guard is not None and rows.requires_grad:
                    rows.register_hook(guard.keep)
            self._found, self._guard = self._collection.output_dist(self._context, owned), guard

    def rows(self) -> Tensor:
        """The rows [R, D] as they were when fetched, with gradient."""
        rows = self._rows
        if rows is None:
            self.fetch()
            rows = self._found[FEATURE].values()
            if self._guard is not None:
                rows.register_hook(self._guard.weigh)
            self._rows = rows
        return rows


def check_ids(ids: Tensor, num_items: int) -> None:
    """Raises ValueError for ids outside 0 .. num_items - 1: TorchRec would read row 0 for them."""
    if not len(ids):
        return
    low, high = torch.stack(ids.aminmax()).tolist()  # one wait for a GPU
    if low < 0 or high >= num_items:
        bad = ids[(ids < 0) | (ids >= num_items)]
        raise ValueError(
            f"{len(bad)} item ids are outside the catalogue 0..{num_items - 1}, for example "
            f"{bad[:5].tolist()}; prepare the events and the catalogue together"
        )


def _fused_optimizer(config: TableConfig, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """TorchRec's optimizer class and its arguments."""
    import torchrec.optim as optim

    if config.optimizer == "adam" and device.type == "cpu":
        raise ValueError(
            "table.optimizer 'adam' is not supported by fbgemm on CPU; "
            "use 'rowwise_adagrad', 'adagrad' or 'sgd', or a CUDA device"
        )
    if config.optimizer == "sgd":
        return torch.optim.SGD, {"lr": config.lr}
    classes = {
        "rowwise_adagrad": optim.RowWiseAdagrad,
        "adagrad": torch.optim.Adagrad,
        "adam": torch.optim.Adam,
    }
    return classes[config.optimizer], {"lr": config.lr, "eps": config.eps}


class PlacementError(ValueError):
    """The ranks have too little memory for a table."""


def sharding_plan(model: nn.Module, config: TableConfig, cluster: Cluster) -> Any:
    """TorchRec's ShardingPlan of `model` (with one ItemTable in it, on the meta device) for a cluster.

    Raises PlacementError for too little memory, ValueError for fewer items than row-wise sharding needs and
    unified memory without a GPU.
    """
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
    from torchrec.distributed.types import CacheParams

    (table,) = (one for one in model.modules() if isinstance(one, ItemTable))
    _check_placement(config, table.num_items, cluster)
    # The planner advises those who build topologies of clusters; ours is read off the process group.
    logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)
    is_caching = config.kernel == "uvm_caching"
    planner = EmbeddingShardingPlanner(
        storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED_FRACTION),
        topology=Topology(
            world_size=cluster.num_ranks,
            local_world_size=cluster.ranks_per_host,
            compute_device=cluster.device_type,
            hbm_cap=cluster.device_bytes,
            ddr_cap=cluster.host_bytes,
        ),
        constraints={
            TABLE: ParameterConstraints(
                sharding_types=[config.sharding],
                compute_kernels=["fused" if config.kernel == "fused" else f"fused_{config.kernel}"],
                cache_params=CacheParams(load_factor=config.cache_load_factor)
                if is_caching
                else None,
            )
        },
    )
    try:
        return planner.plan(model, _sharders())
    except PlannerError as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        gib = table.num_items * table.dim * 4 / 2**30
        advice = ["more ranks"]
        advice += ["table.sharding=row_wise"] * (config.sharding != "row_wise")
        is_device = config.kernel == "fused" and cluster.device_type == "cuda"
        advice.append("table.kernel=uvm_caching" if is_device else "hosts with more memory")
        raise PlacementError(
            f"TorchRec's planner finds no place for {table.num_items} rows of {table.dim}, {gib:.4g} GiB "
            f"({config.sharding}, {config.kernel}) on {cluster.num_ranks} ranks of "
            f"{cluster.device_bytes / 2**30:.4g} GiB on the device and {cluster.host_bytes / 2**30:.1f} "
            f"GiB on the host, of which it leaves {RESERVED_FRACTION:.0%} to the rest: {reason.strip(' .')}; "
            f"give {' or '.join(advice)}"
        ) from error


def _check_placement(config: TableConfig, num_items: int, cluster: Cluster) -> None:
    """Raises ValueError for what no plan can do."""
    ranks = cluster.num_ranks
    if config.sharding == "row_wise" and (ranks - 1) * -(-num_items // ranks) >= num_items:
        raise ValueError(
            f"{num_items} items cannot be spread over {ranks} ranks so that each owns a row, which "
            "fbgemm needs; give table.sharding=table_wise, or start fewer processes"
        )
    if config.kernel != "fused" and cluster.device_type == "cpu":
        raise ValueError(
            f"table.kernel '{config.kernel}' is for CUDA, whose rows it keeps in the host's memory; on CPU "
            "they are there already: give fused"
        )


def _sharders() -> list[Any]:
    from torchrec.distributed.embedding import EmbeddingCollectionSharder

    return [EmbeddingCollectionSharder()]


def shard_model(
    model: nn.Module, config: TableConfig, device: torch.device, seed: int
) -> "DistributedModelParallel":
    """`model` (with one ItemTable in it) under DistributedModelParallel: sharded rows, replicated rest.

    Collective; raises as `sharding_plan`.
    """
    import torch.distributed as dist
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.types import ShardingEnv

    group = dist.group.WORLD
    assert group is not None, "distributed.start() comes first"
    env = ShardingEnv.from_process_group(group)
    env.output_dtensor = True  # what torch.distributed.checkpoint saves asynchronously and reshards
    # torch's note to whoever traces models, once a process, at TorchRec's first lookup.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    plan = sharding_plan(model, config, Cluster.present(device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's DDP, to TorchRec
        sharded = DistributedModelParallel(
            module=model,
            env=env,
            device=device,
            plan=plan,
            sharders=_sharders(),
            # DDP for one process would be a tenth of a small model's step.
            init_data_parallel=distributed.world_size() > 1,
        )
    for rows, first in local_shards(sharded):
        draw_rows(rows, first, config.init_std, seed)
    return sharded


def live_state(sharded: nn.Module) -> dict[str, Any]:
    """`sharded.state_dict()`, whose rows may be read and written: what a cache holds of them is put back,
    and read again when it is used."""
    from torchrec.distributed.embedding import ShardedEmbeddingCollection

    state = sharded.state_dict()  # which flushes the cache
    for module in sharded.modules():
        if isinstance(module, ShardedEmbeddingCollection):
            for lookup in module._lookups:
                lookup.purge()  # pyright: ignore
    return state


def local_shards(sharded: nn.Module) -> list[tuple[Tensor, int]]:
    """This rank's live rows [n, D] with the item id of the first; empty on a rank that owns none."""
    state = live_state(sharded)
    return shards_of(next(value for name, value in state.items() if has_rows(name)))


def has_rows(name: str) -> bool:
    """Whether a tensor of a model's or its fused optimizer's state has one row an item, by its name."""
    return f"embeddings.{TABLE}.weight" in name


def shards_of(weight: Any) -> list[tuple[Tensor, int]]:
    """This rank's parts [n, ...] of a sharded tensor, live, with the row that each begins at."""
    if hasattr(weight, "to_local"):
        local = weight.to_local()
        # A rank without rows has no shard, but one (empty) offset.
        pairs = zip(local.local_shards(), local.local_offsets(), strict=False)
        return [(shard, offset[0]) for shard, offset in pairs]
    return [(shard.tensor, shard.metadata.shard_offsets[0]) for shard in weight.local_shards()]


@torch.no_grad()
def fill_rows(
    sharded: nn.Module, table: ItemTable, vectors: Tensor | None, device: torch.device
) -> None:
    """Sets every row to process 0's `vectors` [N, D], but for rows of zeros, which stay. Collective."""
    shards = local_shards(sharded)
    for begin in range(0, table.num_items, INIT_BLOCK_ROWS):
        end = min(begin + INIT_BLOCK_ROWS, table.num_items)
        block = torch.empty(end - begin, table.dim) if vectors is None else vectors[begin:end]
        block = distributed.broadcast(block.to(device))
        for rows, first in shards:
            mine, values = _same_items(rows, first, block, begin)
            mine.copy_(torch.where(values.any(1, keepdim=True), values.to(mine), mine))


def draw_rows(rows: Tensor, first: int, std: float, seed: int) -> Tensor:
    """Fills rows first .. first + n of the table with N(0, std), a function of seed and row; returns them."""
    end = first + len(rows)

    @torch.no_grad()  # which holds for one thread
    def fill(block: int) -> None:
        generator = distributed.generator("rows", seed, block)
        normal = generator.standard_normal((INIT_BLOCK_ROWS, rows.shape[1]), dtype=np.float32)
        values = torch.from_numpy(normal).mul_(std)
        mine, drawn = _same_items(rows, first, values, block * INIT_BLOCK_ROWS)
        mine.copy_(drawn)

    # numpy draws without Python's lock: 100M rows of 128 would be four minutes of one core.
    blocks = range(first // INIT_BLOCK_ROWS, -(-end // INIT_BLOCK_ROWS))
    with ThreadPoolExecutor(distributed.num_cores()) as threads:
        for _ in threads.map(fill, blocks):
            pass
    return rows


def _same_items(rows: Tensor, first: int, block: Tensor, begin: int) -> tuple[Tensor, Tensor]:
    """What `rows`, of items from `first` on, and `block`, of items from `begin` on, have both; views."""
    low = max(first, begin)
    high = max(min(first + len(rows), begin + len(block)), low)
    return rows[low - first : high - first], block[low - begin : high - begin]
