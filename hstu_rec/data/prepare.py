"""A table of events into a dataset folder (its layout is drawn in dataset.py), in five steps.

    1. read       files as they are, in file and row order                              sources.py
    2. clean      types, bad rows, unit of time --> kept(seq, user, item, time)         clean.py
    3. filter     ids in numbers; repeats, item minimum, user minimum, k-core            events.py
    4. order      users by id, within a user (time, tie, seq); split positions          events.py
    5. write      beside the target, synced, then renamed: complete or not at all       folder.py

DuckDB does 1 to 4 on disk beside the target, so that memory stays under `memory_limit`; beyond that,
the last step takes some numbers a user and an item.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import duckdb

from hstu_rec.data import dataset
from hstu_rec.data.clean import BadRows, Cleaned, TimeUnit, clean
from hstu_rec.data.database import MEMORY_LIMIT, database
from hstu_rec.data.events import (
    count,
    count_titles,
    cut_times,
    drop_rare,
    drop_repeats,
    leave_one_out,
    number,
    order,
)
from hstu_rec.data.features import facts_of, roles_of
from hstu_rec.data.folder import measure, write_events, write_items, write_stats, write_users
from hstu_rec.data.sources import PRESETS, PresetName, find_files, stage
from hstu_rec.durable import make_folder, sync
from hstu_rec.settings import at_least, within, without_effect
from hstu_rec.tracking import Stages

EARLY_S = int(datetime(1975, 1, 1, tzinfo=UTC).timestamp())


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What is read, what is kept, and where training ends."""

    preset: PresetName = "none"
    """Column names of a published data set; the options below override them."""
    user_column: str | None = None
    """Column of user ids, integers or strings; default `user_id` or the preset's."""
    item_column: str | None = None
    """Column of item ids, integers or strings; default `item_id` or the preset's."""
    time_column: str | None = None
    """Column of numbers (see time_unit), timestamps or ISO dates (UTC); default `timestamp`."""
    tie_column: str | None = None
    """Orders a user's events of one time; default: the order of the rows in the input."""
    feature_columns: list[str] = field(default_factory=list)
    """Columns that events carry for ranking models: numbers (ratings, prices) or texts of few values."""
    title_column: str | None = None
    """Column of the items' titles, for people: the most frequent of an item is kept, of equals the first by
    bytes; empty ones are none."""
    rating_column: str | None = None
    """Column of ratings, read for min_rating only; default `rating` or the preset's."""
    time_unit: TimeUnit = "auto"
    """Unit of numeric times; `auto` finds it for dates from 1973 to 2286 and refuses all else."""
    bad_rows: BadRows = "raise"
    """Nulls, negative or unreadable times, malformed lines: an error, or dropped with counts."""
    min_rating: float | None = None
    """Events rated lower are left out."""
    drop_duplicates: bool = False
    """Keeps one of the rows of the same user, item and second."""
    drop_repeats: bool = False
    """Keeps only a user's first event on an item, whenever the others are."""
    min_item_events: int = 1
    """Items with fewer events are left out, before users are counted."""
    min_user_events: int = 3
    """Users with fewer events are left out."""
    kcore: int = 0
    """Leaves out users and items with fewer events, over and over until none is left; 0: off."""
    split: Literal["leave_one_out", "share", "time", "none"] = "leave_one_out"
    """Last event = test and one before = validation; with share the newest valid_fraction and test_fraction
    of each user's events; with time the first events after two points in time; with none there are no
    targets, for histories that are recommended to and not trained on."""
    valid_time: str | None = None
    """split=time: training ends before this ISO date (UTC) or unix second."""
    test_time: str | None = None
    """split=time: validation ends before this ISO date (UTC) or unix second."""
    valid_fraction: float = 0.1
    """split=time without times, and share: part of the events that is for validation."""
    test_fraction: float = 0.1
    """split=time without times, and share: part of the events that is for test."""
    memory_limit: str = MEMORY_LIMIT
    """Memory DuckDB may take, such as 4GB or a share of the machine's; the rest is kept on disk."""
    overwrite: bool = False
    """Replaces a dataset that is already there."""

    def problems(self) -> list[str]:
        """Sentences about values that cannot work."""
        found = at_least(self, 1, "min_item_events", "min_user_events") + at_least(self, 0, "kcore")
        found += within(self, "(-inf, inf)", "min_rating") if self.min_rating is not None else []
        if self.drop_repeats:
            found += without_effect(self, "beside drop_repeats", "drop_duplicates")
        names = list(self.columns().values())
        features = self.feature_columns
        if len(set(features)) < len(features):
            found.append(f"feature_columns must differ; got {', '.join(features)}")
        names = [name for name in names if name not in features]
        if len(set(names)) < len(names):
            found.append(f"user_column, item_column, ... must differ; got {', '.join(names)}")
        if self.rating_column is not None and self.min_rating is None:
            found.append("rating_column has no effect without min_rating; give both or neither")
        fractions = "valid_fraction", "test_fraction"
        found += within(self, "(0, 1)", *fractions)
        if self.split not in ("time", "share"):
            found += without_effect(self, f"with split={self.split}", *fractions)
        elif self.valid_time is not None:
            found += without_effect(self, "beside valid_time and test_time", *fractions)
        if self.valid_fraction + self.test_fraction >= 1:
            found.append(
                "valid_fraction and test_fraction must leave events to train on: sum below 1"
            )
        if (self.valid_time is None) != (self.test_time is None):
            found.append("valid_time and test_time belong together; give both or neither")
        if self.valid_time is not None and self.split != "time":
            found.append("valid_time and test_time have no effect without split=time")
        if self.valid_time is not None and self.test_time is not None and not found:
            try:
                if _seconds(self.valid_time) >= _seconds(self.test_time):
                    found.append("valid_time must be earlier than test_time")
            except ValueError as error:
                found.append(f"valid_time and test_time: {error}")
        return found

    def columns(self) -> dict[str, str]:
        """Role to column name, for the roles that are read."""
        names = PRESETS[self.preset].columns | {
            role: getattr(self, f"{role}_column")
            for role in ("user", "item", "time", "rating", "tie", "title")
            if getattr(self, f"{role}_column") is not None
        }
        if self.min_rating is None:
            names.pop("rating")
        return names | roles_of(self.feature_columns)


