"""Bad event files, each made anew: what is wrong, how it is written, and what prepare says of it."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tests.event_files import ROWS, as_csv, as_json, parquet, table, text

PARQUET, CSV, JSON = "events.parquet", "events.csv", "events.jsonl"
NOBODY = 65534
LINE_12 = "line 12, counted with the header"


class BadFile(NamedTuple):
    """A fault of event files."""

    write: Callable[[Path], Path]
    """Makes it in a folder and returns what prepare is given."""
    told: str
    """Part of the refusal; the name of the file is always looked for."""
    named: str
    """The file that must be named."""


def _bytes(name: str, content: Callable[[], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder / name

    return write


def _whole() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table(ROWS * 400), sink, compression="snappy")
    return sink.getvalue().to_pybytes()


def _changed(begin: int, end: int) -> bytes:
    """Parquet with the bits of a range flipped."""
    whole = bytearray(_whole())
    for at in range(*slice(begin, end).indices(len(whole))):
        whole[at] ^= 0xFF
    return bytes(whole)


def _csv(extra: str = "", head: str = "user_id,item_id,timestamp,row") -> bytes:
    return (head + as_csv()[as_csv().index("\n") :] + extra).encode()


def _json(extra: str) -> bytes:
    return (as_json() + extra + "\n").encode()


def _parts(**parts: pa.Table) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for name, content in parts.items():
            parquet(folder, content, f"{name}.parquet")
        return folder

    return write


def _renamed(**names: str) -> pa.Table:
    return table().rename_columns([names.get(name, name) for name in table().column_names])


def _twice() -> bytes:
    sink = pa.BufferOutputStream()
    content = table()
    columns = [*content.columns, content.column("item_id")]
    pq.write_table(pa.Table.from_arrays(columns, names=[*content.column_names, "Item_ID"]), sink)
    return sink.getvalue().to_pybytes()


def _loop(folder: Path) -> Path:
    (folder / "a.parquet").symlink_to(folder / "b.parquet")
    (folder / "b.parquet").symlink_to(folder / "a.parquet")
    return folder


def _astray(folder: Path) -> Path:
    parquet(folder, table(), "a.parquet")
    (folder / "b.parquet").symlink_to(folder / "nowhere.parquet")
    return folder


def _formats(folder: Path) -> Path:
    parquet(folder, table(), "a.parquet")
    text(folder, as_csv(), "b.csv")
    return folder


def _nested(folder: Path) -> Path:
    (folder / "day=1").mkdir()
    parquet(folder / "day=1", table())
    return folder


def _csv_parts(folder: Path) -> Path:
    text(folder, as_csv(), "a.csv")
    text(folder, as_csv().replace("item_id", "item", 1), "b.csv")
    return folder


PACKED = gzip.compress(b"".join(os.urandom(8).hex().encode() + b",1,1\n" for _ in range(5000)))

BAD_FILES: dict[str, BadFile] = {
    "parquet cut in the middle": BadFile(
        _bytes(PARQUET, lambda: _whole()[: len(_whole()) // 2]), "cannot be read", PARQUET
    ),
    "parquet without its first and last bytes": BadFile(
        _bytes(PARQUET, lambda: b"XXXX" + _whole()[4:-4] + b"XXXX"), "cannot be read", PARQUET
    ),
    "length of the footer beyond the file": BadFile(
        _bytes(PARQUET, lambda: _whole()[:-8] + b"\xff\xff\xff\x7fPAR1"), "ooter", PARQUET
    ),
    "footer's bits flipped": BadFile(
        _bytes(PARQUET, lambda: _changed(-900, -700)), "cannot be read", PARQUET
    ),
    "Arrow's own schema in the footer damaged": BadFile(
        _bytes(PARQUET, lambda: _whole()[:-300] + b"*" * 100 + _whole()[-200:]),
        "cannot be read",
        PARQUET,
    ),
    "pages' bits flipped": BadFile(
        _bytes(PARQUET, lambda: _changed(30, 600)), "cannot be read", PARQUET
    ),
    "parquet of 0 bytes": BadFile(_bytes(PARQUET, bytes), "the file is empty (0 bytes)", PARQUET),
    "parquet without rows": BadFile(
        lambda folder: parquet(folder, table().slice(0, 0)), "there are no rows", PARQUET
    ),
    "CSV called parquet": BadFile(_bytes(PARQUET, _csv), "cannot be read", PARQUET),
    "a column's name twice but for case": BadFile(
        _bytes(PARQUET, _twice), "column 'item_id' twice (item_id, Item_ID)", PARQUET
    ),
    "integers beyond int64": BadFile(
        lambda folder: parquet(
            folder, table(item_id=pa.array([2**63 + n for n in range(10)], pa.uint64()))
        ),
        "'item_id' has 10 integers beyond int64, such as 9223372036854775808, 9223372036854775809",
        PARQUET,
    ),
    "a column of booleans": BadFile(
        lambda folder: parquet(folder, table(item_id=[True] * 10)), "has type BOOLEAN", PARQUET
    ),
    "a column of bytes": BadFile(
        lambda folder: parquet(folder, table(item_id=[b"x"] * 10)), "has type BLOB", PARQUET
    ),
    "a column of structures": BadFile(
        lambda folder: parquet(folder, table(item_id=[{"a": 1}] * 10)), "has type STRUCT", PARQUET
    ),
    "a column of nothing": BadFile(
        lambda folder: parquet(folder, table(item_id=pa.nulls(10))), "column 'item_id'", PARQUET
    ),
    "empty CSV": BadFile(_bytes(CSV, bytes), "the file is empty (0 bytes)", CSV),
    "CSV of a header alone": BadFile(
        _bytes(CSV, lambda: _csv().split(b"\n")[0] + b"\n"), "there are no rows", CSV
    ),
    "CSV of blank lines": BadFile(_bytes(CSV, lambda: b"\n\n"), "the first line is empty", CSV),
    "CSV without a header": BadFile(
        _bytes(CSV, lambda: _csv().split(b"\n", 1)[1]), "column 'user_id' is missing", CSV
    ),
    "gzip cut in the middle": BadFile(
        _bytes("events.csv.gz", lambda: PACKED[: len(PACKED) // 2]), "cannot be read", "csv.gz"
    ),
    "gzip with rubbish after it": BadFile(
        _bytes("events.csv.gz", lambda: gzip.compress(_csv()) + b"rubbish"), "gzip", "csv.gz"
    ),
    "CSV called gzip": BadFile(_bytes("events.csv.gz", _csv), "Not a gzipped file", "csv.gz"),
    "a line too short": BadFile(_bytes(CSV, lambda: _csv("u1,fig\n")), LINE_12, CSV),
    "a line too long": BadFile(_bytes(CSV, lambda: _csv("u1,fig,1,2,3\n")), LINE_12, CSV),
    "a quote that does not end": BadFile(
        _bytes(CSV, lambda: _csv('u1,"fig,1300000000,1\nu2,fig,1300000000,1\n')),
        LINE_12,
        CSV,
    ),
    "text after a quote": BadFile(
        _bytes(CSV, lambda: _csv('u1,"fig"s,1300000000,1\n')),
        LINE_12,
        CSV,
    ),
    "another separator": BadFile(
        _bytes(CSV, lambda: as_csv(mark=":").encode()), "the file has 'user_id:item_id", CSV
    ),
    "Latin-1": BadFile(
        _bytes(CSV, lambda: _csv() + b"caf\xe9,fig,1300000000,1\n"),
        "is not UTF-8 text: line 12, counted with the header",
        CSV,
    ),
    "Latin-1 in JSON": BadFile(
        _bytes(JSON, lambda: as_json().encode() + b'{"user_id": "caf\xe9", "item_id": "fig"}\n'),
        "save it as UTF-8",
        JSON,
    ),
    "UTF-16": BadFile(_bytes(CSV, lambda: as_csv().encode("utf-16-le")), "save it as UTF-8", CSV),
    "a header that names a column twice": BadFile(
        _bytes(CSV, lambda: _csv(head="user_id,item_id,timestamp,item_id")), "'item_id' twice", CSV
    ),
    "a header that does so but for case": BadFile(
        _bytes(CSV, lambda: _csv(head="user_id,item_id,timestamp,Item_Id")), "'item_id' twice", CSV
    ),
    "a column of another case": BadFile(
        _bytes(CSV, lambda: _csv(head="user_id,Item_ID,timestamp,row")), "nearest: 'Item_ID'", CSV
    ),
    "a broken JSON line": BadFile(
        _bytes(JSON, lambda: _json('{"user_id": "u1", "item_')), "cannot be read", JSON
    ),
    "a JSON line of a nested id": BadFile(
        _bytes(JSON, lambda: _json('{"user_id": "u", "item_id": {"a": 1}, "timestamp": 1}')),
        "'item_id' holds 1 objects, lists or booleans, such as {\"a\":1}",
        JSON,
    ),
    "a JSON line of a list": BadFile(
        _bytes(JSON, lambda: _json("[1, 2, 3]")), "one object a line", JSON
    ),
    "a JSON list": BadFile(
        _bytes(JSON, lambda: json.dumps([{"user_id": 1}], indent=1).encode()),
        "holds a list; write one object a line",
        JSON,
    ),
    "JSON with a byte order mark": BadFile(
        _bytes(JSON, lambda: b"\xef\xbb\xbf" + _json("")), "byte order mark", JSON
    ),
    "a JSON line of other keys": BadFile(
        _bytes(JSON, lambda: _json('{"u": 1, "i": 2}')),
        "1 row with nothing readable, first in row 11 of this file",
        JSON,
    ),
    "numbers and strings as ids": BadFile(
        _bytes(JSON, lambda: _json('{"user_id": 7, "item_id": "fig", "timestamp": 1300000000}')),
        "column 'user_id' mixes 10 strings with 1 numbers",
        JSON,
    ),
    "integers, then strings": BadFile(
        _parts(a=table(item_id=list(range(10))), b=table()),
        "column 'item_id' is VARCHAR here but BIGINT in",
        "b.parquet",
    ),
    "integers, then floats": BadFile(
        _parts(a=table(item_id=list(range(10))), b=table(item_id=[float(n) for n in range(10)])),
        "integers that became floats usually had nulls",
        "b.parquet",
    ),
    "seconds, then timestamps": BadFile(
        _parts(a=table(), b=table(timestamp=pa.array([1] * 10).cast(pa.timestamp("s")))),
        "column 'timestamp' is TIMESTAMP here but BIGINT in",
        "b.parquet",
    ),
    "a column missing in one file": BadFile(
        _parts(a=table(), b=table().drop_columns(["item_id"])), "'item_id' is missing", "b.parquet"
    ),
    "a column of another case in one file": BadFile(
        _parts(a=table(), b=_renamed(item_id="ITEM_ID")), "nearest: 'ITEM_ID'", "b.parquet"
    ),
    "a column missing in one CSV": BadFile(_csv_parts, "column 'item_id' is missing", "b.csv"),
    "links in a loop": BadFile(_loop, "is a link that leads nowhere", "a.parquet"),
    "a link to nothing": BadFile(_astray, "is a link that leads nowhere", "b.parquet"),
    "files of two formats": BadFile(_formats, "holds csv and parquet files", ""),
    "events in a folder of the folder": BadFile(_nested, "/**/*.parquet", ""),
}


@contextmanager
def without_rights() -> Iterator[None]:
    """Not as root, who may read everything."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(own)
