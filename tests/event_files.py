"""A few small event tables, written and prepared for the tests of prepare."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_rec.data.dataset import Dataset
from hstu_rec.data.prepare import PrepareConfig, prepare

ROOT = Path(__file__).resolve().parents[1]
DAY = 86_400


START = 1_300_000_000


# (user, item, time, row): users out of order, ties within u1 and u2, item ids that sort otherwise
# than they appear.
ROWS = [
    ("u2", "pear", START + 5 * DAY, 0),
    ("u1", "fig", START, 1),
    ("u1", "apple", START + DAY, 2),
    ("u2", "fig", START, 3),
    ("u1", "pear", START + DAY, 4),
    ("u1", "kiwi", START + 2 * DAY, 5),
    ("u2", "kiwi", START + 5 * DAY, 6),
    ("u3", "fig", START + 9 * DAY, 7),
    ("u3", "apple", START + 10 * DAY, 8),
    ("u3", "kiwi", START + 11 * DAY, 9),
]


SEQUENCES = {
    "u1": ["fig", "apple", "pear", "kiwi"],
    "u2": ["fig", "pear", "kiwi"],
    "u3": ["fig", "apple", "kiwi"],
}


def table(rows: list[tuple[Any, ...]] = ROWS, **changed: Any) -> pa.Table:
    columns = dict(
        zip(
            ("user_id", "item_id", "timestamp", "row"),
            map(list, zip(*rows, strict=True)),
            strict=True,
        )
    )
    return pa.table(columns | changed)


def parquet(folder: Path, content: pa.Table, name: str = "events.parquet") -> Path:
    pq.write_table(content, folder / name)
    return folder / name


def text(folder: Path, content: str, name: str = "events.csv") -> Path:
    data = content.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder / name


def as_csv(rows: list[tuple[Any, ...]] = ROWS, mark: str = ",") -> str:
    head = mark.join(("user_id", "item_id", "timestamp", "row"))
    return "\n".join([head, *(mark.join(map(str, row)) for row in rows)]) + "\n"


def as_json(rows: list[tuple[Any, ...]] = ROWS) -> str:
    names = ("user_id", "item_id", "timestamp", "row")
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)


def sequences(path: Path) -> dict[Any, list[Any]]:
    """Own item ids in order, by own user id."""
    data = Dataset(path)
    users = np.arange(data.num_users)
    items, _, offsets = data.gather(users, np.zeros_like(data.lengths), data.lengths)
    own = data.item_ids.to_pylist()
    return {
        user: [own[item] for item in items[begin:end]]
        for user, begin, end in zip(
            data.user_ids.to_pylist(), offsets[:-1], offsets[1:], strict=True
        )
    }


def prepared(
    source: Path | str, folder: Path, **options: Any
) -> tuple[dict[str, Any], dict[Any, Any]]:
    """stats and sequences of `source`, prepared into a new folder."""
    output = folder / f"out{sum(1 for _ in folder.iterdir())}"
    return prepare(PrepareConfig(**options), source, output), sequences(output)


def refusal(source: Path | str, folder: Path, **options: Any) -> str:
    """The message with which `source` is refused; nothing may be left behind."""
    before = sorted(folder.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        prepare(PrepareConfig(**options), source, folder / "out")
    assert sorted(folder.rglob("*")) == before
    return str(caught.value)


def prepare_app(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """apps/prepare.py in a process of its own."""
    return subprocess.run(
        [sys.executable, "apps/prepare.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