def prepare(
    config: PrepareConfig, source: str | Path, output: str | Path, *, has_progress: bool = False
) -> dict[str, Any]:
    """Writes the dataset folder `output` from the event files at `source`; returns its stats.json.

    `output` appears complete or not at all. `has_progress` tells the stages on stderr. Raises
    ValueError for what is wrong with the input or the options, FileNotFoundError when nothing is
    at `source`.
    """
    began = time.perf_counter()
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    output = Path(output)
    _refuse_existing(output, config.overwrite)
    files = find_files(source, PRESETS[config.preset])
    with (
        _appearing(output, config.overwrite) as folder,
        database(folder, config.memory_limit) as connection,
        Stages(7, is_shown=has_progress) as stages,
    ):
        stats = _make(config, files, connection, folder, stages)
        stats["prepare_s"] = round(time.perf_counter() - began, 3)
        stats = write_stats(stats, folder)
    return stats


def _make(
    config: PrepareConfig,
    files: list[Path],
    connection: duckdb.DuckDBPyConnection,
    folder: Path,
    stages: Stages,
) -> dict[str, Any]:
    """Writes the dataset's tables into `folder`; returns their statistics."""
    with stages.stage("read"):
        staged = stage(
            connection,
            files,
            config.columns(),
            PRESETS[config.preset],
            has_bad_lines_dropped=config.bad_rows == "drop",
            folder=folder,
        )
    with stages.stage("clean"):
        cleaned = clean(
            connection,
            staged,
            min_rating=config.min_rating,
            time_unit=config.time_unit,
            bad_rows=config.bad_rows,
        )
    with stages.stage("number ids"):
        features = roles_of(config.feature_columns)
        users_read, items_read = number(connection, cleaned, features)
    with stages.stage("filter"):
        dropped = cleaned.dropped | _filter(connection, config, cleaned)
    with stages.stage("split"):
        cut = _cut(connection, config, cleaned)
        ordered = order(connection, cleaned, cut, features, ends=_ends(config))
    with stages.stage("order, write"):
        write_users(connection, folder)
        tally = write_events(connection, ordered, folder, [*features.values()])
    with stages.stage("measure"):
        write_items(connection, tally, folder)
        measured = measure(connection, tally)
        titles = {"titles": count_titles(connection)} if cleaned.has_title else {}
    assert cleaned.rows_read == tally.num_events + sum(dropped.values())
    split = dict(zip(("valid_time", "test_time"), cut, strict=True)) if cut else {}
    if config.split == "share":
        split = {"valid_fraction": config.valid_fraction, "test_fraction": config.test_fraction}
    return {
        "format_version": dataset.FORMAT_VERSION,
        **measured,
        "rows_read": cleaned.rows_read,
        "users_read": users_read,
        "items_read": items_read,
        "dropped": dropped,
        "features": facts_of(connection, features),
        **titles,
        "time_unit": cleaned.time_unit,
        "split": {"kind": config.split} | split,
        "files": [path.name for path in files],
        "parquet": dataset.fingerprint(folder),
        "config": asdict(config),
    }


