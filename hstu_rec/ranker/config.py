"""RankRunConfig: everything a ranker depends on, in sections owned by the modules that they configure."""

from dataclasses import dataclass, field, fields

from hstu_rec.config import OptimConfig, name_problems
from hstu_rec.distributed import DeviceChoice
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.guards import GuardConfig
from hstu_rec.item_table import TableConfig
from hstu_rec.ranker.model import RankerConfig
from hstu_rec.ranker.windows import RankDataConfig
from hstu_rec.settings import at_least, without_effect
from hstu_rec.trackers import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class RankTrainConfig:
    """How long a ranker trains and what it keeps."""

    max_epochs: int = 40
    """Epochs, at most."""
    patience: int = 4
    """Epochs without a better validation AUC, the mean over tasks, before training stops."""
    seed: int = 1
    """Seed of weights, windows and dropout."""
    device: DeviceChoice = "auto"
    """auto takes CUDA when present."""
    run_dir: str = ""
    """Folder of the run, which must not hold one; runs/<time>-<name> when empty."""
    log_every_steps: int = 50
    """Steps between rows of metrics.jsonl."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "max_epochs", "patience", "log_every_steps")
        if not 0 <= self.seed < 2**32:
            found.append(f"seed must be in 0..{2**32 - 1}; got {self.seed}")
        return found


@dataclass(frozen=True, kw_only=True)
class RankRunConfig:
    """Everything a ranker depends on. Of `encoder`, max_history_len counts two tokens an event."""

    name: str = "ranker"
    """Name of the run, the end of its folder's name."""
    data: RankDataConfig = field(default_factory=RankDataConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    table: TableConfig = field(default_factory=TableConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    train: RankTrainConfig = field(default_factory=RankTrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> list[str]:
        """Problems between sections."""
        found = name_problems(self.name)
        if self.encoder.max_history_len < 4 or self.encoder.max_history_len % 2:
            found.append(
                "encoder.max_history_len must be even and at least 4, two tokens an event; got "
                f"{self.encoder.max_history_len}"
            )
        if self.encoder.query_time != "own":
            found.append("encoder.query_time must be own: a candidate's time is its own")
        if self.encoder.calendar != "none":
            found.append("encoder.calendar must be none; give times as columns of ranker.context")
        if self.ranker.history == "pooled":
            used = {"dim", "dropout", "max_history_len"}
            others = [one.name for one in fields(self.encoder) if one.name not in used]
            found += [
                f"encoder.{sentence}"
                for sentence in without_effect(self.encoder, "with ranker.history=pooled", *others)
            ]
        if self.table.init != "normal" or self.table.new_rows != TableConfig().new_rows:
            found.append("table.init and table.new_rows have no effect on a ranker; leave them out")
        return found
