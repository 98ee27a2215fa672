"""Going on with a run: where it stood, and whether what it is given is what it was trained on.

A checkpoint's meta.json holds, beside its tensors:

    progress   epoch, batch, step, ...: with the seed all that batches, negatives and dropout are functions of
    rates      learning rates of its last step
    alarm      what the losses were so far           num_skipped  steps in a row
    config     every setting          data   identity of the dataset          versions   of the code
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hstu_rec import checkpoint
from hstu_rec.any_learner import AnyLearner
from hstu_rec.checkpoint import CheckpointError
from hstu_rec.config import leaves
from hstu_rec.data.stream import Sequences
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.run_config import AnyRunConfig

# What may differ when a run goes on: sections and settings that change neither the model nor its batches.
FREE_SECTIONS = ("eval.", "checkpoint.", "guard.", "tracking.")
FREE = {"name", "data.path", "encoder.attention_kernel", "loss.exchange"}
FREE |= {f"table.{name}" for name in ("sharding", "kernel", "cache_load_factor", "new_rows")}
FREE |= {
    f"train.{name}"
    for name in (
        "max_epochs", "eval_every_epochs", "patience", "device", "cuda_graphs", "compile", "recompute",
        "resume", "resume_changed", "warm_start", "run_dir", "log_every_steps",
    )
}  # fmt: skip
# Those that make other batches: an epoch that was begun cannot be gone on with.
BATCHES = ("data.", "train.seed", "encoder.max_history_len")


@dataclass
class Progress:
    """Where a run stands; what a checkpoint's meta.json holds."""

    epoch: int = 0
    batch: int = 0
    """The next one of the epoch."""
    step: int = 0
    measured_epoch: int = -1
    """The last one with a validation at its end."""
    best: float | None = None
    best_epoch: int = 0
    num_without_gain: int = 0
    train_s: float = 0.0
    steps_before: int = 0
    """Steps that the weights had seen in the runs that this one was warm started from."""


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from."""

    path: Path
    meta: dict[str, Any]
    is_verified: bool = False
    """Whether its files were held against its manifest just now."""

    @property
    def encoder(self) -> EncoderConfig:
        """The encoder that was trained. Raises ValueError where it is of another version."""
        prefix, settings = "encoder.", self.meta["config"].items()
        own = {key.removeprefix(prefix): one for key, one in settings if key.startswith(prefix)}
        try:
            return EncoderConfig(**own)
        except TypeError as error:
            raise CheckpointError(
                f"{self.path} is of another version of this package: {error}; go on with that version"
            ) from error


def meta_of(
    config: AnyRunConfig,
    dataset: Sequences,
    learner: AnyLearner,
    progress: Progress,
    made_with: dict[str, Any],
) -> dict[str, Any]:
    """What a checkpoint's meta.json holds."""
    return {
        "progress": asdict(progress),
        "alarm": asdict(learner.alarm),
        "num_skipped": learner.guard.num_skipped,
        "rates": learner.optimizers.rates(progress.step),
        "items": dataset.stats.get("item_map_hash"),
        **_trained_with(config, dataset),
        "versions": made_with,
    }


def _trained_with(config: AnyRunConfig, dataset: Sequences) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    return {"config": leaves(config), "data": dataset.identity}


def find(resume: str, root: Path) -> tuple[Found | None, list[str]]:
    """The checkpoint that train.resume names, of `root` for auto, None when there is none, and what is to be
    told about it. Collective."""
    if resume == "none":
        return None, []
    if resume != "auto":
        return found_at(Path(resume)), []
    path, skipped = checkpoint.newest(root)
    if path is None and skipped:
        raise CheckpointError(
            f"train.resume=auto: no checkpoint of {root} can be gone on from: {_listed(skipped)}; remove "
            "that folder, or give another train.run_dir"
        )
    told = [f"resume: {one}" for one in skipped]
    return (None if path is None else replace(found_at(path), is_verified=True)), told


def found_at(path: Path) -> Found:
    """The checkpoint in `path`. Raises CheckpointError when there is none that a run has left. Collective."""
    meta = checkpoint.read_meta(path)
    if missing := {"progress", "config", "data", "versions", "alarm", "num_skipped"} - meta.keys():
        raise CheckpointError(
            f"{path} does not tell its {', '.join(sorted(missing))}: no run of this version left it"
        )
    return Found(path, meta)


def check(found: Found, config: AnyRunConfig, dataset: Sequences) -> tuple[list[str], bool]:
    """(what has changed since the checkpoint and is to be told, whether the batches have).

    Raises CheckpointError for any change unless train.resume_changed.
    """
    _check_items(found, dataset)
    # As JSON gives it back.
    now = json.loads(json.dumps(_trained_with(config, dataset), default=str))
    settings = _differing(found.meta["config"], now["config"])
    free = {key for key in settings if key in FREE or key.startswith(FREE_SECTIONS)}
    if config.optim.schedule != "constant":
        free.discard("train.max_epochs")  # which the rates end with
    changed = [settings[key] for key in settings if key not in free]
    data = _differing(found.meta["data"], now["data"])
    changed += [f"the data's {text}" for text in data.values()]
    if changed and not config.train.resume_changed:
        raise CheckpointError(
            f"train.resume: {found.path} was trained otherwise: {_listed(changed)}; give what it was "
            f"trained with, begin another run in another train.run_dir{_with_rows(found)}, or go on "
            "all the same: train.resume_changed=true"
        )
    is_other = bool(data) or any(key.startswith(BATCHES) for key in settings if key not in free)
    return [f"resume: changed since: {text}" for text in changed], is_other


def load(found: Found, learner: AnyLearner, dataset: Sequences) -> Progress:
    """Fills the learner from a checkpoint. Raises CheckpointError for other items. Collective."""
    _check_items(found, dataset)
    checkpoint.load(found.path, learner.state(), is_verified=found.is_verified)
    return Progress(**found.meta["progress"])


def _check_items(found: Found, dataset: Sequences) -> None:
    if found.meta.get("items") != dataset.stats.get("item_map_hash"):
        raise CheckpointError(
            f"{found.path} was trained on other items than {dataset.path} has, or on another order of "
            "them; give the dataset folder that it was trained on as data.path, or begin another run"
            f"{_with_rows(found)}"
        )


def _with_rows(found: Found) -> str:
    """How a run of this kind takes the rows of another, if it can."""
    key = "train.warm_start"
    return f" (with its rows: {key}={found.path})" if key in found.meta["config"] else ""


def _differing(then: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """A text for each key whose value has changed."""
    keys = [key for key in then | now if then.get(key) != now.get(key)]
    return {key: f"{key} was {then.get(key)} and is {now.get(key)}" for key in keys}


def _listed(texts: list[str]) -> str:
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")
