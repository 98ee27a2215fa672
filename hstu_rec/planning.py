"""Whether training fits, before it starts: the sharding plan, memory, traffic and balance of a rank.

No GPU and no process group is needed: the table is planned on the meta device by the function that training
uses, batches are simulated from lengths of histories, and the rest is arithmetic (hstu_rec.memory).
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from hstu_rec import distributed
from hstu_rec.config import RunConfig
from hstu_rec.data.dataset import MAX_ITEMS
from hstu_rec.data.stochastic_length import cut_lengths
from hstu_rec.data.stream import DataConfig, deal, imbalance_of, open_dataset
from hstu_rec.data.synthetic import SyntheticConfig, SyntheticDataset
from hstu_rec.flops import history_flops
from hstu_rec.item_table import NUM_BAGS, Cluster, ItemTable, PlacementError, sharding_plan
from hstu_rec.learner import resolved
from hstu_rec.memory import (
    FLOAT,
    INT,
    StepSizes,
    copy_bytes,
    dense_bytes,
    num_dense,
    step_bytes,
    table_bytes,
)
from hstu_rec.negatives import is_divided
from hstu_rec.settings import above, at_least, within

GIB = 2**30
# Of a device's memory, what is left to the CUDA context, NCCL and unused pieces of the allocator.
SPARE_FRACTION = 0.1
# Items a piece of the sum over a popularity that falls; pieces grow with the rank.
NUM_PIECES = 4096
# Ranks that a plan is made for, at most: simulated one by one.
MAX_RANKS = 2**14
# Mean imbalance that is worth a word.
LARGE_IMBALANCE = 1.1


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a plan takes for granted."""

    num_items: int = 100_000_000
    """Items of the catalogue; 0 takes items and lengths of histories from data.path."""
    min_length: int = 10
    """Shortest history in events; the longest is encoder.max_history_len."""
    length_power: float = 1.0
    """Histories of n events are about as frequent as n ** -this."""
    popularity_power: float | None = None
    """The item of rank r is as frequent as r ** -this; null for the worst case: a step's items all differ."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What ranks compute on; cuda is planned as for Hopper."""
    host_gib: float = 1024.0
    """Memory of a host, shared by its ranks."""
    num_steps: int = 50
    """Steps that are simulated."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "min_length", "num_steps") + above(self, 0, "host_gib")
        found += within(self, f"[0, {MAX_ITEMS}]", "num_items")
        return found + at_least(self, 0, "length_power", "popularity_power")


@dataclass(frozen=True, kw_only=True)
class PlannedRun(RunConfig):
    """A run, and where it would be."""

    world: str = "1x8"
    """Hosts x GPUs (or processes) a host."""
    hbm: float = 80.0
    """GiB a GPU."""
    plan: PlanConfig = field(default_factory=PlanConfig)

    def problems(self) -> list[str]:
        """Problems between sections, and of the world."""
        found = super().problems()
        sizes = re.fullmatch(r"(\d+)x(\d+)", self.world)
        if sizes is None or "0" in (size.lstrip("0") or "0" for size in sizes.groups()):
            found.append(
                f"world must be hosts x GPUs a host, like 8x8, each at least 1; got {self.world}"
            )
        elif self.cluster().num_ranks > MAX_RANKS:
            found.append(f"world must have at most {MAX_RANKS} ranks; got {self.world}")
        found += above(self, 0, "hbm")
        if self.plan.min_length > self.encoder.max_history_len:
            found.append(
                "plan.min_length must be at most encoder.max_history_len, "
                f"{self.encoder.max_history_len}; got {self.plan.min_length}"
            )
        return found

    def cluster(self) -> Cluster:
        """The ranks that `world`, `hbm` and plan.* stand for."""
        hosts, ranks = map(int, self.world.split("x"))
        is_cuda = self.plan.device == "cuda"
        return Cluster(
            num_ranks=hosts * ranks,
            ranks_per_host=ranks,
            device_type=self.plan.device,
            device_bytes=int(self.hbm * GIB) if is_cuda else 0,
            host_bytes=int(self.plan.host_gib * GIB) // ranks,
        )


@dataclass(frozen=True)
class Batches:
    """Simulated steps of all ranks."""

    fullest: np.ndarray  # lengths of the histories of the rank that has most events at any step
    num_events: float  # mean over steps, of all ranks
    imbalance: float  # FLOPs of the rank that has most, over the mean of ranks; mean over steps
    worst_imbalance: float  # the same of the worst step


@dataclass(frozen=True)
class Plan:
    """What a rank that holds most would hold, in bytes, and what leaves a rank in a step, in the mean."""

    sharding: str
    device: dict[str, float]  # by part
    host: dict[str, float]
    traffic: dict[str, float]
    batches: Batches
    num_asked: int  # distinct items that a rank reads in a step
    num_items: int

    @property
    def device_bytes(self) -> float:
        """All parts on the device."""
        return sum(self.device.values())


def make_plan(config: PlannedRun, cluster: Cluster) -> Plan:
    """The plan of a run on a cluster. Raises as `sharding_plan`."""
    num_items = config.plan.num_items
    if num_items:
        lengths = made_dataset(config, config.plan.num_steps).train_ends - 1
    else:
        dataset = open_dataset(config.data)
        num_items, lengths = dataset.num_items, dataset.train_ends - 1
        run = resolved(config, dataset)
        config = replace(config, encoder=run.encoder)
    batches = simulate(config, lengths, num_items, cluster.num_ranks)
    rows = rows_by_rank(config, num_items, cluster)
    table = table_bytes(config.table, config.encoder.dim, max(rows))
    sizes = step_sizes(config, batches, num_items, rows)
    device: dict[str, float] = {
        "table": table[0],
        "row state": table[1],
        "dense": dense_bytes(config, cluster.num_ranks),
        **step_bytes(config, sizes, cluster.device_type),
    }
    host: dict[str, float] = {"table": table[2], "checkpoint's copy": copy_bytes(config, max(rows))}
    kind = f"{config.table.sharding}, {config.table.kernel}"
    owners = sum(row > 0 for row in rows)
    sharding = f"{kind}: {owners} shards of {max(rows):,} rows or fewer"
    traffic = traffic_bytes(config, sizes, cluster)
    return Plan(sharding, device, host, traffic, batches, sizes.num_asked, num_items)


def rows_by_rank(config: PlannedRun, num_items: int, cluster: Cluster) -> list[int]:
    """Rows that each rank owns, by TorchRec's plan on the meta device."""
    table = ItemTable(
        config.table, num_items, config.encoder.dim, torch.device(cluster.device_type)
    )
    holder = nn.Module()
    holder.table = table
    plan: Any = sharding_plan(holder, config.table, cluster)
    (placed,) = (one for module in plan.plan.values() for one in module.values())
    rows = [0] * cluster.num_ranks
    for shard in placed.sharding_spec.shards:
        rows[shard.placement.rank()] += shard.shard_sizes[0]
    return rows


