"""Event files, read as they are into one DuckDB table.

    a file, folder or glob --find_files--> paths, sorted by name
                           --stage--> staged(file, user, item, time [, tie] [, rating])

Row order is kept: `rowid` of the staged table counts files by name, then rows within a file.
Text stays text and JSON values stay JSON: what they mean is decided in clean.py over all rows,
never on a sample.
"""

import codecs
import csv
import gzip
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from glob import escape, glob
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_rec.data.database import quoted, scalar

Format = Literal["parquet", "csv", "json"]
PresetName = Literal["none", "amazon2014", "movielens_dat", "movielens_csv"]

SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".dat": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
}
INTEGERS = {f"{sign}{size}INT" for sign in ("", "U") for size in ("TINY", "SMALL", "BIG", "HUGE")}
INTEGERS |= {"INTEGER", "UINTEGER"}
WIDE = ("UBIGINT", "HUGEINT", "UHUGEINT", "DECIMAL")  # not all of their values are int64s
MOMENTS = {"DATE", "TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP WITH TIME ZONE"}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How a published data set names and writes its columns."""

    columns: dict[str, str]
    """Column of each role (user, item, time, rating)."""
    header: tuple[str, ...] = ()
    """Columns of text files without a header line; empty: the first line names them."""
    delimiter: str = ""
    """Field separator of text files; empty: found from the header line."""
    file_stem: str = ""
    """In a folder, only files that begin so are events; empty: all of them."""


_AMAZON = {"user": "reviewerID", "item": "asin", "time": "unixReviewTime", "rating": "overall"}
_MOVIELENS = {"user": "userId", "item": "movieId", "time": "timestamp", "rating": "rating"}
PRESETS: dict[PresetName, Preset] = {
    "none": Preset(
        columns={"user": "user_id", "item": "item_id", "time": "timestamp", "rating": "rating"}
    ),
    # The review files are JSON lines; the ratings-only files are CSV without a header.
    "amazon2014": Preset(
        columns=_AMAZON,
        header=("reviewerID", "asin", "overall", "unixReviewTime"),
        delimiter=",",
    ),
    "movielens_dat": Preset(
        columns=_MOVIELENS,
        header=("userId", "movieId", "rating", "timestamp"),
        delimiter="::",
        file_stem="ratings.",
    ),
    "movielens_csv": Preset(columns=_MOVIELENS, delimiter=",", file_stem="ratings."),
}


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What the table `staged` holds."""

    files: list[Path]
    """Files by number (column `file`)."""
    columns: dict[str, str]
    """Role to the column's name in the files."""
    types: dict[str, str]
    """Role to BIGINT, FLOAT, DOUBLE, VARCHAR, TIMESTAMP, TIMESTAMP_NS, TEXT (CSV) or JSON (raw)."""
    num_malformed: int
    """Lines left out because they could not be split into columns."""
    place: str
    """What follows a row's number: rows are counted after a header, lines with it."""


def find_files(source: str | Path, preset: Preset) -> list[Path]:
    """The event files of a file, folder or glob, sorted by name; all of one format, none twice.

    Raises FileNotFoundError when there are none, ValueError when formats are unknown or mixed, or a
    link leads nowhere.
    """
    path = Path(source)
    if str(source) and path.is_dir():
        names = [
            found
            for found in path.iterdir()
            if not found.name.startswith((".", "_"))
            and found.name.startswith(preset.file_stem)
            and _suffix(found) in SUFFIXES
        ]
        wanted = f"{preset.file_stem}*" if preset.file_stem else "*" + ", *".join(SUFFIXES)
        missing = f"folder {path} holds no event file ({wanted}, also with .gz)"
        if any(found.is_dir() for found in path.iterdir()):
            missing += (
                f", and folders in it are read by a glob alone, such as '{path}/**/*.parquet'"
            )
    else:
        is_one = path.is_file() or path.is_symlink()
        names = [path] if is_one else map(Path, glob(str(source), recursive=True))
        missing = f"no file, folder or glob match at '{source}'"
    found_by_place: dict[Path, Path] = {}
    for found in sorted(names, key=lambda found: (found.name, str(found))):
        if found.is_symlink() and not found.exists():
            raise ValueError(f"{found} is a link that leads nowhere; mend it, or remove it")
        if found.is_file():
            found_by_place.setdefault(found.resolve(), found)
    files = list(found_by_place.values())
    if not files:
        raise FileNotFoundError(f"{missing}; give the path of your events")
    unknown = [str(found) for found in files if _suffix(found) not in SUFFIXES]
    if unknown:
        raise ValueError(
            f"{unknown[0]}: unknown file type; allowed endings: {', '.join(SUFFIXES)}, "
            "also with .gz"
        )
    formats = {SUFFIXES[_suffix(found)] for found in files}
    if len(formats) > 1:
        raise ValueError(
            f"{source} holds {' and '.join(sorted(formats))} files; "
            "give a glob that takes one format"
        )
    return files


