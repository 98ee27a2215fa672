"""train(config): a run from a prepared dataset to its report.

start -> epochs of Learner.step, validations, checkpoints -> test with the best -> report
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hstu_rec import checkpoint, distributed, hosts, lock, resuming
from hstu_rec.checkpoint import Saver
from hstu_rec.comparison import rows_beside
from hstu_rec.config import RunConfig, leaves, save, to_yaml
from hstu_rec.data.stream import Sequences, check_frequent, open_dataset
from hstu_rec.learner import Learner, check_graphs, resolved
from hstu_rec.report import metric_table, write_report
from hstu_rec.results import result_of
from hstu_rec.runs import measured_config
from hstu_rec.signals import StopRequest
from hstu_rec.starts import load_best, start_of
from hstu_rec.trackers import check_installed
from hstu_rec.tracking import METRICS_FILE, Tracker
from hstu_rec.training import Run, Training
from hstu_rec.versions import versions

# Folders of runs that were given none.
RUNS = Path("runs")
# By one of them a run's folder is known.
OF_A_RUN = ("checkpoints", "config.yaml", METRICS_FILE, lock.LOCK)


def train(config: RunConfig) -> dict[str, Any]:
    """Trains, evaluates and reports; returns what result.json holds. Collective.

    The run's folder ends with report.md, curves.png, result.json, config.yaml and the checkpoints.
    """
    made_with = versions()  # now, because the source may change while it trains
    with distributed.process_group(config.train.device) as device:
        config = _gone_on_with(config)
        hosts.on_main(lambda: check_installed(config.tracking.to))
        dataset = _opened(config, made_with)
        beside = _beside(config, dataset)
        # Before anything is written:
        folder = _run_folder(config)
        start = start_of(config, folder / "checkpoints")
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
            run = Run(config, folder, dataset, learner, tracker, made_with)
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


def _gone_on_with(config: RunConfig) -> RunConfig:
    """The same, but where the launcher has started the job again and train.run_dir names no folder: to go on
    in the one that it began."""
    job = distributed.job()
    if config.train.run_dir or job is None or not distributed.num_restarts():
        return config
    folder = hosts.on_main(lambda: lock.folder_of(job, RUNS))
    if folder is None:
        return config
    return replace(config, train=replace(config.train, run_dir=str(folder), resume="auto"))


def _run_folder(config: RunConfig) -> Path:
    """train.run_dir, or `runs/<time>-<name>`, the same on every rank.

    Raises ValueError on all ranks when another run is there already, or train.resume is nowhere.
    """
    resume = config.train.resume
    hosts.together(lambda: _check_resume(resume))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = hosts.on_main(lambda: Path(config.train.run_dir or RUNS / f"{stamp}-{config.name}"))
    # Process 0 looks, because it also begins to write.
    hosts.on_main(lambda: _check_unused(folder, resume))
    return folder


def _check_resume(resume: str) -> None:
    if resume not in ("none", "auto") and not Path(resume).is_dir():
        raise ValueError(
            f"train.resume '{resume}' does not exist; give none, auto (the newest checkpoint of "
            "train.run_dir), or a checkpoint's folder, RUN/checkpoints/step_<number>"
        )


def _check_unused(folder: Path, resume: str) -> None:
    is_own = resume == "auto" or Path(resume).is_relative_to(folder)
    metrics = folder / METRICS_FILE
    # A file without a row was left by a run that could not begin.
    is_used = (folder / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size)
    if not is_own and is_used:
        raise ValueError(
            f"train.run_dir {folder} holds a run already; give another folder, remove this one, or go "
            "on with that run: train.resume=auto"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"train.run_dir {folder} is no folder; give one")
    # What begins with a dot a run may have left that was killed as it began (hosts.make_shared).
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not names & {*OF_A_RUN} and any(not name.startswith(".") for name in names):
        raise ValueError(
            f"train.run_dir {folder} holds other files, and no run; give a folder that is empty or not there"
        )


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
