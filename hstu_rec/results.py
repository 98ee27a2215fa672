"""The figures of a trained model, as result.json has them."""

from collections.abc import Callable
from typing import Any

from hstu_rec import distributed, hosts
from hstu_rec.baselines import baseline_metrics
from hstu_rec.config import PARTS, RunConfig
from hstu_rec.data.known_best import best_recall
from hstu_rec.data.stream import Sequences
from hstu_rec.data.synthetic import SyntheticDataset
from hstu_rec.evaluator import evaluate
from hstu_rec.learner import Learner
from hstu_rec.resuming import Progress
from hstu_rec.top_lists import beyond_accuracy, examples, top_lists


def result_of(
    config: RunConfig,
    learner: Learner,
    dataset: Sequences,
    progress: Progress,
    made_with: dict[str, str | None],
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The final figures of the model that `learner` holds; after_batch: of `evaluate`. Collective."""
    valid, test = (
        evaluate(learner.model, dataset, split, config.eval, learner.device, after_batch)
        for split in ("valid", "test")
    )
    baselines, with_groups = {}, config.eval.with_groups
    if config.eval.with_baselines:
        baselines = baseline_metrics(dataset, "test", config.eval.ks, with_groups)
    groups = {}
    if with_groups:
        groups = {"model": test.pop("groups")}
        groups |= {name: row.pop("groups") for name, row in baselines.items()}
    listed = _listed(config, learner, dataset, after_batch)
    num_events = learner.stream.num_positions * progress.epoch
    encoder = config.encoder
    return {
        "protocol": {
            "use_query_time": encoder.query_time == "next",
            "max_history_len": encoder.max_history_len,
            "num_candidates": dataset.num_items,
            "num_users": test["num_users"],
            "num_repeated_targets": test["num_repeated_targets"],
            "seen_bias": seen_bias_of(learner),
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
        "groups": groups,
        **listed,
        "timing": {
            "prepare_s": dataset.stats.get("prepare_s"),
            "train_s": progress.train_s,
            "events_per_s": num_events / progress.train_s if progress.train_s else 0.0,
            "epochs": progress.epoch,
            "best_epoch": progress.best_epoch,
            "max_epochs": config.train.max_epochs,
            "processes": distributed.world_size(),
            "device": distributed.device_name(learner.device),
        },
        "versions": made_with,
    }


def _listed(
    config: RunConfig, learner: Learner, dataset: Sequences, after_batch: Callable[[], None]
) -> dict[str, Any]:
    """What is told of the lists of test users."""
    settings = config.eval
    if not settings.num_listed_users:
        return {}
    lists = top_lists(learner.model, dataset, settings, learner.device, after_batch)
    shown = hosts.on_main(lambda: examples(lists, dataset, settings.num_examples))
    return {"recommended": beyond_accuracy(lists, dataset), "examples": shown}


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


def seen_bias_of(learner: Learner) -> float | None:
    """What the model learned to add to the logits of seen items."""
    bias = learner.loss.seen_bias()
    return None if bias is None else float(bias.detach())
