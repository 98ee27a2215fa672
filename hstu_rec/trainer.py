"""train(config): a run from a prepared dataset to its report.

epochs of Learner.step -> validation -> best and last checkpoint -> test with the best -> report
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hstu_rec import checkpoint, distributed, hosts
from hstu_rec.baselines import baseline_metrics
from hstu_rec.config import RunConfig, leaves, load, save, to_yaml
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.item_map import keep_item_map
from hstu_rec.data.known_best import best_recall
from hstu_rec.data.stream import Sequences, check_frequent, open_dataset
from hstu_rec.data.synthetic import SyntheticDataset
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.evaluator import evaluate
from hstu_rec.flops import history_flops, peak_flops
from hstu_rec.learner import Learner, check_graphs, resolved
from hstu_rec.report import metric_table, write_report
from hstu_rec.runs import measured_config
from hstu_rec.tracking import Tracker
from hstu_rec.versions import versions
from hstu_rec.warm_start import FormerRun, former_run, warm_start

PARTS = ("seen_masked", "seen_allowed")


@dataclass
class Progress:
    """Where a run stands; what a checkpoint's meta.json holds."""

    epoch: int = 0
    step: int = 0
    best: float | None = None
    best_epoch: int = 0
    num_without_gain: int = 0
    train_s: float = 0.0
    steps_before: int = 0
    """Steps that the weights had seen in the runs that this one was warm started from."""


def train(config: RunConfig) -> dict[str, Any]:
    """Trains, evaluates and reports; returns what result.json holds. Collective.

    The run's folder ends with report.md, curves.png, result.json, config.yaml and the checkpoints.
    """
    made_with = versions()  # now, because the source may change while it trains
    with distributed.process_group(config.train.device) as device:
        dataset = _opened(config, made_with)
        # Before anything is written:
        folder = _run_folder(config)
        found, told = _found(config, folder)
        is_warm = found is None and config.train.warm_start != ""
        former = former_run(config.train.warm_start) if is_warm else None
        config = resolved(config, dataset, _former_encoder(found, former))
        if former is not None:
            former.check(config)
        check_graphs(config, device)
        hosts.make_shared(folder, "train.run_dir")
        with Tracker(folder, distributed.is_main()) as tracker:
            learner = Learner(config, dataset, device)
            tracker.say(_opening(config, dataset, learner, folder))
            for sentence in told:
                tracker.say(sentence)
            if former is None:
                progress = _resume(found, learner, dataset, folder, tracker)
                if isinstance(dataset, Dataset):
                    hosts.on_main(lambda: keep_item_map(dataset.path, folder))
            else:
                progress = _warm_start(former, learner, dataset, folder, tracker)
            # Now that a checkpoint fits: those of a folder are of its configuration.
            hosts.on_main(lambda: save(config, folder / "config.yaml"))
            if former is not None:
                # What it begins with may stay the best.
                _validate(config, learner, dataset, folder, tracker, progress)
            _fit(config, learner, dataset, folder, tracker, progress)
            _load(checkpoint.resolve(folder / "checkpoints", "best"), learner, dataset)
            result = _result(config, learner, dataset, progress, made_with)
            tracker.log("test", progress.step, result["test"]["seen_allowed"])
        if distributed.is_main():
            write_report(folder, result, to_yaml(config))
            print(f"\n{metric_table(result)}\n\nrun folder: {folder}", flush=True)
        distributed.barrier()
        return result


