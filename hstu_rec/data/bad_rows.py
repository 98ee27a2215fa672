"""Rows of events that are bad: counted by reason, or told with file, place and values.

typed(seq, file, ..., reason, raw): the view of clean.py  -->  {reason: rows}
"""

from typing import Any, Literal

import duckdb

from hstu_rec.data.database import scalar
from hstu_rec.data.sources import Staged

BadRows = Literal["raise", "drop"]
TOO_LATE = "beyond the year 5000"
TIME_FORMS = "times are unix time in s, ms, us or ns, or ISO dates such as 2024-12-31 or 2024-12-31T08:00:00Z"


def bad_row_counts(
    connection: duckdb.DuckDBPyConnection, staged: Staged, bad_rows: BadRows
) -> dict[str, int]:
    """Bad rows by reason; with bad_rows=raise, an error that names files, columns and counts."""
    found = connection.execute(
        "SELECT reason, count(*), count(DISTINCT file), min({'seq': seq, 'file': file, 'raw': raw}, 5) "
        "FROM typed WHERE reason IS NOT NULL GROUP BY reason ORDER BY reason"
    ).fetchall()
    if found and bad_rows == "raise":
        told = "; ".join(_told(connection, staged, *one) for one in found)
        reasons = [reason for reason, *_ in found]
        unit = " (or look at time_unit)" if TOO_LATE in told else ""
        forms = f" ({TIME_FORMS})" if f"unreadable {staged.columns['time']}" in reasons else ""
        raise ValueError(
            f"{told}; mend the rows{unit}{forms}, or leave them out with bad_rows=drop"
        )
    malformed = {"malformed line": staged.num_malformed} if staged.num_malformed else {}
    return malformed | {reason: count for reason, count, *_ in found}


def _told(
    connection: duckdb.DuckDBPyConnection,
    staged: Staged,
    reason: str,
    num_rows: int,
    num_files: int,
    first: list[dict[str, Any]],
) -> str:
    """Bad rows of a reason: how many, where, and up to five of them."""
    file = first[0]["file"]
    begin = scalar(connection, f"SELECT min(rowid) FROM staged WHERE file = {file}") - 1
    here = [one for one in first if one["file"] == file]
    rows = f"{num_rows:,} {'row' if num_rows == 1 else 'rows'}"
    rows += f" in {num_files:,} files" if num_files > 1 else ""
    values = [str(one["raw"])[:40] for one in here if one["raw"] not in (None, "")]
    places = [f"{one['seq'] - begin:,}" for one in here]
    examples = f": {', '.join(values)}" if values else f" ({', '.join(places)})"
    return (
        f"{staged.files[file]}: {rows} with {reason}, first in row {places[0]} {staged.place}"
        f"{examples if values or len(places) > 1 else ''}"
    )