def stage(
    connection: duckdb.DuckDBPyConnection,
    files: list[Path],
    columns: dict[str, str],
    preset: Preset,
    *,
    has_bad_lines_dropped: bool,
    folder: Path,
) -> Staged:
    """Fills the table `staged` with the columns of all files; `folder` takes unpacked parquet.

    Raises ValueError that names the file (and the column) for what is missing, unreadable,
    truncated, or of a type that differs from the other files'.
    """
    types: dict[str, str] = {}
    num_malformed = 0
    has_header = SUFFIXES[_suffix(files[0])] == "csv" and not preset.header
    for number, path in enumerate(files):
        try:
            readable = _checked(path, folder)
            relation, found = _relation(
                connection, path, readable, columns, preset, has_bad_lines_dropped
            )
            _same_types(path, files[0], columns, found, types or found)
            verb = "INSERT INTO staged" if number else "CREATE TABLE staged AS"
            values = ", ".join(
                f"{_staged(role, name, found[role])}" for role, name in columns.items()
            )
            connection.execute(f"{verb} SELECT {number}::INTEGER AS file, {values} FROM {relation}")
            if has_bad_lines_dropped and relation.startswith("read_csv"):
                num_malformed += _rejected_lines(connection)
        except (duckdb.Error, pa.ArrowException, OSError, EOFError, zlib.error) as error:
            if isinstance(error, duckdb.OutOfMemoryException):
                raise
            if not path.exists():
                told = "was there and is gone; give files that nothing else moves"
                raise FileNotFoundError(f"{path} {told}") from error
            is_of_lines = isinstance(error, duckdb.Error) and SUFFIXES[_suffix(path)] != "parquet"
            can_drop = is_of_lines and not has_bad_lines_dropped
            drop = ", or leave malformed lines out with bad_rows=drop" if can_drop else ""
            told = f"cannot be read: {_brief(error, has_header)}; write the file again{drop}"
            if is_of_lines and re.search("not utf-8 encoded|invalid UTF-8", str(error)):
                told = f"is not UTF-8 text: {_brief(error, has_header)}; save it as UTF-8"
            raise ValueError(f"{path}: {told}") from error
        types = types or found
    return Staged(
        files=files,
        columns=columns,
        types=types,
        num_malformed=num_malformed,
        place="after the header" if has_header else "of this file",
    )


def _name(column: str) -> str:
    """A SQL identifier."""
    return '"' + column.replace('"', '""') + '"'


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _checked(path: Path, folder: Path) -> Path:
    """`path`, or the unpacked file for gzipped parquet; the checksum of a gzip stream is verified.

    DuckDB does not compare it, so that a damaged stream could pass as data.
    """
    if not path.name.lower().endswith(".gz"):
        if path.stat().st_size == 0:
            raise OSError("the file is empty (0 bytes)")
        return path
    if SUFFIXES[_suffix(path)] == "parquet":
        unpacked = folder / "unpacked.parquet"
        with gzip.open(path) as packed, unpacked.open("wb") as target:
            shutil.copyfileobj(packed, target, 2**24)
        return unpacked
    num_bytes = 0
    with gzip.open(path) as packed:
        while block := packed.read(2**24):
            num_bytes += len(block)
    if num_bytes == 0:
        raise OSError("the file is empty (0 bytes when unpacked)")
    return path