def made_dataset(config: PlannedRun, num_steps: int) -> SyntheticDataset:
    """Users of so many steps and more, with histories as plan.min_length and plan.length_power have them, of
    items that are all as frequent."""
    least, longest, data = config.plan.min_length, config.encoder.max_history_len, config.data
    possible = np.arange(least, longest + 1)
    weights = possible.astype(np.float64) ** -config.plan.length_power
    mean = possible @ weights / weights.sum()
    num_users = _enough_users(data, mean)
    # Of a user's events the first is no target, and the last two are those of validation and test.
    return SyntheticDataset(
        SyntheticConfig(
            num_users=num_users * num_steps,
            num_items=config.plan.num_items,
            shortest=least + 3,
            longest=longest + 3,
            length_exponent=config.plan.length_power,
            zipf_exponent=0.0,
            rule_share=0.0,
            seed=config.train.seed,
        )
    )


def _enough_users(data: DataConfig, mean_length: float) -> int:
    """Users of a step, or more than its events are likely to be of."""
    return data.batch_users or 2 * int(data.batch_events / mean_length) + 1


def simulate(config: PlannedRun, lengths: np.ndarray, num_items: int, num_ranks: int) -> Batches:
    """Batches of users drawn from `lengths`, dealt to the ranks by their FLOPs."""
    data, longest = config.data, config.encoder.max_history_len
    generator = distributed.generator("order of users", config.train.seed, 1)
    lengths = np.minimum(lengths[lengths > 0], longest)
    possible = np.arange(longest + 1)
    costs = history_flops(config.encoder, config.loss, num_items, possible)
    num_users = _enough_users(data, float(lengths.mean()))
    fullest, imbalances, events = np.zeros(0, dtype=np.int64), [], []
    for _ in range(config.plan.num_steps):
        users = generator.choice(lengths, num_users)
        if data.length_alpha:
            users = cut_lengths(users, longest, data.length_alpha, generator)
        if data.batch_events:
            users = users[np.cumsum(users) <= data.batch_events]
        hands = deal(costs[users], num_ranks)
        imbalances.append(imbalance_of(costs[users], hands))
        events.append(int(users.sum()))
        fullest = max(fullest, *(users[hand] for hand in hands), key=lambda lengths: lengths.sum())
    return Batches(fullest, float(np.mean(events)), float(np.mean(imbalances)), max(imbalances))


