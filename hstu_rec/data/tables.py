"""Tables as users hold them: pandas, polars, Arrow, columns by name, files of parquet; Arrow within.

What is asked of one kind is answered in the same kind. Neither pandas nor polars is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from hstu_rec.settings import did_you_mean

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
        if taken := {"rank", "score"} & {*names}:
            return [f"columns of answers are called {' and '.join(sorted(taken))}; rename yours"]
        return []

    def standard(self, table: pa.Table) -> pa.Table:
        """user_id | item_id | timestamp of a table with these columns. Raises ValueError where one is missing
        or there twice."""
        self.check(table.column_names)
        return pa.table(
            [table[name] for name in (self.user, self.item, self.time)], names=list(COLUMNS)
        )

    def check(self, there: Sequence[str]) -> None:
        """Raises ValueError unless each is once among the columns that are there."""
        for name in (self.user, self.item, self.time):
            if (count := [*there].count(name)) != 1:
                names = [*map(str, there)]
                near = "" if count else did_you_mean(name, names)
                raise ValueError(
                    f"{count or 'no'} column{'s' if count else ''} of the events {'are' if count else 'is'} "
                    f"called {name!r}{near}; there are {', '.join(names) or 'none'}; name them, in "
                    "fit() or load(), with user_column, item_column and time_column"
                )


def kind_of_table(table: Any) -> TableKind:
    """What a table is of; arrow for all that is neither of pandas nor of polars."""
    package = type(table).__module__.split(".")[0]
    is_frame = hasattr(table, "columns") and hasattr(table, "dtypes")
    return package if is_frame and package in ("pandas", "polars") else "arrow"


def arrow_of(table: Any, names: Sequence[str] | None = None) -> pa.Table:
    """The rows of a DataFrame of pandas or polars, an Arrow table or batch, or columns by name; all columns,
    or those of `names` that are there.

    Raises ValueError for what is none of them, and for columns of values of several types.
    """
    table = opened(table)
    try:
        return _plain(_arrow_of(table if names is None else _selected(table, names)))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"the table cannot be read: {error}; give columns of equal length, each of one type"
        ) from error


def names_of(table: Any) -> list[str]:
    """What the columns are called of what `opened` gives."""
    if isinstance(table, Mapping):
        return [*table]
    return [*(table.schema.names if kind_of_table(table) == "arrow" else table.columns)]


def opened(table: Any) -> Any:
    """A table that can be read again: a stream, which cannot, as an Arrow table, others as they are. Raises
    ValueError for what is no table."""
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
    is_again = isinstance(table, Mapping | pa.Table | pa.RecordBatch)
    if is_again or kind_of_table(table) != "arrow":
        return table
    try:
        return pa.table(table)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(f"the table cannot be read: {error}; give columns by name") from error


def _selected(table: Any, names: Sequence[str]) -> Any:
    """The table with those of the columns alone, so that others may be of any kind."""
    if isinstance(table, Mapping):
        return {name: table[name] for name in names if name in table}
    if isinstance(table, pa.Table | pa.RecordBatch):
        there = [place for place, name in enumerate(table.schema.names) if name in names]
        return table.select(there)
    return table[[name for name in dict.fromkeys(names) if name in table.columns]]


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