def _relation(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    readable: Path,
    columns: dict[str, str],
    preset: Preset,
    has_bad_lines_dropped: bool,
) -> tuple[str, dict[str, str]]:
    """The SQL table function that reads `readable`, and the type of each role."""
    file = quoted(escape(str(readable)))
    lenient = "true" if has_bad_lines_dropped else "false"
    match SUFFIXES[_suffix(path)]:
        case "parquet":
            relation = f"read_parquet({file}, hive_partitioning=false)"
            shape = dict(_describe(connection, relation))
            # DuckDB gives the second of two equal names another one.
            _refuse_twice(path, columns, pq.read_schema(readable).names)
            _require(path, columns, list(shape))
            types = {role: _parquet_type(path, name, shape[name]) for role, name in columns.items()}
            for role, name in columns.items():
                if types[role] == "BIGINT" and shape[name].startswith(WIDE):
                    _refuse_wide(connection, path, relation, name)
            return relation, types
        case "json":
            _refuse_no_lines(path)
            options = (
                f"format='newline_delimited', ignore_errors={lenient}, hive_partitioning=false"
            )
            names = [name for name, _ in _describe(connection, f"read_json({file}, {options})")]
            if names == ["json"] and "json" not in columns.values():
                raise ValueError(f"{path} has lines that are no objects; write one object a line")
            _require(path, columns, names)
            shape = ", ".join(f"{_name(name)}: 'JSON'" for name in dict.fromkeys(columns.values()))
            relation = f"read_json({file}, {options}, auto_detect=false, columns={{{shape}}})"
            return relation, dict.fromkeys(columns, "JSON")
        case "csv":
            delimiter, header = _header(path, columns, preset)
            _require(path, columns, header)
            _refuse_twice(path, dict(enumerate(header)), header)
            shape = ", ".join(f"{_name(name)}: 'VARCHAR'" for name in header)
            quote = "" if delimiter == "::" else '"'
            rejects = ", ignore_errors=true, store_rejects=true, rejects_limit=0"
            relation = (
                f"read_csv({file}, auto_detect=false, delim={quoted(delimiter)}, quote='{quote}', "
                f"escape='{quote}', header={not preset.header}, columns={{{shape}}}, nullstr='', "
                f"hive_partitioning=false"
                f"{rejects if has_bad_lines_dropped else ''})"
            )
            return relation, dict.fromkeys(columns, "TEXT")


def _describe(connection: duckdb.DuckDBPyConnection, relation: str) -> Iterator[tuple[str, str]]:
    """(column, type) of a table function."""
    for name, kind, *_ in connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall():
        yield name, kind


def _header(path: Path, columns: dict[str, str], preset: Preset) -> tuple[str, list[str]]:
    """The separator and the column names of a text file."""
    if preset.header:
        return preset.delimiter, list(preset.header)
    line = re.split(rb"[\r\n]", _head(path), maxsplit=1)[0]
    try:
        first = line.decode("utf-8-sig")
        if "\0" in first:
            raise ValueError("it holds zero bytes, as UTF-16 does")
    except ValueError as error:
        raise ValueError(
            f"{path}: the first line is not UTF-8 text ({error}); save it as UTF-8"
        ) from error
    if not first.strip():
        raise ValueError(f"{path}: the first line is empty; it must name the columns")
    candidates = [preset.delimiter] if preset.delimiter else [",", "\t", ";", "|"]
    headers = {mark: next(csv.reader([first], delimiter=mark), []) for mark in candidates}
    best = max(
        candidates,
        key=lambda mark: (len(set(columns.values()) & set(headers[mark])), len(headers[mark])),
    )
    return best, headers[best]


def _head(path: Path) -> bytes:
    """The first MiB, unpacked."""
    is_packed = path.name.lower().endswith(".gz")
    with gzip.open(path) if is_packed else path.open("rb") as content:
        return content.read(2**20)


def _refuse_no_lines(path: Path) -> None:
    """Refuses JSON that is not one object a line, as far as its beginning tells."""
    head = _head(path)
    if head.startswith(codecs.BOM_UTF8):
        raise ValueError(f"{path} begins with a byte order mark; write the file without it")
    if head.lstrip()[:1] == b"[":
        raise ValueError(f"{path} holds a list; write one object a line, as jq -c '.[]' does")


def _refuse_twice(path: Path, columns: dict[Any, str], names: list[str]) -> None:
    """Refuses a file in which one of `columns` has several names but for case, as DuckDB sees them."""
    for name in columns.values():
        alike = [one for one in names if one.lower() == name.lower()]
        if len(alike) > 1:
            raise ValueError(
                f"{path}: the header names column {name!r} twice ({', '.join(alike)}); rename one"
            )


