"""How a run begins: anew, from a checkpoint, or as another run ended."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from hstu_rec import checkpoint, hosts, resuming
from hstu_rec.checkpoint import CheckpointError
from hstu_rec.config import RunConfig
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.item_map import keep_item_map
from hstu_rec.data.stream import Sequences
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.guards import DivergenceAlarm
from hstu_rec.learner import Learner
from hstu_rec.resuming import Found, Progress
from hstu_rec.run_config import AnyRunConfig
from hstu_rec.training import Run
from hstu_rec.warm_start import FormerRun, former_run, warm_start


class Start(Protocol):
    """What a run begins with. Every method is collective."""

    told: list[str]

    @property
    def encoder(self) -> EncoderConfig | None:
        """That of the model whose weights the run begins with."""

    def check(self, config: AnyRunConfig, dataset: Sequences) -> None:
        """Raises ValueError where the run cannot begin so; nothing is written yet."""

    def begin(self, run: Run) -> Progress:
        """Fills the learner; where the run stands."""
        ...


def start_of(resume: str, root: Path, run_to_begin_as: str = "") -> Start:
    """What train.resume and train.warm_start ask for; `root`: of the run's checkpoints. Collective."""
    found, told = resuming.find(resume, root)
    if found is not None:
        return FromCheckpoint(told, found)
    if resume == "auto":
        how = "from train.warm_start" if run_to_begin_as else "anew"
        told = [*told, f"resume: no complete checkpoint, starting {how}"]
    if run_to_begin_as:
        return FromRun(told, former_run(run_to_begin_as))
    return Anew(told)


@dataclass
class Anew:
    """With the first rows and weights of a seed."""

    told: list[str]
    encoder: EncoderConfig | None = None

    def check(self, config: AnyRunConfig, dataset: Sequences) -> None:
        """Nothing can be wrong."""

    def begin(self, run: Run) -> Progress:
        """Rows that the data give."""
        run.learner.begin()
        _keep_items(run)
        return Progress()


@dataclass
class FromCheckpoint:
    """Where the run, or another one, stood when it was saved."""

    told: list[str]
    found: Found
    changes: list[str] = field(default_factory=list)
    has_other_batches: bool = False

    @property
    def encoder(self) -> EncoderConfig | None:
        """The one that was trained."""
        return self.found.encoder

    def check(self, config: AnyRunConfig, dataset: Sequences) -> None:
        """Raises CheckpointError for settings or data that it was not trained with."""
        self.changes, self.has_other_batches = resuming.check(self.found, config, dataset)
        self.told = [*self.told, *self.changes]

    def begin(self, run: Run) -> Progress:
        """Loads the checkpoint."""
        found, learner = self.found, run.learner
        try:
            progress = resuming.load(found, learner, run.dataset)
        except CheckpointError as error:
            if not self.changes:
                raise
            changes = "; ".join(one.removeprefix("resume: changed since: ") for one in self.changes)
            raise CheckpointError(
                f"{found.path} cannot be gone on with, train.resume_changed or not, where tensors have other "
                f"shapes: {changes}; give the settings that it was trained with, or begin another run"
            ) from error
        learner.optimizers.continue_at(progress.steps_before + progress.step)
        if not self.changes:
            # Losses of other settings or data are other ones.
            learner.alarm = DivergenceAlarm(**found.meta["alarm"])
            learner.guard.num_skipped = found.meta["num_skipped"]
        if self.has_other_batches and progress.batch:
            run.tracker.say(f"resume: epoch {progress.epoch} begins again, its batches are others")
            progress.batch = 0
        is_own = found.path.parent.resolve() == run.checkpoints.resolve()
        aside = checkpoint.set_aside(run.checkpoints, found.path) if is_own else []
        if aside:
            run.tracker.say(f"resume: set aside as *.aside: {', '.join(aside)}")
        if not is_own or not checkpoint.has_pointer(run.checkpoints, "best"):
            # The best was of another folder, or of what was set aside, and cannot be tested.
            progress.best, progress.best_epoch, progress.num_without_gain = None, 0, 0
        run.tracker.say(
            f"resume: {found.path}, epoch {progress.epoch}, batch {progress.batch}, step {progress.step}"
        )
        _keep_items(run)
        return progress


@dataclass
class FromRun:
    """As another run ended, with the items of the dataset."""

    told: list[str]
    former: FormerRun

    @property
    def encoder(self) -> EncoderConfig | None:
        """That of the other run."""
        return self.former.config.encoder

    def check(self, config: AnyRunConfig, dataset: Sequences) -> None:
        """Raises ValueError for settings that make another model."""
        assert isinstance(config, RunConfig)
        self.former.check(config)

    def begin(self, run: Run) -> Progress:
        """Carries rows and weights over."""
        # The configuration was checked.
        assert isinstance(run.dataset, Dataset) and isinstance(run.learner, Learner)
        begun = warm_start(self.former, run.learner, run.dataset, run.folder)
        items = begun.items
        run.tracker.say(
            f"warm start  {self.former.checkpoint}, {begun.num_steps} steps: {items.num_known:,} items "
            f"known, {items.num_new:,} new (rows: {run.config.table.new_rows}), "
            f"{items.num_retired:,} retired"
        )
        run.tracker.log("warm_start", 0, asdict(items))
        return Progress(steps_before=begun.num_steps)


def _keep_items(run: Run) -> None:
    dataset = run.dataset
    if isinstance(dataset, Dataset):
        hosts.on_main(lambda: keep_item_map(dataset.path, run.folder))


def load_best(run: Run) -> None:
    """Fills the learner with the best checkpoint of the run. Collective."""
    path = checkpoint.resolve(run.checkpoints, "best")
    resuming.load(resuming.found_at(path), run.learner, run.dataset)