def report(stats: dict[str, Any]) -> str:
    """The statistics of a dataset as lines to print."""
    dropped = ", ".join(f"{why} {count:,}" for why, count in stats["dropped"].items()) or "none"
    lengths = ", ".join(f"{name} {value:g}" for name, value in stats["length"].items())
    of = {
        role: f" of {stats[f'{role}_read']:,}" if stats.get(f"{role}_read", 0) > stats[role] else ""
        for role in ("users", "items")
    }
    first, last = (
        datetime.fromtimestamp(stats[f"{end}_timestamp"], UTC).date() for end in ("first", "last")
    )
    split = " ".join(f"{value}" for value in stats["split"].values())
    rate = stats["rows_read"] / max(stats["prepare_s"], 1e-3)
    advice = " (drop_duplicates=true leaves them out)" if "config" in stats else ""
    repeated = f"repeated {stats['duplicates']:,} rows are the same user, item and second as another{advice}"
    return "\n".join(
        (
            f"users    {stats['users']:,}{of['users']}",
            f"items    {stats['items']:,}{of['items']}",
            f"events   {stats['events']:,} of {stats['rows_read']:,} rows; "
            f"density {stats['density']:.3g}",
            f"length   {lengths}",
            f"time     {first} to {last} (UTC), read in {stats['time_unit']}",
            f"ties     {stats['tie_share']:.1%} of events, the last two events of "
            f"{stats['tie_last_two_share']:.1%} of users",
            *([repeated] if stats["duplicates"] else []),
            f"dropped  {dropped}",
            *_features(stats),
            *_titles(stats),
            f"split    {split}: {stats['valid_targets']:,} validation and "
            f"{stats['test_targets']:,} test targets",
            *_remarks(stats),
            f"took     {stats['prepare_s']:.1f} s ({rate:,.0f} rows/s)",
        )
    )


def _features(stats: dict[str, Any]) -> list[str]:
    """What feature_columns hold, a line, and how many events lack it, a line where any does."""
    facts = stats.get("features", {})
    held = ", ".join(
        f"{name} {len(one['values']):,} different texts"
        if "values" in one
        else f"{name} {one['min']:g} to {one['max']:g}"
        for name, one in facts.items()
    )
    counts = {name: one["num_missing"] for name, one in facts.items() if one["num_missing"]}
    told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    lines = [f"features {held}"] if held else []
    return lines + ([f"missing  {told}"] if told else [])


def _remarks(stats: dict[str, Any]) -> Iterator[str]:
    """A line for each sign that the table is not what it should be."""
    for role in ("user", "item"):
        if stats[f"{role}s"] == 1:
            told = f"there is one {role} alone, from which nothing can be learnt"
            yield f"remark   {told}; look at {role}_column"
    if stats["time_unit"] == "s" and stats["last_timestamp"] < EARLY_S:
        yield (
            "remark   all events are before 1975: are these seconds since 1970? Days, as spreadsheets count "
            "them (45000.0), are not; write such times as dates (2024-12-31)"
        )