def _refuse_wide(
    connection: duckdb.DuckDBPyConnection, path: Path, relation: str, name: str
) -> None:
    """Refuses integers that int64 does not hold, with a count and five of them."""
    column = _name(name)
    wide = f"FROM {relation} WHERE {column} IS NOT NULL AND TRY_CAST({column} AS BIGINT) IS NULL"
    if not (num_wide := scalar(connection, f"SELECT count(*) {wide}")):
        return
    rows = connection.execute(f"SELECT {column}::VARCHAR {wide} LIMIT 5").fetchall()
    raise ValueError(
        f"{path}: column {name!r} has {num_wide:,} integers beyond int64, such as "
        f"{', '.join(value for (value,) in rows)}; write the column as strings"
    )


def _require(path: Path, columns: dict[str, str], present: list[str]) -> None:
    """Refuses a file without one of the columns, with the nearest name there is."""
    for role, name in columns.items():
        if name in present:
            continue
        lowered = {known.lower(): known for known in present}
        near = get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
        hint = f"; nearest: {lowered[near[0]]!r}" if near else ""
        has_value = any(re.fullmatch(r"-?[0-9]+(\.[0-9]*)?", one) for one in present)
        is_feature = role.startswith("feature_")
        advice = "look at feature_columns" if is_feature else f"set {role}_column=NAME"
        if SUFFIXES[_suffix(path)] == "csv" and not set(columns.values()) & set(present):
            line = f"write a line such as {','.join(columns.values())} before it"
            advice = (
                "the first line seems to be an event, where the names of the columns are wanted: "
                + line
                if has_value
                else f"is the header missing? Then {line}; if not, {advice}"
            )
        raise ValueError(
            f"{path}: column {name!r} is missing{hint}; the file has "
            f"{', '.join(map(repr, present[:20]))}; {advice}"
        )


def _parquet_type(path: Path, name: str, kind: str) -> str:
    """The staged type of a parquet column."""
    if kind in INTEGERS or (kind.startswith("DECIMAL") and kind.endswith(",0)")):
        return "BIGINT"
    if kind in ("FLOAT", "DOUBLE"):
        return kind
    if kind in ("TIMESTAMP_NS", "TIMESTAMPTZ_NS"):
        return "TIMESTAMP_NS"
    if kind in MOMENTS:
        return "TIMESTAMP"
    if kind.startswith("DECIMAL"):
        return "DOUBLE"
    if kind in ("VARCHAR", "UUID") or kind.startswith("ENUM"):
        return "VARCHAR"
    raise ValueError(
        f"{path}: column {name!r} has type {kind}; allowed: integers, strings, floats and "
        "timestamps; write the column as one of these"
    )


def _staged(role: str, name: str, kind: str) -> str:
    """The SELECT expression of one staged column."""
    if kind in ("TEXT", "JSON"):
        return f"{_name(name)}::VARCHAR AS {role}"
    return f"{_name(name)}::{kind} AS {role}"


def _same_types(
    path: Path, first: Path, columns: dict[str, str], found: dict[str, str], types: dict[str, str]
) -> None:
    """Refuses a file in which a column has another type than in the first file."""
    for role, name in columns.items():
        if found[role] != types[role]:
            pair = {found[role], types[role]}
            had_nulls = " (integers that became floats usually had nulls)"
            raise ValueError(
                f"{path}: column {name!r} is {found[role]} here but {types[role]} in {first}; "
                f"write all files with one type{had_nulls if pair == {'BIGINT', 'DOUBLE'} else ''}"
            )


def _rejected_lines(connection: duckdb.DuckDBPyConnection) -> int:
    """The lines the last read_csv left out; forgets them."""
    row = connection.execute(
        "SELECT count(DISTINCT (scan_id, file_id, line)) FROM reject_errors"
    ).fetchone()
    connection.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")
    assert row is not None
    return int(row[0])


def _brief(error: BaseException, has_header: bool) -> str:
    """The first lines of an error, without DuckDB's list of parser switches."""
    text = str(error).split("\n\n")[0].split("Possible")[0]
    counted = ", counted with the header" if has_header else ""
    text = re.sub(r"^Invalid Input Error: CSV Error on Line: (\d+)", rf"line \1{counted}:", text)
    return " ".join(text.split())[:300]
