"""Tables as users hold them: pandas, polars, Arrow, columns by name, files of parquet; Arrow within.

What is asked of one kind is answered in the same kind. Neither pandas nor polars is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from hstu_rec.data.dataset import parts

TableKind = Literal["pandas", "polars", "arrow"]
COLUMNS = ("user_id", "item_id", "timestamp")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the three columns of events are called."""

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"

    def problems(self) -> list[str]:
        """What is wrong with these names, a sentence each."""
        names = [self.user, self.item, self.time]
        if any(type(name) is not str or not name for name in names) or len(set(names)) < 3:
            return [f"user, item and time columns must be three different names; got {names}"]
        return []

    def standard(self, table: pa.Table) -> pa.Table:
        """user_id | item_id | timestamp of a table with these columns. Raises ValueError where one is missing
        or there twice."""
        names = (self.user, self.item, self.time)
        for name in names:
            if (count := table.column_names.count(name)) != 1:
                there = ", ".join(table.column_names) or "none"
                raise ValueError(
                    f"events need one column {name!r}; there are {count} of {there}; name the columns, "
                    "in fit() or load(), with user_column, item_column and time_column"
                )
        return pa.table([table[name] for name in names], names=list(COLUMNS))


def kind_of_table(table: Any) -> TableKind:
    """What a table is of; arrow for all that is neither of pandas nor of polars."""
    package = type(table).__module__.split(".")[0]
    is_frame = hasattr(table, "columns") and hasattr(table, "dtypes")
    return package if is_frame and package in ("pandas", "polars") else "arrow"


def arrow_of(table: Any) -> pa.Table:
    """The rows of a DataFrame of pandas or polars, an Arrow table or batch, or columns by name.

    Raises ValueError for what is none of them, and for columns of values of several types.
    """
    is_table = isinstance(table, Mapping | pa.Table | pa.RecordBatch) or hasattr(
        table, "__arrow_c_stream__"
    )
    if type(table).__name__ == "LazyFrame":  # of polars, whose columns are there and values are not
        raise ValueError(
            "events are a LazyFrame, which has no rows yet; give what its collect() returns"
        )
    if not is_table and kind_of_table(table) == "arrow":
        raise ValueError(
            "events must be a DataFrame of pandas or polars, an Arrow table, columns by name, or a path of "
            f"files; got {type(table).__name__}"
        )
    try:
        return _plain(_arrow_of(table))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"the table cannot be read: {error}; give columns of equal length, each of one type"
        ) from error


def _arrow_of(table: Any) -> pa.Table:
    if kind_of_table(table) == "pandas":
        return pa.Table.from_pandas(table, preserve_index=False)
    if isinstance(table, pa.Table):
        return table
    if hasattr(table, "__arrow_c_stream__"):
        return pa.table(table)
    if isinstance(table, pa.RecordBatch):
        return pa.Table.from_batches([table])
    return pa.table(dict(table))


def _plain(table: pa.Table) -> pa.Table:
    """With text as Arrow has had it before string_view, which polars gives."""
    fields = [
        pa.field(one.name, pa.large_string()) if pa.types.is_string_view(one.type) else one
        for one in table.schema
    ]
    return table.cast(pa.schema(fields))


def as_kind(answer: pa.Table, kind: TableKind) -> Any:
    """`answer` as a DataFrame of pandas or polars, or as it is."""
    if kind == "pandas":
        return answer.to_pandas()
    if kind == "polars":
        import polars  # pyright: ignore[reportMissingImports]

        return polars.from_arrow(answer)
    return answer


def read_parquet(source: str | Path, columns: list[str]) -> pa.Table:
    """Columns of a parquet file, of those of a folder, or of a glob.

    Raises FileNotFoundError when there is none, ValueError for one that is no parquet or lacks a column.
    """
    path = Path(source)
    files = parts(path) if path.exists() else sorted(map(Path, glob(str(source), recursive=True)))
    if not files:
        raise FileNotFoundError(f"there is no parquet file at {source}")
    tables = []
    for file in files:
        try:
            names = pq.read_schema(file).names
            if missing := [name for name in columns if name not in names]:
                raise ValueError(f"it lacks {', '.join(missing)} and has {', '.join(names)}")
            tables.append(pq.ParquetFile(file).read(columns=columns))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(
                f"{file} cannot be read as parquet: {error}; give parquet files, or a table "
                "(pandas.read_csv reads text)"
            ) from error
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise ValueError(f"the files at {source} have columns of other types: {error}") from error
