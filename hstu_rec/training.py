"""Training: epochs from where a run stands to where it ends, saved on the way.

validation, if the epoch asks for one      its checkpoint is written meanwhile; then `best` moves
steps of an epoch -> a checkpoint every checkpoint.every_minutes, and when the run is asked to stop
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hstu_rec import checkpoint, distributed
from hstu_rec.any_learner import AnyLearner
from hstu_rec.checkpoint import Saver
from hstu_rec.data.stream import Sequences
from hstu_rec.guards import Asked
from hstu_rec.pipeline import Place
from hstu_rec.resuming import Progress, meta_of
from hstu_rec.run_config import AnyRunConfig
from hstu_rec.signals import Stopped, StopRequest
from hstu_rec.tracking import Tracker


class Validation(NamedTuple):
    """How good a model is on the validation split."""

    metric: str
    """Name of what chooses the model."""
    value: float
    """Of the metric; more is better."""
    logged: dict[str, float]
    """What metrics.jsonl holds of it."""


@dataclass(frozen=True)
class Run(ABC):
    """What a run is made of."""

    config: AnyRunConfig
    folder: Path
    dataset: Sequences
    learner: AnyLearner
    tracker: Tracker
    made_with: dict[str, str | None]

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @abstractmethod
    def opening(self) -> str:
        """What is said before the first step."""

    @abstractmethod
    def begin(self) -> None:
        """What is done before the first step, once the model is that of the run. Collective."""

    @abstractmethod
    def validate(self, after_batch: Callable[[], None]) -> Validation:
        """Measures the model; `after_batch` is called by all ranks alike. Collective."""

    @abstractmethod
    def speed(self, share: float, spent_s: float) -> dict[str, float]:
        """What is logged of the time that a share of an epoch took, events_per_s among it."""

    @abstractmethod
    def result(self, progress: Progress, after_batch: Callable[[], None]) -> dict[str, Any]:
        """The final figures of the model, as result.json holds them. Collective, as `validate`."""

    @abstractmethod
    def test_figures(self, result: dict[str, Any]) -> dict[str, float]:
        """Those of the test split, by name."""

    @abstractmethod
    def write_report(self, result: dict[str, Any]) -> None:
        """Writes and prints what the run has come to; by one process."""


class Training:
    """Trains `run` from `progress`, which it keeps up to date."""

    def __init__(self, run: Run, progress: Progress, saver: Saver, stop: StopRequest) -> None:
        self.run, self.progress, self._saver, self._stop = run, progress, saver, stop
        self._saved_step = -1
        self._saved_at = self._counted_at = time.monotonic()

    def train(self) -> None:
        """Epochs until patience or max_epochs ends them. Collective.

        Raises Stopped on all ranks, with where it stands saved, when any of them is asked to stop.
        """
        settings, progress = self.run.config.train, self.progress
        total = self.run.learner.num_steps_planned
        with self.run.tracker.bar(total, "training", "step", done=progress.step) as bar:
            self._bar = bar
            while True:
                if self._is_validation_due():
                    self._validate()
                if progress.epoch >= settings.max_epochs:
                    break
                if 0 < settings.patience <= progress.num_without_gain:
                    self.run.tracker.say(
                        f"stopped: no better validation since epoch {progress.best_epoch} "
                        f"(train.patience={settings.patience})"
                    )
                    break
                loss, speed = self._train_epoch_or_tell()
                self.run.tracker.log("speed", progress.step, speed)
                told = f"epoch {progress.epoch}/{settings.max_epochs}  loss {loss:.3f}"
                bar.set_postfix_str(f"{told}  {_shown(speed)}")
        if progress.best is None:
            # Resumed beyond an end that was moved.
            self._validate()

    def stop_if_asked(self) -> None:
        """Raises Stopped on all ranks when any was asked to, between steps that are saved. Collective."""
        if distributed.all_reduce_max(torch.tensor(int(self._stop.is_asked))):
            self._end()

    def _train_epoch_or_tell(self) -> tuple[float, dict[str, float]]:
        """`_train_epoch`; what ends it says from where to go on."""
        try:
            return self._train_epoch()
        except FloatingPointError as error:
            root = self.run.checkpoints
            named = [name for name in ("best", "last") if checkpoint.has_pointer(root, name)]
            if not named:
                raise
            path = checkpoint.resolve(root, named[0])
            raise FloatingPointError(
                f"{error}; to go on from the {named[0]} checkpoint with other settings: train.run_dir="
                f"{self.run.folder} train.resume={path} train.resume_changed=true"
            ) from error

    def _train_epoch(self) -> tuple[float, dict[str, float]]:
        """The steps that are left of an epoch; the last one's loss, and the speed."""
        progress, learner, tracker = self.progress, self.run.learner, self.run.tracker
        learner.model.train()
        loss, num_steps = math.nan, learner.num_steps(progress.epoch)
        first, began_at = progress.batch, time.monotonic()
        self._counted_at = began_at
        for index in range(first, num_steps):
            asked = Asked(stop=self._stop.is_asked, save=self._is_save_due())
            loss, asked, skipped = learner.step(progress.epoch, index, progress.step, asked)
            for step in skipped:
                tracker.log("guard", step, {"skipped": 1})
            is_last = index + 1 == num_steps
            if is_last or progress.step % self.run.config.train.log_every_steps == 0:
                told = learner.told_of(Place(progress.epoch, index, progress.step))
                tracker.log("train", progress.step, {"loss": loss, **told})
            progress.step += 1
            self._bar.update(1)
            progress.batch = index + 1
            if progress.batch == num_steps:
                progress.epoch, progress.batch = progress.epoch + 1, 0
            if asked.stop or asked.save:
                self._count_time()
                self._save()
            if asked.stop:
                self._end()
        self._count_time()
        share = (num_steps - first) / num_steps
        return loss, self.run.speed(share, time.monotonic() - began_at)

    def _end(self) -> None:
        self._saver.wait()
        folder, step = self.run.folder, self.progress.step
        raise Stopped(
            f"stopped at step {step}, saved; the same command goes on from there with "
            f"train.run_dir={folder} train.resume=auto",
            self._stop.by,
        )

    def _count_time(self) -> None:
        now = time.monotonic()
        self.progress.train_s += now - self._counted_at
        self._counted_at = now

    def _is_save_due(self) -> bool:
        """Whether there is to be a checkpoint after the step that comes."""
        settings, done = self.run.config.checkpoint, self.progress.step + 1
        waited_s = time.monotonic() - self._saved_at
        by_time = 0 < settings.every_minutes * 60 <= waited_s
        return by_time or (settings.every_steps > 0 and done % settings.every_steps == 0)

    def _save(self) -> None:
        """Begins a checkpoint of where the run stands, unless there is one."""
        if self._saved_step == self.progress.step:
            return
        run = self.run
        meta = meta_of(run.config, run.dataset, run.learner, self.progress, run.made_with)
        self._saver.save(self.progress.step, run.learner.state(), meta)
        self._saved_step, self._saved_at = self.progress.step, time.monotonic()

    def _is_validation_due(self) -> bool:
        progress, settings = self.progress, self.run.config.train
        if progress.batch or progress.measured_epoch >= progress.epoch:
            return False
        if progress.epoch == 0:
            # What a warm start begins with may stay the best.
            return progress.steps_before > 0
        is_last = progress.epoch >= settings.max_epochs
        return is_last or progress.epoch % settings.eval_every_epochs == 0

    def _validate(self) -> None:
        """Saves, measures, and moves `best` when the selected validation metric gained."""
        run, progress = self.run, self.progress
        self._save()
        metric, value, logged = run.validate(self.stop_if_asked)
        is_better = progress.best is None or value > progress.best
        progress.num_without_gain = 0 if is_better else progress.num_without_gain + 1
        if is_better:
            progress.best, progress.best_epoch = value, progress.epoch
        progress.measured_epoch = progress.epoch
        run.tracker.log("valid", progress.step, {"epoch": progress.epoch, **logged})
        run.tracker.say(
            f"epoch {progress.epoch:3d}  step {progress.step}  valid {metric} {value:.4f}"
            f"  best {progress.best:.4f} (epoch {progress.best_epoch})  train {progress.train_s:.0f} s"
        )
        saved = self._saver.wait()
        if is_better and saved is not None:
            checkpoint.point(run.checkpoints, "best", saved)


def _shown(speed: dict[str, float]) -> str:
    text = f"events/s {speed['events_per_s']:,.0f}"
    if "mfu" in speed:
        text += f"  TFLOP/s {speed['tflop_per_s']:.1f} (MFU {speed['mfu']:.1%})  {speed['peak_gib']:.1f} GiB"
    return text
