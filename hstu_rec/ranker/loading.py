"""A trained ranker out of its run folder, in one process, without TorchRec: load_ranker."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hstu_rec import checkpoint
from hstu_rec.bundle import Rows
from hstu_rec.checkpoint.saved_rows import SavedRows
from hstu_rec.config import load
from hstu_rec.data.item_map import ITEM_MAP, item_map_hash
from hstu_rec.data.own_ids import IdIndex
from hstu_rec.durable import write_file
from hstu_rec.export import load_dense, own_ids
from hstu_rec.item_table import ROWS_NAME
from hstu_rec.ranker.config import RankRunConfig
from hstu_rec.ranker.features import Feature
from hstu_rec.ranker.model import RankingModel, ranking_model
from hstu_rec.run_folder import FEATURES_FILE


@dataclass(frozen=True)
class TrainedRanker:
    """What a run of apps/train_ranker.py leaves to score with."""

    model: RankingModel
    """On CPU, in evaluation mode, with all rows of its table."""
    items: IdIndex
    """Own ids of the items, by row of the table."""
    tasks: list[str]
    """What the columns of its scores are of."""
    values: dict[str, list[str]]
    """Of each column of texts, what its numbers stand for."""


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
    return TrainedRanker(model, own_ids(folder), config.ranker.tasks, told["values"])
