"""Reading event files: formats, presets, order of rows, and files that cannot be read."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from event_files import (
    ROWS,
    SEQUENCES,
    START,
    as_csv,
    as_json,
    parquet,
    prepared,
    refusal,
    table,
    text,
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("events.csv", as_csv()),
        ("events.csv.gz", as_csv()),
        ("events.tsv", as_csv(mark="\t")),
        ("events.csv", as_csv(mark=";")),
        ("events.csv", "\ufeff" + as_csv().replace("\n", "\r\n")),
        ("events.jsonl", as_json()),
        ("events.json.gz", as_json()),
    ],
)
def test_every_text_format_gives_the_same_dataset_as_parquet(
    tmp_path: Path, name: str, content: str
) -> None:
    wanted, _ = prepared(parquet(tmp_path, table()), tmp_path)
    stats, found = prepared(text(tmp_path, content, name), tmp_path)
    assert found == SEQUENCES
    assert stats["item_map_hash"] == wanted["item_map_hash"]
    assert stats["rows_read"] == stats["events"] == len(ROWS)


def test_gzipped_parquet_is_read(tmp_path: Path) -> None:
    packed = tmp_path / "events.parquet.gz"
    packed.write_bytes(gzip.compress(parquet(tmp_path, table()).read_bytes()))
    assert prepared(packed, tmp_path)[1] == SEQUENCES


def test_folder_and_glob_read_files_in_order_of_their_names(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    text(parts, as_csv(ROWS[5:]), "b.csv")
    text(parts, as_csv(ROWS[:5]), "a.csv.gz")
    (parts / "_SUCCESS").touch()
    (parts / "notes.md").write_text("no events here")
    for source in (parts, parts / "*.csv*"):
        stats, found = prepared(source, tmp_path)
        assert found == SEQUENCES
        assert stats["files"] == ["a.csv.gz", "b.csv"]


def test_a_file_whose_name_looks_like_a_glob_is_one_file(tmp_path: Path) -> None:
    text(tmp_path, as_csv(), "x.csv")
    assert prepared(text(tmp_path, as_csv(), "[x]*.csv"), tmp_path)[0]["rows_read"] == len(ROWS)


def test_presets_read_the_published_files(tmp_path: Path) -> None:
    reviews = "".join(
        json.dumps(
            {
                "reviewerID": user,
                "asin": item,
                "overall": 5.0,
                "unixReviewTime": when,
                "reviewText": "a\n,",
            }
        )
        + "\n"
        for user, item, when, _ in ROWS
    )
    source = text(tmp_path, reviews, "reviews_5.json.gz")
    assert prepared(source, tmp_path, preset="amazon2014")[1] == SEQUENCES
    ratings = "".join(f"{user},{item},5.0,{when}\n" for user, item, when, _ in ROWS)
    assert (
        prepared(text(tmp_path, ratings), tmp_path, preset="amazon2014", min_rating=4)[1]
        == SEQUENCES
    )
    movielens = tmp_path / "ml"
    movielens.mkdir()
    text(movielens, "1::Heat (1995)::Action\n", "movies.dat")
    text(movielens, "".join(f"1::{item}::{item}::{START}\n" for item in (5, 3, 4)), "ratings.dat")
    text(movielens, "movieId,title\n1,Heat\n", "movies.csv")
    csv = "userId,movieId,rating,timestamp\n" + "".join(
        f"1,{item},{item}.5,{START}\n" for item in (5, 3, 4)
    )
    text(movielens, csv, "ratings.csv")
    assert prepared(movielens / "ratings.dat", tmp_path, preset="movielens_dat")[1] == {
        1: [5, 3, 4]
    }
    assert prepared(movielens / "ratings.csv", tmp_path, preset="movielens_csv")[1] == {
        1: [5, 3, 4]
    }
    (movielens / "ratings.csv").unlink()
    assert prepared(movielens, tmp_path, preset="movielens_dat")[1] == {1: [5, 3, 4]}


def test_column_options_override_names(tmp_path: Path) -> None:
    renamed = table().rename_columns(["who", "what", "when", "nth"])
    options = {
        "user_column": "who",
        "item_column": "what",
        "time_column": "when",
        "tie_column": "nth",
    }
    assert prepared(parquet(tmp_path, renamed), tmp_path, **options)[1] == SEQUENCES


def test_missing_column_names_the_nearest(tmp_path: Path) -> None:
    for source in (
        parquet(tmp_path, table().rename_columns(["User_ID", "item_id", "timestamp", "row"])),
        text(tmp_path, as_csv().replace("user_id", "userid")),
        text(tmp_path, as_json().replace("user_id", "userid"), "e.json"),
    ):
        message = refusal(source, tmp_path)
        assert f"{source}: column 'user_id' is missing; nearest: 'user" in message.replace(
            "'User_ID", "'user_id"
        )
        assert "user_column=NAME" in message
    assert "column 'rating' is missing" in refusal(
        source, tmp_path, min_rating=3, user_column="userid"
    )


@pytest.mark.fault("R30")
def test_unreadable_files_are_named(tmp_path: Path) -> None:
    whole = parquet(tmp_path, table()).read_bytes()
    packed = gzip.compress(as_csv(ROWS * 50).encode())
    flipped = bytearray(packed)
    flipped[-6] ^= 1
    cases = {
        "cut.parquet": whole[:-20],
        "text.parquet": b"user_id,item_id\n",
        "empty.parquet": b"",
        "empty.csv": b"",
        "empty.csv.gz": gzip.compress(b""),
        "cut.csv.gz": packed[: len(packed) // 2],
        "uncut.csv.gz": packed[:-4],
        "flipped.csv.gz": bytes(flipped),
        "plain.csv.gz": as_csv().encode(),
        "short.csv": (as_csv() + "u1,fig\n").encode(),
        "long.csv": (as_csv() + "u1,fig,1,2,3\n").encode(),
        "latin.csv": as_csv().encode() + b"caf\xe9,fig,1300000000,1\n",
        "utf16.csv": as_csv().encode("utf-16"),
        "cut.json": as_json().encode()[:-9],
        "array.json": b"[" + as_json().encode().replace(b"\n", b",\n")[:-2] + b"]",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in refusal(tmp_path / name, tmp_path), name


@pytest.mark.fault("R30")
def test_malformed_lines_are_dropped_with_counts_on_request(tmp_path: Path) -> None:
    source = text(tmp_path, as_csv() + "u1,fig\nu1,fig,1,2,3\n")
    assert "line 12, counted with the header: Original Line: u1,fig" in refusal(source, tmp_path)
    stats, found = prepared(source, tmp_path, bad_rows="drop")
    assert found == SEQUENCES
    assert stats["dropped"] == {"malformed line": 2} and stats["rows_read"] == len(ROWS) + 2
    broken = text(tmp_path, as_json() + '{"user_id": "u1", "it', "e.json")
    stats, found = prepared(broken, tmp_path, bad_rows="drop")
    assert found == SEQUENCES and stats["rows_read"] == len(ROWS) + 1


@pytest.mark.fault("R30")
def test_files_of_different_column_types_are_refused(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    parquet(parts, table(item_id=list(range(10))), "a.parquet")
    parquet(parts, table(item_id=[float(n) for n in range(10)]), "b.parquet")
    message = refusal(parts, tmp_path)
    assert f"{parts / 'b.parquet'}: column 'item_id' is DOUBLE here but BIGINT in" in message
    parquet(parts, table(item_id=pa.array(range(10), pa.int16())), "b.parquet")
    assert prepared(parts, tmp_path)[0]["rows_read"] == 20


def test_sources_that_are_not_there_or_of_unknown_kind_are_refused(tmp_path: Path) -> None:
    assert "no file, folder or glob match" in refusal(tmp_path / "nothing*.csv", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no event file" in refusal(tmp_path / "empty", tmp_path)
    assert "unknown file type" in refusal(text(tmp_path, as_csv(), "events.xlsx"), tmp_path)
    text(tmp_path, as_csv(), "e.csv")
    text(tmp_path, as_json(), "e.json")
    assert "holds csv and json files" in refusal(tmp_path, tmp_path)


def test_a_first_line_that_is_an_event_is_told(tmp_path: Path) -> None:
    told = refusal(text(tmp_path, as_csv().split("\n", 1)[1]), tmp_path)
    assert (
        "column 'user_id' is missing; the file has 'u2', 'pear', '1300432000', '0'; the first"
        in told
    )
    assert "write a line such as user_id,item_id,timestamp before it" in told
    told = refusal(text(tmp_path, "ann,book,2024-01-01\nbob,cd,2024-01-02\n"), tmp_path)
    assert (
        "the file has 'ann', 'book', '2024-01-01'; is the header missing? Then write a line such as "
        "user_id,item_id,timestamp before it; if not, set user_column=NAME"
    ) in told
    told = refusal(text(tmp_path, "user,item,2\n1,2,3\n"), tmp_path, user_column="user")
    assert told.endswith("set item_column=NAME")