def evaluate_run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Validation and test metrics of a finished run's best checkpoint, at any world size. Collective.

    Raises ValueError on all ranks for overrides that would make another model, or change nothing.
    """
    with distributed.process_group():
        configs = hosts.together(lambda: measured_config(folder, overrides))
        config = configs[distributed.rank()]
        device = hosts.together(lambda: distributed.start(config.train.device))[distributed.rank()]
        dataset = _opened(config, versions())
        # Of how it was trained; here it need not be a GPU.
        train = replace(config.train, cuda_graphs=False, compile=False)
        learner = Learner(replace(config, train=train), dataset, device)
        progress = _load(checkpoint.resolve(folder / "checkpoints", "best"), learner, dataset)
        return _result(config, learner, dataset, progress, versions())


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


def _fit(
    config: RunConfig,
    learner: Learner,
    dataset: Sequences,
    folder: Path,
    tracker: Tracker,
    progress: Progress,
) -> None:
    """Epochs until patience or max_epochs ends them."""
    settings = config.train
    flops_of_epoch, peak = _flops(config, learner, dataset)
    bar = tracker.bar(settings.max_epochs, "training", "epoch")
    bar.update(progress.epoch)
    while progress.epoch < settings.max_epochs and not _is_out_of_patience(config, progress):
        began_at = time.monotonic()
        loss = _train_epoch(learner, tracker, progress, settings.log_every_steps)
        spent_s = time.monotonic() - began_at
        progress.train_s += spent_s
        progress.epoch += 1
        bar.update(1)
        speed = _speed(learner, flops_of_epoch, peak, spent_s)
        tracker.log("speed", progress.step, speed)
        bar.set_postfix_str(f"loss {loss:.3f}  {_shown(speed)}")
        is_last = progress.epoch == settings.max_epochs
        if progress.epoch % settings.eval_every_epochs == 0 or is_last:
            _validate(config, learner, dataset, folder, tracker, progress)
    bar.close()


def _flops(config: RunConfig, learner: Learner, dataset: Sequences) -> tuple[float, float]:
    """(FLOPs of an epoch over all ranks, FLOP/s that the ranks' devices reach at most; 0 on CPU)."""
    stream, device = learner.stream, learner.device
    lengths = stream.mean_lengths()
    flops = float(history_flops(config.encoder, config.loss, dataset.num_items, lengths).sum())
    if device.type != "cuda":
        return flops, 0.0
    dtype = distributed.product_dtype(config.train.precision)
    return flops, peak_flops(device, dtype) * distributed.world_size()


def _speed(learner: Learner, flops: float, peak: float, spent_s: float) -> dict[str, float]:
    """Events a second of an epoch over all ranks; on CUDA also TFLOP/s, their share of what the devices'
    products reach, and the most GiB held by this rank's tensors so far."""
    speed = {"events_per_s": learner.stream.num_positions / spent_s}
    if peak:
        speed["tflop_per_s"] = flops / spent_s / 1e12
        speed["mfu"] = flops / spent_s / peak
        speed["peak_gib"] = torch.cuda.max_memory_allocated(learner.device) / 2**30
    return speed


def _shown(speed: dict[str, float]) -> str:
    text = f"events/s {speed['events_per_s']:,.0f}"
    if "mfu" in speed:
        text += f"  TFLOP/s {speed['tflop_per_s']:.1f} (MFU {speed['mfu']:.1%})  {speed['peak_gib']:.1f} GiB"
    return text


def _is_out_of_patience(config: RunConfig, progress: Progress) -> bool:
    return 0 < config.train.patience <= progress.num_without_gain


def _train_epoch(
    learner: Learner, tracker: Tracker, progress: Progress, log_every_steps: int
) -> float:
    """All steps of the epoch; the last one's loss."""
    learner.model.train()
    loss = math.nan
    for index in range(learner.stream.num_steps(progress.epoch)):
        loss = learner.step(progress.epoch, index, progress.step)
        if progress.step % log_every_steps == 0:
            imbalance = learner.stream.imbalance(progress.epoch, index)
            tracker.log("train", progress.step, {"loss": loss, "imbalance": imbalance})
        progress.step += 1
    return loss


def _validate(
    config: RunConfig,
    learner: Learner,
    dataset: Sequences,
    folder: Path,
    tracker: Tracker,
    progress: Progress,
) -> None:
    """Measures, saves, and moves `best` when the selected validation metric gained."""
    metrics = evaluate(learner.model, dataset, "valid", config.eval, learner.device)
    flat = {f"{part}/{name}": value for part in PARTS for name, value in metrics[part].items()}
    value = flat[config.train.select]
    is_better = progress.best is None or value > progress.best
    progress.num_without_gain = 0 if is_better else progress.num_without_gain + 1
    if is_better:
        progress.best, progress.best_epoch = value, progress.epoch
    bias = _seen_bias(learner)
    learned = {} if bias is None else {"seen_bias": bias}
    tracker.log("valid", progress.step, {"epoch": progress.epoch, **flat, **learned})
    tracker.say(
        f"epoch {progress.epoch:3d}  step {progress.step}  valid {config.train.select} {value:.4f}"
        f"  best {progress.best:.4f} (epoch {progress.best_epoch})  train {progress.train_s:.0f} s"
    )
    root = folder / "checkpoints"
    meta = {"progress": vars(progress), "items": dataset.stats.get("item_map_hash")}
    saved = checkpoint.save(root, progress.step, learner.state(), meta)
    checkpoint.point(root, "last", saved)
    if is_better:
        checkpoint.point(root, "best", saved)
    checkpoint.purge(root, config.train.keep_checkpoints)


def _seen_bias(learner: Learner) -> float | None:
    """What the model learned to add to the logits of seen items."""
    bias = learner.loss.seen_bias()
    return None if bias is None else float(bias.detach())


def _found(config: RunConfig, folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that train.resume names, None when there is none, and what is to be told about it."""
    if config.train.resume == "none":
        return None, []
    if config.train.resume != "auto":
        return Path(config.train.resume), []
    found, skipped = checkpoint.newest(folder / "checkpoints")
    told = [f"resume: {sentence}" for sentence in skipped]
    if found is None:
        how = "from train.warm_start" if config.train.warm_start else "anew"
        told.append(f"resume: no complete checkpoint, starting {how}")
    return found, told


def _former_encoder(found: Path | None, former: FormerRun | None) -> EncoderConfig | None:
    """That of the run whose weights this one begins with."""
    if former is not None:
        return former.config.encoder
    written = None if found is None else found.parent.parent / "config.yaml"
    if written is None or not written.is_file():
        return None
    return load(RunConfig, [str(written)]).encoder


def _resume(
    found: Path | None, learner: Learner, dataset: Sequences, folder: Path, tracker: Tracker
) -> Progress:
    """Loads the checkpoint `found`, or begins anew."""
    if found is None:
        learner.begin()
        return Progress()
    root = folder / "checkpoints"
    progress = _load(found, learner, dataset)
    learner.continue_at(progress.steps_before + progress.step)
    if found.parent.resolve() != root.resolve():
        # The best of another folder cannot be tested from here.
        progress.best, progress.best_epoch, progress.num_without_gain = None, 0, 0
    elif progress.best_epoch == progress.epoch:
        checkpoint.point(root, "best", found)  # the stop may have come before the pointer moved
    tracker.say(f"resume: {found}, epoch {progress.epoch}, step {progress.step}")
    return progress


def _warm_start(
    former: FormerRun, learner: Learner, dataset: Sequences, folder: Path, tracker: Tracker
) -> Progress:
    """Begins as `former` ended, with the items of `dataset`."""
    assert isinstance(dataset, Dataset)  # the configuration was checked
    begun = warm_start(former, learner, dataset, folder)
    items = begun.items
    tracker.say(
        f"warm start  {former.checkpoint}, {begun.num_steps} steps: {items.num_known:,} items known, "
        f"{items.num_new:,} new (rows: {learner.config.table.new_rows}), {items.num_retired:,} retired"
    )
    tracker.log("warm_start", 0, asdict(items))
    return Progress(steps_before=begun.num_steps)


def _load(path: Path, learner: Learner, dataset: Sequences) -> Progress:
    """Fills the learner from a checkpoint. Raises ValueError when it was trained on other items."""
    if checkpoint.read_meta(path).get("items") != dataset.stats.get("item_map_hash"):
        raise ValueError(
            f"{path} was trained on other items than {dataset.path} has, or on another order of "
            "them; give the dataset folder that it was trained on as data.path, or begin another run "
            f"with its rows: train.warm_start={path}"
        )
    meta = checkpoint.load(path, learner.state())
    return Progress(**meta["progress"])


def _result(
    config: RunConfig,
    learner: Learner,
    dataset: Sequences,
    progress: Progress,
    made_with: dict[str, str | None],
) -> dict[str, Any]:
    """The final figures, as result.json has them."""
    valid, test = (
        evaluate(learner.model, dataset, split, config.eval, learner.device)
        for split in ("valid", "test")
    )
    baselines = (
        baseline_metrics(dataset, "test", config.eval.ks) if config.eval.with_baselines else {}
    )
    num_events = learner.stream.num_positions * progress.epoch
    encoder = config.encoder
    return {
        "protocol": {
            "use_query_time": encoder.query_time == "next",
            "max_history_len": encoder.max_history_len,
            "num_candidates": dataset.num_items,
            "num_users": test["num_users"],
            "num_repeated_targets": test["num_repeated_targets"],
            "seen_bias": _seen_bias(learner),
            "test_history_includes_valid": True,
            "selection_metric": config.train.select,
            "seed": config.train.seed,
            "split": dataset.stats["split"],
            "data": dataset.facts,
            **_of_frequent(config, test),
        },
        "test": {part: test[part] for part in PARTS},
        "valid": {part: valid[part] for part in PARTS},
        "baselines": baselines,
        "further": _further(config, dataset, test),
        "timing": {
            "prepare_s": dataset.stats.get("prepare_s"),
            "train_s": progress.train_s,
            "events_per_s": num_events / progress.train_s if progress.train_s else 0.0,
            "epochs": progress.epoch,
            "best_epoch": progress.best_epoch,
            "processes": distributed.world_size(),
            "device": distributed.device_name(learner.device),
        },
        "versions": made_with,
    }


def _of_frequent(config: RunConfig, test: dict[str, Any]) -> dict[str, int]:
    """The protocol of eval.min_train_count."""
    if not (least := config.eval.min_train_count):
        return {}
    return {"min_train_count": least, "num_frequent_targets": test["frequent"]["num_users"]}


def _further(config: RunConfig, dataset: Sequences, test: dict[str, Any]) -> dict[str, Any]:
    """Rows over frequent targets alone, and where it is known what the best possible result is."""
    least, rows = config.eval.min_train_count, {}
    if least:
        rows[f"model, {least}+ events"] = {part: test["frequent"][part] for part in PARTS}
    if isinstance(dataset, SyntheticDataset):
        for count in sorted({0, least}):
            best = best_recall(dataset, "test", config.eval.ks, count)
            name = "best possible" + (f", {count}+ events" if count else "")
            rows[name] = {"seen_allowed": {f"recall@{k}": one.expected for k, one in best.items()}}
    return rows


def _run_folder(config: RunConfig) -> Path:
    """train.run_dir, or runs/<time>-<name>, the same on every rank.

    Raises ValueError on all ranks when another run is there already, or train.resume is nowhere.
    """
    resume = config.train.resume
    hosts.together(lambda: _check_resume(resume))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = hosts.on_main(lambda: Path(config.train.run_dir or f"runs/{stamp}-{config.name}"))
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
    if not is_own and any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl")):
        raise ValueError(
            f"train.run_dir {folder} holds a run already; give another folder, remove this one, or go "
            "on with that run: train.resume=auto"
        )


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
            f"model       {config.encoder.attention} attention, {num_dense:,} dense parameters, "
            f"item table {table_mib:.2f} MiB over {distributed.world_size()} ranks",
            f"sharding    {config.table.sharding}, {config.table.optimizer} in the backward pass",
            f"loss        softmax, negatives {loss.negatives}{count}, {loss.similarity}"
            + (", seen bias" if loss.use_seen_bias else ""),
            f"device      {learner.device}, {distributed.world_size()} processes, "
            f"{config.train.precision}, attention kernel {learner.encoder.attention_kernel()}",
        ]
    )
