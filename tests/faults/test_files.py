"""Event files that cannot be read, or not all alike: named, or cast without a loss."""

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hstu_rec.data import sources
from hstu_rec.data.prepare import PrepareConfig, prepare
from tests.bad_files import BAD_FILES, without_rights
from tests.event_files import (
    ROWS,
    parquet,
    prepare_app,
    prepared,
    refusal,
    table,
)
from tests.faults.tries import Tries


@pytest.mark.fault("R30")
def test_every_bad_file_is_refused_by_name_and_leaves_nothing(tmp_path: Path, tries: Tries) -> None:
    wrong = {}
    for number, (fault, bad) in enumerate(BAD_FILES.items()):
        folder = tmp_path / f"{number}"
        (folder / "in").mkdir(parents=True)
        told = refusal(bad.write(folder / "in"), folder)
        has_held = bad.told in told and bad.named in told and str(folder) in told
        tries.count(has_held)
        if not has_held:
            wrong[fault] = told
    assert not wrong


@pytest.mark.fault("R30")
def test_types_that_differ_without_a_loss_are_one(tmp_path: Path, tries: Tries) -> None:
    items = list(range(10))
    pairs: dict[str, tuple[Any, Any]] = {
        "int32, int64": (pa.array(items, pa.int32()), pa.array(items)),
        "uint64, int8": (pa.array(items, pa.uint64()), pa.array(items, pa.int8())),
        "dictionary, string": (
            pa.array(map(str, items)).dictionary_encode(),
            pa.array(map(str, items), pa.large_string()),
        ),
        "decimal, int64": (pa.array(items).cast(pa.decimal128(20, 0)), pa.array(items)),
    }
    for number, (first, second) in enumerate(pairs.values()):
        source = tmp_path / f"{number}"
        source.mkdir()
        parquet(source, table(item_id=first), "a.parquet")
        parquet(source, table(item_id=second), "b.parquet")
        stats, found = prepared(source, tmp_path)
        tries.count(stats["events"] == 20 and len(found["u1"]) == 8)


@pytest.mark.fault("R30")
def test_other_files_a_loop_of_folders_and_partitions_change_nothing(tmp_path: Path) -> None:
    wanted = prepared(parquet(tmp_path, table()), tmp_path)[1]
    part = tmp_path / "in" / "user_id=7"
    part.mkdir(parents=True)
    (part / "again").symlink_to(part, target_is_directory=True)
    (part / "readme.md").write_text("events")
    (part / "_SUCCESS").touch()
    parquet(part, table())
    for source in (part, tmp_path / "in" / "**" / "*.parquet"):
        stats, found = prepared(source, tmp_path)
        assert found == wanted and stats["rows_read"] == len(ROWS)


@pytest.mark.fault("R30")
def test_a_file_without_permission_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        source = parquet(folder, table())
        source.chmod(0)
        with without_rights():
            told = refusal(source, folder)
    assert f"{source}: cannot be read: " in told and "ermission denied" in told


@pytest.mark.fault("R30")
def test_a_file_that_vanishes_while_others_are_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(tmp_path, table(), "a.parquet")
    last = parquet(tmp_path, table(), "b.parquet")
    check_types = sources._same_types

    def meanwhile(*given: Any) -> None:
        last.unlink(missing_ok=True)
        check_types(*given)

    monkeypatch.setattr(sources, "_same_types", meanwhile)
    with pytest.raises(FileNotFoundError, match=r"b\.parquet was there and is gone"):
        prepare(PrepareConfig(), tmp_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.fault("R30")
def test_the_app_ends_with_a_sentence_where_no_folder_can_be(tmp_path: Path) -> None:
    source = parquet(tmp_path, table())
    done = prepare_app(source, source / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "no file, folder or glob match at ''" in refusal("", tmp_path)