def step_sizes(config: PlannedRun, batches: Batches, num_items: int, rows: list[int]) -> StepSizes:
    """Sizes of the fullest rank's step, and of the fullest owner of rows."""
    num_ranks, kind = len(rows), config.loss.negatives
    power = config.plan.popularity_power
    # A history and its targets are its events and one more.
    drawn = int(batches.fullest.sum()) + len(batches.fullest)
    if kind == "in_batch":
        num_negatives = num_distinct(num_items, int(batches.num_events), power)
    else:
        num_negatives = num_items if kind == "all" else config.loss.num_negatives
    divides = is_divided(config.loss, num_ranks, num_negatives, int(batches.num_events))
    if divides:
        num_negatives = -(-num_negatives // num_ranks)
    asked = min(num_distinct(num_items, drawn, power) + num_negatives, num_items)
    served = int(asked * num_ranks * max(rows) / num_items)
    return StepSizes(
        batches.fullest, int(batches.num_events), num_negatives, asked, served, num_ranks, divides
    )


def num_distinct(num_items: int, num_drawn: int, power: float | None) -> int:
    """Distinct items among so many drawn, in the mean; all of them, as far as there are, for no `power`."""
    if power is None:
        return min(num_drawn, num_items)
    bounds = np.unique(np.geomspace(1, num_items + 1, NUM_PIECES).astype(np.int64))
    ranks = (bounds[:-1] + bounds[1:] - 1) / 2
    weights, counts = ranks**-power, np.diff(bounds)
    share = weights / (weights @ counts)
    return round(float(-np.expm1(num_drawn * np.log1p(-share)) @ counts))


def traffic_bytes(config: RunConfig, sizes: StepSizes, cluster: Cluster) -> dict[str, float]:
    """Bytes that leave a rank in a step: all-to-all of ids, rows and gradients, and the all-reduce of dense
    gradients as a ring has it. Where candidates are divided queries travel too."""
    num_ranks = cluster.num_ranks
    others = (num_ranks - 1) / num_ranks
    bags = INT * NUM_BAGS[cluster.device_type] * (num_ranks - 1)
    vector = FLOAT * config.encoder.dim
    asked = sizes.num_asked
    if sizes.is_divided and config.table.sharding == "row_wise":
        asked -= sizes.num_negatives  # of its own rows
    traffic = {
        "ids": INT * asked * others + bags,
        "rows": vector * asked * others,
        "gradients": vector * asked * others,
        "dense": 2 * others * FLOAT * num_dense(config),
    }
    if sizes.is_divided:
        gathered = vector * sizes.num_positions / num_ranks * (num_ranks - 1)
        traffic["queries"] = gathered + 2 * others * vector * sizes.num_positions
    return traffic


def report(config: PlannedRun) -> tuple[str, bool]:
    """The plan in words, and whether it fits. Raises ValueError for what no cluster could do."""
    cluster = config.cluster()
    try:
        plan = make_plan(config, cluster)
    except PlacementError as error:
        return f"does not fit: {error}", False
    batches, traffic = plan.batches, dict(plan.traffic)
    budget = cluster.device_bytes or cluster.host_bytes
    usable = (1 - SPARE_FRACTION) * budget
    host = sum(plan.host.values())
    is_one_memory = not cluster.device_bytes
    fits = plan.device_bytes + is_one_memory * host <= usable and host <= cluster.host_bytes
    dense = traffic.pop("dense")
    power = config.plan.popularity_power
    ids = "all distinct" if power is None else f"popularity rank ** -{power}"
    where = "plan.num_items" if config.plan.num_items else f"data.path {config.data.path}"
    lines = [
        f"items       {plan.num_items:,} of {where}",
        f"ranks       {config.world}, {cluster.num_ranks} of {budget / GIB:.1f} GiB, {cluster.device_type}",
        f"sharding    {plan.sharding} of {config.encoder.dim}, {config.table.optimizer}",
        f"batch       {batches.num_events:,.0f} events a step, at most {batches.fullest.sum():,} a rank "
        f"({len(batches.fullest):,} histories); {plan.num_asked:,} items read a rank ({ids})",
        f"GiB a rank  {plan.device_bytes / GIB:.2f}: {_listed(plan.device, GIB)}",
        f"            of {usable / GIB:.1f}, {SPARE_FRACTION:.0%} being left to CUDA, NCCL and the allocator",
        f"host        {host / GIB:.2f} GiB a rank of {cluster.host_bytes / GIB:.1f}: "
        f"{_listed(plan.host, GIB)}",
        f"all-to-all  {sum(traffic.values()) / 1e6:.2f} MB leave a rank a step: {_listed(traffic, 1e6)}; "
        f"all-reduce {dense / 1e6:.2f} MB",
        f"imbalance   {batches.imbalance:.3f} in the mean of {config.plan.num_steps} steps, "
        f"{batches.worst_imbalance:.3f} at worst (FLOPs of the slowest rank over the mean)"
        + _advice_on_balance(batches),
        "fits" if fits else f"does not fit: {_advice(plan, usable, cluster)}",
    ]
    return "\n".join(lines), fits


def _advice(plan: Plan, usable: float, cluster: Cluster) -> str:
    """What would make a plan fit that does not."""
    if sum(plan.host.values()) > cluster.host_bytes:
        return (
            "rows are more than the host's memory; give more ranks, hosts with more (plan.host_gib), or "
            "checkpoint.in_background=false, which spares the copy"
        )
    rows = plan.device["table"] + plan.device["row state"]
    if rows < usable / 2:
        return "give smaller batches or more ranks; rows are the smaller part"
    is_cuda = cluster.device_type == "cuda"
    return "give more ranks" + (" or table.kernel=uvm_caching" if is_cuda else "")


def _advice_on_balance(batches: Batches) -> str:
    if batches.imbalance < LARGE_IMBALANCE:
        return ""
    return (
        f"; a rank has {len(batches.fullest)} histories: the batch is small for so many ranks, raise "
        "data.batch_events or data.batch_users"
    )


def _listed(parts: dict[str, float], unit: float) -> str:
    return ", ".join(f"{name} {value / unit:.2f}" for name, value in parts.items())
