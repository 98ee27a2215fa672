"""A Recommender's events, a table or files, as a dataset folder."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hstu_rec.config import load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.prepare import PrepareConfig, prepare
from hstu_rec.data.tables import Columns, arrow_of
from hstu_rec.settings import assignments


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
    own = {
        "user_column": columns.user,
        "item_column": columns.item,
        "time_column": columns.time,
        "overwrite": True,
    }
    config = load(PrepareConfig, assignments(own | dict(settings)))
    try:
        _prepare_with(config, events, data, columns if not settings else None)
    except ValueError as error:
        others = sorted({one.name for one in fields(PrepareConfig)} - own.keys())
        named = [name for name in others if name in str(error)]
        if not named:
            raise
        raise ValueError(f"{error} ({', '.join(named)}: in fit's prepare_settings)") from error


def _prepare_with(config: PrepareConfig, events: Any, data: Path, wanted: Columns | None) -> None:
    """wanted: columns that a table must have, unless `config` knows better."""
    if isinstance(events, str | Path):
        prepare(config, events, data)
        return
    table = arrow_of(events)
    if wanted is not None:
        wanted.standard(table)  # its sentence is of tables
    data.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".events-", dir=data.parent) as folder:
        path = Path(folder) / "events.parquet"
        pq.write_table(table, path)
        try:
            prepare(config, path, data)
        except ValueError as error:
            told = str(error).replace(str(path), "the table").replace("of this file", "of it")
            raise ValueError(told) from error
