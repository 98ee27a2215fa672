"""train(config): a run from a prepared dataset to its report.

start -> epochs of Learner.step, validations, checkpoints -> test with the best -> report
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hstu_rec import checkpoint, distributed, hosts, lock, resuming
from hstu_rec.checkpoint import Saver
from hstu_rec.comparison import rows_beside
from hstu_rec.config import PARTS, RunConfig, leaves, save, to_yaml
from hstu_rec.data.stream import Sequences, check_frequent, open_dataset
from hstu_rec.evaluator import evaluate
from hstu_rec.flops import history_flops, peak_flops
from hstu_rec.learner import Learner, check_graphs, resolved
from hstu_rec.report import metric_table, write_report
from hstu_rec.results import result_of, seen_bias_of
from hstu_rec.run_folder import of_this_job, run_folder
from hstu_rec.runs import measured_config
from hstu_rec.signals import StopRequest
from hstu_rec.starts import load_best, start_of
from hstu_rec.trackers import check_installed
from hstu_rec.tracking import Tracker
from hstu_rec.training import Run, Training, Validation
from hstu_rec.versions import versions


@dataclass(frozen=True)
class NextItemRun(Run):
    """A run of the next-item model."""

    config: RunConfig
    learner: Learner

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
        """(FLOPs of an epoch over all ranks, FLOP/s that the ranks' devices reach at most; 0 on CPU)."""
        learner, config = self.learner, self.config
        lengths = learner.stream.mean_lengths()
        costs = history_flops(config.encoder, config.loss, self.dataset.num_items, lengths)
        if learner.device.type != "cuda":
            return float(costs.sum()), 0.0
        dtype = distributed.product_dtype(config.train.precision)
        return float(costs.sum()), peak_flops(learner.device, dtype) * distributed.world_size()


def train(config: RunConfig) -> dict[str, Any]:
    """Trains, evaluates and reports; returns what result.json holds. Collective.

    The run's folder ends with report.md, curves.png, result.json, config.yaml and the checkpoints.
    """
    made_with = versions()  # now, because the source may change while it trains
    with distributed.process_group(config.train.device) as device:
        if begun := of_this_job(config.train):
            train = replace(config.train, run_dir=str(begun), resume="auto")
            config = replace(config, train=train)
        hosts.on_main(lambda: check_installed(config.tracking.to))
        dataset = _opened(config, made_with)
        beside = _beside(config, dataset)
        # Before anything is written:
        folder = run_folder(config.train, config.name)
        start = start_of(config.train.resume, folder / "checkpoints", config.train.warm_start)
        config = resolved(config, dataset, start.encoder)
        start.check(config, dataset)
        check_graphs(config, device)
        hosts.make_shared(folder, "train.run_dir")
        with (
            lock.only_run_in(folder),
            StopRequest() as stop,
            Tracker(folder, distributed.is_main(), config.tracking) as tracker,
            Saver(folder / "checkpoints", config.checkpoint) as saver,
        ):
            hosts.on_main(lambda: tracker.begin(folder.name, leaves(config)))
            learner = Learner(config, dataset, device)
            tracker.say(_opening(config, dataset, learner, folder))
            for sentence in start.told:
                tracker.say(sentence)
            run = NextItemRun(config, folder, dataset, learner, tracker, made_with)
            progress = start.begin(run)
            # Now that a checkpoint fits: those of a folder are of its configuration.
            hosts.on_main(lambda: save(config, folder / "config.yaml"))
            training = Training(run, progress, saver, stop)
            training.train()
            load_best(run)
            result = result_of(
                config, learner, dataset, progress, made_with, training.stop_if_asked
            )
            result["further"] |= beside
            tracker.log("test", progress.step, result["test"]["seen_allowed"])
            tracker.summarise(_summary(result))
        if distributed.is_main():
            write_report(folder, result, to_yaml(config))
            print(f"\n{metric_table(result)}\n\nrun folder: {folder}", flush=True)
        distributed.barrier()
        return result


def _beside(config: RunConfig, dataset: Sequences) -> dict[str, Any]:
    """The rows of eval.compare_with, read before they are needed. Collective; raises on all ranks."""
    uses_query_time = config.encoder.query_time == "next"
    paths = config.eval.compare_with
    return hosts.on_main(
        lambda: rows_beside(paths, config.data.path, dataset.facts, uses_query_time)
    )


def _summary(result: dict[str, Any]) -> dict[str, float]:
    """The final figures, by name."""
    test = {
        f"test/{part}/{name}": value
        for part, values in result["test"].items()
        for name, value in values.items()
    }
    return test | {"train_s": result["timing"]["train_s"]}


def evaluate_run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Validation and test metrics of a finished run's best checkpoint, at any world size. Collective.

    Raises ValueError on all ranks for overrides that would make another model, or change nothing.
    """
    with distributed.process_group():
        configs = hosts.together(lambda: measured_config(folder, overrides))
        config = configs[distributed.rank()]
        device = hosts.together(lambda: distributed.start(config.train.device))[distributed.rank()]
        dataset = _opened(config, versions())
        beside = _beside(config, dataset)
        # Of how it was trained; here it need not be a GPU.
        train = replace(config.train, cuda_graphs=False, compile=False)
        learner = Learner(replace(config, train=train), dataset, device)
        best = resuming.found_at(checkpoint.resolve(folder / "checkpoints", "best"))
        progress = resuming.load(best, learner, dataset)
        result = result_of(config, learner, dataset, progress, versions())
        result["further"] |= beside
        return result


def _opened(config: RunConfig, made_with: dict[str, str | None]) -> Sequences:
    """The dataset. Raises ValueError on all ranks when one has none, or other settings, code or data."""
    hosts.check_alike("the settings", leaves(config), "give every process the same")
    hosts.check_alike("the versions", made_with, "install and check out the same on every host")
    datasets: list[Sequences] = []
    hosts.together(lambda: datasets.append(open_dataset(config.data)))
    (dataset,) = datasets
    if least := config.eval.min_train_count:
        hosts.together(lambda: check_frequent(dataset, least))
    hosts.check_alike(
        f"the data in data.path {dataset.path}",
        dataset.identity,
        "copy the folder of one host to the others, or share it",
    )
    return dataset


def _histories(config: RunConfig, learner: Learner) -> str:
    """How many histories are cut in training."""
    stream, longest = learner.stream, config.encoder.max_history_len
    num_cut = int((stream.dataset.train_ends[stream.users] - 1 > longest).sum())
    trained = f"{num_cut:,} of {len(stream.users):,} that are trained on have more"
    return f"histories   the newest {longest} events; {trained}"


def _opening(config: RunConfig, dataset: Sequences, learner: Learner, folder: Path) -> str:
    """What a run says before it starts."""
    num_dense = sum(p.numel() for p in learner.dense)
    table_mib = dataset.num_items * config.encoder.dim * 4 / 2**20
    loss = config.loss
    count = "" if loss.negatives in ("all", "in_batch") else f" {loss.num_negatives}"
    return "\n".join(
        [
            f"run         {folder}",
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
        ]
    )
