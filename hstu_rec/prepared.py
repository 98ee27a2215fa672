"""A Recommender's events, a table or files, as a dataset folder, and out of one again."""

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_rec.config import load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.prepare import PrepareConfig, prepare
from hstu_rec.data.tables import Columns, arrow_of, names_of, opened
from hstu_rec.settings import assignments

# Users of few events cannot be tested on, and get recommendations like all others.
DEFAULTS = {"min_user_events": 1}


def prepare_in(root: Path, events: Any, columns: Columns, settings: Mapping[str, Any]) -> None:
    """Makes `root`/data, or leaves it where a run of the same events is there. Raises ValueError for a run of
    others, of which nothing is changed."""
    data, made = root / "data", root / "data.new"
    _prepare(events, made, columns, settings)
    if (root / "run").exists() and data.exists():
        is_same = Dataset(made).identity == Dataset(data).identity
        shutil.rmtree(made)
        if not is_same:
            raise ValueError(
                f"folder={root} holds a fit to other events, or to the same prepared otherwise; give another "
                "folder, or remove this one"
            )
        return
    if data.exists():
        shutil.rmtree(data)
    made.rename(data)


def _prepare(events: Any, data: Path, columns: Columns, settings: Mapping[str, Any]) -> None:
    """Makes the dataset folder `data`."""
    own = _own(columns)
    try:
        config = load(PrepareConfig, assignments(own | DEFAULTS | dict(settings)))
        _prepare_with(config, events, data, columns)
    except ValueError as error:
        others = sorted({one.name for one in fields(PrepareConfig)} - own.keys())
        text = str(error).replace(str(events), "") if isinstance(events, str | Path) else str(error)
        # A name that is also a word counts where it is given a value.
        named = [one for one in others if re.search(rf"\b{one}{'' if '_' in one else '='}", text)]
        if not named:
            raise
        raise ValueError(f"{error} ({', '.join(named)}: in fit's prepare_settings)") from error


def _own(columns: Columns) -> dict[str, Any]:
    """Settings that keywords of `fit` give."""
    names = {"user_column": columns.user, "item_column": columns.item, "time_column": columns.time}
    return names | {"overwrite": True}


def _prepare_with(config: PrepareConfig, events: Any, data: Path, columns: Columns) -> None:
    if isinstance(events, str | Path):
        prepare(config, events, data)
        return
    events = opened(events)
    columns.check(names_of(events))  # its sentence is of tables
    table = arrow_of(events, [*config.columns().values()])
    data.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".events-", dir=data.parent) as folder:
        path = Path(folder) / "events.parquet"
        pq.write_table(table, path)
        try:
            prepare(config, path, data)
        except ValueError as error:
            told = str(error).replace(str(path), "the table").replace("of this file", "of it")
            raise ValueError(told) from error


def read_events(source: str | Path, columns: Columns) -> pa.Table:
    """user_id | item_id | timestamp of all events of files, of every kind that `fit` takes.

    Raises FileNotFoundError when there are none, and ValueError for what is wrong with them.
    """
    if not Path(source).exists() and not glob(str(source), recursive=True):
        raise FileNotFoundError(
            f"there is no file at {source}; ids of users are given as a list: [{str(source)!r}]"
        )
    with tempfile.TemporaryDirectory(prefix="hstu_rec-") as folder:
        config = load(PrepareConfig, assignments(_own(columns) | DEFAULTS | {"split": "none"}))
        prepare(config, source, Path(folder) / "data")
        dataset = Dataset(Path(folder) / "data")
        return events_of(dataset, np.arange(dataset.num_users))


def events_of(dataset: Dataset, users: np.ndarray) -> pa.Table:
    """user_id | item_id | timestamp of all events of some users, in own ids, oldest first."""
    lengths = dataset.lengths[users]
    items, times, _ = dataset.gather(users, np.zeros_like(lengths), lengths)
    return pa.table(
        {
            "user_id": dataset.user_ids.take(pa.array(np.repeat(users, lengths))),
            "item_id": dataset.item_ids.take(pa.array(items)),
            "timestamp": times,
        }
    )
