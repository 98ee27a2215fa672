"""train(config): a run from a prepared dataset to its report.

start -> epochs of Learner.step, validations, checkpoints -> test with the best -> report
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hstu_rec import checkpoint, distributed, hosts, resuming
from hstu_rec.comparison import rows_beside
from hstu_rec.config import PARTS, RunConfig, to_yaml
from hstu_rec.data.stream import Sequences, check_frequent, open_dataset
from hstu_rec.evaluator import evaluate
from hstu_rec.flops import history_flops, peak_flops
from hstu_rec.learner import Learner, check_graphs, resolved
from hstu_rec.report import metric_table, write_report
from hstu_rec.results import result_of, seen_bias_of
from hstu_rec.resuming import Progress
from hstu_rec.run_folder import run_folder
from hstu_rec.running import opened_alike, run_through, settled
from hstu_rec.runs import measured_config
from hstu_rec.starts import start_of
from hstu_rec.tracking import Tracker
from hstu_rec.training import Run, Validation
from hstu_rec.versions import versions


@dataclass(frozen=True)
class NextItemRun(Run):
    """A run of the next-item model."""

    config: RunConfig
    learner: Learner
    beside: dict[str, Any]
    """Rows of eval.compare_with."""

    def begin(self) -> None:
        """Measures what the devices reach, while nothing else is on them."""
        _ = self._flops

    def opening(self) -> str:
        """The data, the model, and how it is trained."""
        learner, config, dataset = self.learner, self.config, self.dataset
        num_dense = sum(one.numel() for one in learner.dense)
        table_mib = dataset.num_items * config.encoder.dim * 4 / 2**20
        loss = config.loss
        count = "" if loss.negatives in ("all", "in_batch") else f" {loss.num_negatives}"
        remarks = []
        if count and loss.num_negatives >= dataset.num_items:
            remarks = [
                f"remark      {loss.num_negatives:,} negatives are drawn of {dataset.num_items:,} items; "
                "loss.negatives=all takes every item once"
            ]
        return "\n".join(
            [
                f"run         {self.folder}",
                f"data        {dataset.path}: {dataset.num_users:,} users, {dataset.num_items:,} items, "
                f"{dataset.num_events:,} events",
                _histories(config, learner),
                f"model       {config.encoder.attention} attention, {num_dense:,} dense parameters, "
                f"item table {table_mib:.2f} MiB over {distributed.world_size()} ranks",
                f"sharding    {config.table.sharding}, {config.table.optimizer} in the backward pass",
                f"loss        softmax, negatives {loss.negatives}{count}, {loss.similarity}"
                + (", seen bias" if loss.use_seen_bias else ""),
                f"device      {learner.device}, {distributed.world_size()} processes, "
                f"{config.train.precision}, attention kernel {learner.encoder.attention_kernel()}",
                *remarks,
            ]
        )

    def validate(self, after_batch: Callable[[], None]) -> Validation:
        """Recall, NDCG and MRR of the validation targets."""
        learner, settings = self.learner, self.config.validation()
        metrics = evaluate(
            learner.model, self.dataset, "valid", settings, learner.device, after_batch=after_batch
        )
        flat = {f"{part}/{name}": value for part in PARTS for name, value in metrics[part].items()}
        bias, select = seen_bias_of(learner), self.config.train.select
        learned = {} if bias is None else {"seen_bias": bias}
        return Validation(select, flat[select], flat | learned)

    def speed(self, share: float, spent_s: float) -> dict[str, float]:
        """Events a second of that share of an epoch over all ranks; on CUDA also TFLOP/s, their share of what
        the devices' products reach, and the most GiB held by this rank's tensors so far."""
        learner, (flops, peak) = self.learner, self._flops
        speed = {"events_per_s": share * learner.stream.num_positions / spent_s}
        if peak:
            speed["tflop_per_s"] = share * flops / spent_s / 1e12
            speed["mfu"] = share * flops / spent_s / peak
            speed["peak_gib"] = torch.cuda.max_memory_allocated(learner.device) / 2**30
        return speed

    @cached_property
    def _flops(self) -> tuple[float, float]:
        """(FLOPs of an epoch over all ranks, FLOP/s that the ranks' devices reach at most); 0 on CPU."""
        learner, config = self.learner, self.config
        if learner.device.type != "cuda":
            return 0.0, 0.0
        lengths = learner.stream.mean_lengths()
        costs = history_flops(config.encoder, config.loss, self.dataset.num_items, lengths)
        dtype = distributed.product_dtype(config.train.precision)
        return float(costs.sum()), peak_flops(learner.device, dtype) * distributed.world_size()

    def result(self, progress: Progress, after_batch: Callable[[], None]) -> dict[str, Any]:
        """Metrics of both splits, baselines, groups, lists, and the rows beside them."""
        learner, dataset = self.learner, self.dataset
        found = result_of(self.config, learner, dataset, progress, self.made_with, after_batch)
        found["further"] |= self.beside
        return found

    def test_figures(self, result: dict[str, Any]) -> dict[str, float]:
        """seen_masked/recall@10, ..."""
        return {
            f"{part}/{name}": value
            for part, values in result["test"].items()
            for name, value in values.items()
        }

    def write_report(self, result: dict[str, Any]) -> None:
        """report.md, its pictures and result.json; prints the table of the test."""
        write_report(self.folder, result, to_yaml(self.config))
        print(f"\n{metric_table(result)}\n\nrun folder: {self.folder}", flush=True)


def train(config: RunConfig) -> dict[str, Any]:
    """Trains, evaluates and reports; returns what result.json holds. Collective.

    The run's folder ends with report.md, curves.png, result.json, config.yaml and the checkpoints.
    """
    made_with = versions()  # now, because the source may change while it trains
    with distributed.process_group(config.train.device) as device:
        config = settled(config)
        dataset = opened_alike(config, made_with, lambda: _opened(config))
        beside = _beside(config, dataset)
        # Before anything is written:
        folder = run_folder(config.train, config.name)
        start = start_of(config.train.resume, folder / "checkpoints", config.train.warm_start)
        config = resolved(config, dataset, start.encoder)
        start.check(config, dataset)
        check_graphs(config, device)

        def run_of(tracker: Tracker) -> NextItemRun:
            learner = Learner(config, dataset, device)
            return NextItemRun(config, folder, dataset, learner, tracker, made_with, beside)

        return run_through(config, folder, start, run_of)


def _beside(config: RunConfig, dataset: Sequences) -> dict[str, Any]:
    """The rows of eval.compare_with, read before they are needed. Collective; raises on all ranks."""
    uses_query_time = config.encoder.query_time == "next"
    paths = config.eval.compare_with
    return hosts.on_main(
        lambda: rows_beside(paths, config.data.path, dataset.facts, uses_query_time)
    )


def evaluate_run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Validation and test metrics of a finished run's best checkpoint, at any world size. Collective.

    Raises ValueError on all ranks for overrides that would make another model, or change nothing.
    """
    with distributed.process_group():
        configs = hosts.together(lambda: measured_config(folder, overrides))
        config = configs[distributed.rank()]
        device = hosts.together(lambda: distributed.start(config.train.device))[distributed.rank()]
        dataset = opened_alike(config, versions(), lambda: _opened(config))
        beside = _beside(config, dataset)
        # Of how it was trained; here it need not be a GPU.
        train = replace(config.train, cuda_graphs=False, compile=False)
        learner = Learner(replace(config, train=train), dataset, device)
        best = resuming.found_at(checkpoint.resolve(folder / "checkpoints", "best"))
        progress = resuming.load(best, learner, dataset)
        result = result_of(config, learner, dataset, progress, versions())
        result["further"] |= beside
        return result


def _opened(config: RunConfig) -> Sequences:
    dataset = open_dataset(config.data)
    if least := config.eval.min_train_count:
        check_frequent(dataset, least)
    return dataset


def _histories(config: RunConfig, learner: Learner) -> str:
    """How many histories are cut in training."""
    stream, longest = learner.stream, config.encoder.max_history_len
    num_cut = int((stream.dataset.train_ends[stream.users] - 1 > longest).sum())
    trained = f"{num_cut:,} of {len(stream.users):,} that are trained on have more"
    return f"histories   the newest {longest} events; {trained}"
