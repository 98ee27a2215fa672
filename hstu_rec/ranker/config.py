"""RankRunConfig: everything a ranker depends on, in sections owned by the modules that they configure."""

from dataclasses import dataclass, field, fields

from hstu_rec.item_table import TableConfig
from hstu_rec.ranker.model import RankerConfig
from hstu_rec.ranker.windows import RankDataConfig
from hstu_rec.run_config import AnyRunConfig, AnyTrainConfig
from hstu_rec.settings import without_effect


@dataclass(frozen=True, kw_only=True)
class RankTrainConfig(AnyTrainConfig):
    """How long a ranker trains and what it keeps."""

    max_epochs: int = 40
    eval_every_epochs: int = 1
    patience: int = 4
    """Validations without a better AUC, the mean over tasks, before training stops; 0 trains all epochs."""


@dataclass(frozen=True, kw_only=True)
class RankRunConfig(AnyRunConfig):
    """Everything a ranker depends on. `encoder` counts tokens, two an event: max_history_len, window and
    the distances of the position bias."""

    name: str = "ranker"
    data: RankDataConfig = field(default_factory=RankDataConfig)
    train: RankTrainConfig = field(default_factory=RankTrainConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)

    def problems(self) -> list[str]:
        """Problems between sections."""
        found = super().problems()
        if self.encoder.max_history_len < 4 or self.encoder.max_history_len % 2:
            found.append(
                "encoder.max_history_len must be even and at least 4, two tokens an event; got "
                f"{self.encoder.max_history_len}"
            )
        if self.encoder.window % 2:
            found.append(
                f"encoder.window must be even, two tokens an event; got {self.encoder.window}"
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
