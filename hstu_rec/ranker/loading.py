"""A trained ranker out of its run folder, in one process, without TorchRec: load_ranker."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hstu_rec import checkpoint
from hstu_rec.bundle import Rows
from hstu_rec.checkpoint.saved_rows import SavedRows
from hstu_rec.config import load
from hstu_rec.data.item_map import ITEM_MAP, item_map_hash
from hstu_rec.data.tables import as_kind, kind_of_table
from hstu_rec.durable import write_file
from hstu_rec.export import load_dense, own_ids
from hstu_rec.item_table import ROWS_NAME
from hstu_rec.ranker.config import RankRunConfig
from hstu_rec.ranker.features import Feature
from hstu_rec.ranker.model import RankingModel, ranking_model
from hstu_rec.ranker.tables import OwnTerms
from hstu_rec.run_folder import FEATURES_FILE


@dataclass(frozen=True)
class TrainedRanker:
    """What a run of apps/train_ranker.py leaves to score with."""

    model: RankingModel
    """On CPU, in evaluation mode, with all rows of its table."""
    terms: OwnTerms
    """Own ids and values, and the tasks."""

    def score(
        self, histories: Any, candidates: Any, *, at: int | Mapping[Any, int] | None = None
    ) -> Any:
        """user_id | item_id of the candidates | the probability (float32) of each task, called as the task;
        a table of the kind of `candidates`, in its order.

        Args:
            histories: a table, of pandas, polars, Arrow or columns by name, with a row an event, in any
                order: user_id, item_id, timestamp, and the columns of `ranker.context` and of the outcomes
                (those of tasks among them), with values as `prepare` was given them. The newest of a user
                count. Users without an event in it are scored as new ones.
            candidates: a table with a row a candidate: user_id, item_id, the columns of `ranker.context`.
            at: unix seconds for which is scored, one number or one by user id; the time of each user's newest
                event when None.

        A value that is missing, or a text that training did not have, counts as missing where training had
        such events. Raises ValueError for columns that are missing or of another type, candidates that the
        model does not know, and values of another kind; events of unknown items are left out, with a warning.
        """
        return as_kind(
            self.terms.score(self.model, histories, candidates, at), kind_of_table(candidates)
        )


def write_features(folder: Path, features: Sequence[Feature], stats: dict[str, Any]) -> None:
    """Writes into a run folder what the numbers of its features mean, by the dataset's `stats`."""
    facts = stats.get("features", {})
    content = {
        "item_map_hash": stats.get("item_map_hash"),
        "features": [asdict(one) for one in features],
        "values": {
            one.name: facts[one.name]["values"] for one in features if "values" in facts[one.name]
        },
    }
    write_file(folder / FEATURES_FILE, (json.dumps(content, indent=2) + "\n").encode())


def load_ranker(folder: str | Path) -> TrainedRanker:
    """The best model of a run folder of apps/train_ranker.py; nothing of it is executed.

    Raises FileNotFoundError for what is no such folder, ValueError for one that is damaged or of other items.
    """
    folder = Path(folder)
    needed = ("config.yaml", FEATURES_FILE, ITEM_MAP, "checkpoints/best")
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise FileNotFoundError(
            f"{folder} is no run of apps/train_ranker.py that is through: {', '.join(missing)} missing"
        )
    config = load(RankRunConfig, [str(folder / "config.yaml")])
    told = json.loads((folder / FEATURES_FILE).read_text(encoding="utf-8"))
    path = checkpoint.resolve(folder / "checkpoints", "best")
    if problems := checkpoint.problems_of(path):
        raise ValueError(f"{path} is damaged: {'; '.join(problems)}")
    if item_map_hash(folder / ITEM_MAP) != told["item_map_hash"]:
        raise ValueError(
            f"{folder / ITEM_MAP} does not hold the items that were trained on; give a run folder as it was "
            "written"
        )
    saved = SavedRows(path, f"model/{ROWS_NAME}")
    rows = saved.take(np.arange(len(saved)))
    features = [Feature(**one) for one in told["features"]]
    model = ranking_model(Rows(rows), config.ranker, config.encoder, features)
    load_dense(path, dict(model.state_dict()))
    model.eval().requires_grad_(False)
    # An event is two tokens, and a candidate one more.
    longest = config.encoder.max_history_len // 2 - 1
    return TrainedRanker(
        model, OwnTerms(own_ids(folder), told["values"], longest, config.ranker.tasks)
    )
