"""The demonstration's dataset folder, made where data.path is the default."""

import tempfile
from pathlib import Path

from hstu_rec.data.prepare import PrepareConfig, prepare
from hstu_rec.data.stream import DataConfig
from hstu_rec.data.synthetic import SyntheticConfig, event_tables, write_events

DEMO = SyntheticConfig(own_ids="string")


def prepare_demo(path: str | Path) -> None:
    """Makes the demonstration's dataset folder at `path` unless it is there; every time the same.

    Safe when several processes call it at once: whoever is first makes the folder appear.
    Raises ValueError when something else is at `path`.
    """
    path = Path(path)
    if _is_dataset(path):
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "events.parquet"
        write_events(event_tables(DEMO), source)
        try:
            prepare(PrepareConfig(), source, path)
        except ValueError:
            if not _is_dataset(path):
                raise


def prepare_if_demo(path: str) -> None:
    """`prepare_demo` when `path` is the default of data.path."""
    if path == DataConfig().path:
        prepare_demo(path)


def _is_dataset(path: Path) -> bool:
    return (path / "stats.json").is_file()