def _titles(stats: dict[str, Any]) -> list[str]:
    """What became of titles, a line, or none where there is no such column."""
    if (titles := stats.get("titles")) is None:
        return []
    return [
        f"titles   {titles['items_without']:,} items have none; {titles['items_with_several']:,} have "
        "several, of which the most frequent is kept"
    ]


def _seconds(moment: str) -> int:
    """Unix seconds of a number or an ISO date (UTC unless it names its zone)."""
    if re.fullmatch("-?[0-9]+", moment):
        return int(moment)
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError:
        raise ValueError(
            f"{moment!r} is neither unix seconds nor an ISO date such as 2014-01-31"
        ) from None
    return int((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp())


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} is already there; choose another folder or set overwrite=true")
    if (output / dataset.SEQUENCES).exists():
        raise ValueError(
            f"{output} holds {dataset.SEQUENCES}, which another engine wrote, so overwrite=true does not "
            "remove it; choose another folder"
        )
    if not (output / "stats.json").is_file():
        raise ValueError(
            f"{output} is no dataset, so overwrite=true does not remove it; choose another folder"
        )


@contextmanager
def _appearing(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `output` that takes its place if the block succeeds and vanishes if not."""
    folder = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder, f"OUT {output}")
    try:
        yield folder
        sync(folder)
        replaced = output.with_name(f"{output.name}.old-{os.getpid()}")
        if overwrite and output.exists():
            os.rename(output, replaced)
        try:
            os.rename(folder, output)
        except OSError as error:
            raise ValueError(f"{output} appeared while this ran; it was left as it is") from error
        shutil.rmtree(replaced, ignore_errors=True)
        sync(output.parent, is_deep=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cut(
    connection: duckdb.DuckDBPyConnection, config: PrepareConfig, cleaned: Cleaned
) -> tuple[int, int] | None:
    """Unix seconds at which validation and test begin; None where no times split."""
    if config.split != "time":
        return None
    if config.valid_time is not None and config.test_time is not None:
        return _seconds(config.valid_time), _seconds(config.test_time)
    return cut_times(connection, cleaned.seconds, config.valid_fraction, config.test_fraction)


def _ends(config: PrepareConfig) -> tuple[str, str] | None:
    """SQL of train_end and valid_end, by the number of a user's events; None where times split."""
    length = "count(*)"
    if config.split == "share":
        later = config.valid_fraction + config.test_fraction, config.test_fraction
        # Decimals of few digits: 0.7 of 10 events is 7.
        first, second = (
            f"({length} - floor({length} * {share:.9f} + 1e-6)::BIGINT)" for share in later
        )
        return first, second
    return {"leave_one_out": leave_one_out(length), "none": (length, length)}.get(config.split)


def _filter(
    connection: duckdb.DuckDBPyConnection, config: PrepareConfig, cleaned: Cleaned
) -> dict[str, int]:
    """Leaves out events by the options; the rows dropped by each."""
    dropped: dict[str, int] = {}
    if config.drop_duplicates:
        dropped["duplicate row"] = drop_repeats(connection, cleaned, of_one_second=True)
    if config.drop_repeats:
        dropped["repeated item"] = drop_repeats(connection, cleaned)
    for role, least in (("item", config.min_item_events), ("user", config.min_user_events)):
        if least > 1:
            dropped[f"{role} with fewer than {least} events"] = drop_rare(connection, [role], least)
    if config.kcore > 1:
        outside = 0
        while lost := drop_rare(connection, ["user", "item"], config.kcore):
            outside += lost
        dropped[f"outside the {config.kcore}-core"] = outside
    dropped = {why: lost for why, lost in dropped.items() if lost}
    if count(connection) == 0:
        told = "; ".join(f"{why}: {lost:,}" for why, lost in (cleaned.dropped | dropped).items())
        raise ValueError(
            f"no rows are left of {cleaned.rows_read:,}; {told}; lower min_user_events, "
            "min_item_events, kcore or min_rating"
        )
    return dropped
