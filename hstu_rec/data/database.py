"""DuckDB beside the data: on disk, within a memory limit, without network.

Whatever does not fit into the limit is spilled into the same folder.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

MEMORY_LIMIT = "50%"


@contextmanager
def database(folder: Path, memory_limit: str = MEMORY_LIMIT) -> Iterator[duckdb.DuckDBPyConnection]:
    """A new database; its files are in `folder`, and gone when the block ends.

    Raises ValueError for a limit that is no size, or too small for what the block does.
    """
    work = Path(tempfile.mkdtemp(dir=folder, prefix="duckdb-"))
    settings: dict[str, Any] = {
        "temp_directory": str(work / "spill"),
        "memory_limit": memory_limit,
        "autoinstall_known_extensions": False,
        "preserve_insertion_order": True,
    }
    try:
        if memory_limit.lstrip().startswith("-"):  # DuckDB takes it as none
            raise duckdb.InvalidInputException("it is negative")
        connection = duckdb.connect(str(work / "events.duckdb"), config=settings)
    except duckdb.Error as error:
        raise ValueError(
            f"memory_limit must be a size such as 4GB, or a share such as 50%; got '{memory_limit}'"
        ) from error
    try:
        connection.execute("SET TimeZone = 'UTC'")
        # Where it is off already, as in Jupyter without ipywidgets, DuckDB refuses to hear of it.
        if row(connection, "SELECT current_setting('enable_progress_bar')")[0]:
            connection.execute("SET enable_progress_bar = false")
        yield connection
    except duckdb.OutOfMemoryException as error:
        raise ValueError(
            f"memory_limit={memory_limit} is too small for this input; raise it, or make room on "
            f"the disk of {folder.parent} ({str(error).splitlines()[0]})"
        ) from error
    except duckdb.IOException as error:
        raise OSError(
            f"a file in {folder.parent} cannot be written or read ({str(error).splitlines()[0]}); look at "
            "the disk"
        ) from error
    finally:
        connection.close()
        shutil.rmtree(work, ignore_errors=True)


def row(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    """The only row of a query's result."""
    (found,) = connection.execute(query).fetchall()
    return found


def scalar(connection: duckdb.DuckDBPyConnection, query: str) -> Any:
    """The first value of the only row."""
    return row(connection, query)[0]


def quoted(text: str | Path) -> str:
    """A SQL string literal."""
    return "'" + str(text).replace("'", "''") + "'"
