"""Settings of the runs of every kind of model: where a run is, what steps its weights, what is kept."""

from dataclasses import dataclass, field
from typing import Literal

from hstu_rec.checkpoint import CheckpointConfig
from hstu_rec.data.stream import DatasetConfig
from hstu_rec.distributed import DeviceChoice
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.guards import GuardConfig
from hstu_rec.item_table import TableConfig
from hstu_rec.settings import above, at_least, within
from hstu_rec.trackers import TrackingConfig

MAX_NAME_BYTES = 200  # of the 255 of a file name, which has the time before it


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW on the dense parameters; the item table has its own optimizer (table.*)."""

    lr: float = 1e-3
    """Learning rate of the dense parameters; the table's rate follows the same schedule."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    clip_norm: float = 1.0
    """Largest norm of the dense gradient; 0 for no clipping."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the rates from the end of warm-up to the last step of train.max_epochs."""
    final_lr_fraction: float = 0.0
    """Rate at the last step, as a fraction of lr."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = above(self, 0, "lr")
        found += at_least(self, 0, "weight_decay", "clip_norm", "warmup_steps")
        found += within(self, "[0, 1)", "beta1", "beta2", "final_lr_fraction")
        if self.final_lr_fraction and self.schedule == "constant":
            found.append(
                "final_lr_fraction has no effect with schedule 'constant'; set one of them"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class AnyTrainConfig:
    """How long a run trains, where, and how it begins."""

    max_epochs: int
    """Epochs, at most."""
    eval_every_epochs: int
    """Epochs between validations."""
    patience: int
    """Validations without a better result before training stops; 0 trains all epochs."""
    seed: int = 1
    """Seed of weights, batches, negatives and dropout."""
    device: DeviceChoice = "auto"
    """auto takes CUDA when present."""
    resume: str = "none"
    """none, auto (newest complete checkpoint of train.run_dir), or a checkpoint folder."""
    resume_changed: bool = False
    """Goes on also where settings or data are not those that the checkpoint was trained with; each change
    is told, and an epoch whose batches are others begins again."""
    run_dir: str = ""
    """Folder of the run; `runs/<time>-<name>` when empty."""
    log_every_steps: int = 50
    """Steps between rows of metrics.jsonl, beside that of an epoch's last step."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "max_epochs", "eval_every_epochs", "log_every_steps")
        found += at_least(self, 0, "patience")
        if not 0 <= self.seed < 2**32:
            found.append(f"seed must be in 0..{2**32 - 1}; got {self.seed}")
        if self.resume_changed and self.resume == "none":
            found.append("resume_changed has no effect without resume; set one of them")
        if self.resume == "auto" and not self.run_dir:
            found.append("resume 'auto' needs train.run_dir, the folder of the run to go on with")
        return found


@dataclass(frozen=True, kw_only=True)
class AnyRunConfig:
    """What a run of any kind depends on."""

    name: str
    """Name of the run, the end of its folder's name."""
    data: DatasetConfig
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    table: TableConfig = field(default_factory=TableConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: AnyTrainConfig
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> list[str]:
        """Problems between sections."""
        found = _name_problems(self.name)
        if self.guard.on_nonfinite == "skip" and self.table.optimizer == "adam":
            found.append(
                "guard.on_nonfinite 'skip' cannot be with table.optimizer 'adam', which moves rows even by a "
                "gradient of 0; set one of them"
            )
        return found


def _name_problems(name: str) -> list[str]:
    """What is wrong with the name of a run, a sentence."""
    is_plain = name.strip() and name.isprintable() and "/" not in name
    if is_plain and not name.startswith(".") and len(name.encode()) <= MAX_NAME_BYTES:
        return []
    return [
        "name must be the end of a folder's name: not empty, of at most "
        f"{MAX_NAME_BYTES} bytes, without / and without a dot at its beginning; got {name!r}"
    ]
