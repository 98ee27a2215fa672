"""Vectors in int8 and an index of the items lose what the bundle tells, and nothing else changes."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hstu_rec import export, load_bundle
from hstu_rec.bundle import BundleError
from hstu_rec.data.dataset import Dataset
from hstu_rec.durable import digest_of
from hstu_rec.export import ExportConfig
from hstu_rec.item_index import ItemIndex
from hstu_rec.quantised import Int8Rows
from hstu_rec.scores import Catalogue, ItemShard, Seen, best_items
from tests.shared_models import changed, events_of, lists, train_run, write_data

ROOT = Path(__file__).parent.parent
NUM_USERS = 300


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("approximate")
    write_data(folder / "data", NUM_USERS)
    train_run(folder / "data", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def exact(run):
    export.export(run, run.parent / "exact", ExportConfig(index="exact"))
    return run.parent / "exact"


@pytest.fixture(scope="module")
def small(run):
    """With int8 vectors, written in several blocks, and an index of cells."""
    options = ExportConfig(vectors="int8", index="ivf", index_recall=0.8)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export, "BLOCK_ROWS", 64)
        export.export(run, run.parent / "small", options)
    return run.parent / "small"


def about(folder):
    return json.loads((folder / "config.json").read_text())["about"]


def test_int8_rows_are_within_half_a_scale_and_read_like_a_tensor():
    rows = torch.randn(70, 5) * torch.logspace(-30, 20, 70)[:, None]
    rows[3], rows[4] = 0, 1e-45
    small = Int8Rows.of(rows)
    whole = small[:]
    scales = rows.abs().amax(1, keepdim=True) / 127
    assert whole.isfinite().all() and ((whole - rows).abs() <= scales * 0.50001 + 1e-44).all()
    ids = torch.tensor([5, 0, 69, 5])
    assert whole[ids].equal(small[ids]) and whole[ids].equal(small.index_select(0, ids))
    assert whole.equal(torch.cat([*small.split(13)])) and whole[9:20].equal(small[9:20])
    assert len(small) == 70 and small.shape == (70, 5) and small.values.dtype == torch.int8


@pytest.mark.parametrize("kind", ["exact", "ivf"])
@pytest.mark.parametrize("added", [-torch.inf, 0.5, -0.5, 0.0])
def test_an_index_that_searches_everything_finds_the_best_with_seen_items_apart(kind, added):
    torch.manual_seed(3)
    rows, queries = torch.randn(500, 6), nn.functional.normalize(torch.randn(40, 6))
    rows[7] = rows[400] = rows[401]  # equal scores
    catalogue = Catalogue.of(ItemShard(rows, 0, 500, nn.functional.normalize))
    index = ItemIndex.build(kind, catalogue.shard)
    if kind == "ivf":
        assert (index.num_cells, index.num_probed) == (90, 1)
        index.num_probed = index.num_cells
    owners = torch.randint(0, 20, (400,))  # half of the queries have none
    seen = Seen(owners, torch.randint(0, 500, (400,)), added)
    for num_best in (1, 10, 10**6):
        wanted = best_items(queries, catalogue, num_best, seen)
        found = index.best_items(queries, catalogue, num_best, seen)
        is_one = ~wanted[0].isneginf()
        assert found[0].equal(wanted[0]) and found[1][is_one].equal(wanted[1][is_one])


def test_cells_are_added_until_as_many_items_are_found_as_are_asked_for():
    torch.manual_seed(3)
    rows, queries = torch.randn(500, 6), nn.functional.normalize(torch.randn(40, 6))
    catalogue = Catalogue.of(ItemShard(rows, 0, 500, nn.functional.normalize))
    index = ItemIndex.build("ivf", catalogue.shard)  # of cells that hold about five
    owners = torch.arange(40).repeat_interleave(30)
    seen = Seen(owners, torch.randint(0, 500, (1200,)), -torch.inf)
    for num_best in (1, 60, 400):
        scores, _ = index.best_items(queries, catalogue, num_best, seen)
        assert scores.isfinite().all() and index.num_probed == 1
    scores, _ = index.best_items(queries, catalogue, 500, seen)
    left = 500 - torch.tensor([len(seen.items[owners == user].unique()) for user in range(40)])
    assert scores.isfinite().sum(1).equal(left)


def test_an_exact_index_recommends_what_all_scores_do(exact, run):
    told = about(exact)["index"]
    assert told["kind"] == "exact" and told["recall@10"] == 1 and told["users"] == NUM_USERS
    data = Dataset(run.parent / "data")
    events, _, _ = events_of(data, np.arange(NUM_USERS))
    plain, indexed = load_bundle(exact), load_bundle(exact, use_index=True)
    for filter_seen in (True, False):
        wanted = plain.recommend(events, 7, filter_seen=filter_seen)
        assert indexed.recommend(events, 7, filter_seen=filter_seen).equals(wanted)
    chosen = [f"item {number:04d}" for number in range(0, 150, 9)]
    wanted = plain.recommend(events, 7, candidates=chosen)
    assert indexed.recommend(events, 7, candidates=chosen).equals(wanted)


def test_cells_find_as_many_of_the_ten_best_as_the_bundle_tells(small, exact, run):
    told = about(small)["index"]
    assert 0.8 <= told["recall@10"] <= 1 and 1 <= told["cells searched"] <= told["cells"] == 49
    events, _, _ = events_of(Dataset(run.parent / "data"), np.arange(NUM_USERS))
    indexed, float32 = load_bundle(small, use_index=True), load_bundle(exact)
    wanted, found = (lists(model.recommend(events, 10)) for model in (float32, indexed))
    shares = [len({*wanted[user]} & {*found[user]}) / 10 for user in range(NUM_USERS)]
    # Told of float32 scores; the few that int8 changes are within .05.
    assert np.mean(shares) == pytest.approx(told["recall@10"], abs=0.05)


def test_vectors_in_int8_lose_what_the_bundle_tells(small, exact, run):
    told = about(small)["int8"]
    sizes = [(folder / "item_vectors.safetensors").stat().st_size for folder in (exact, small)]
    assert (told["bytes, float32"], told["bytes, int8"]) == (150 * 8 * 4, 150 * (8 + 4))
    assert sizes[0] - sizes[1] == pytest.approx(150 * (8 * 4 - 8 - 4), abs=200)
    events, at, targets = events_of(Dataset(run.parent / "data"), np.arange(NUM_USERS))
    last = {"user_id": np.arange(NUM_USERS), "item_id": np.array(targets)}
    last["timestamp"] = np.array([at[user] for user in range(NUM_USERS)])
    through = {name: np.concatenate([events[name], last[name]]) for name in events}
    for folder, name in ((exact, "recall@10, float32"), (small, "recall@10, int8")):
        found = load_bundle(folder).evaluate(through, [10])
        assert found["num_users"] == told["users"] == NUM_USERS
        assert found["seen_masked"]["recall@10"] == pytest.approx(told[name], abs=1e-12)
    assert told["loss"] == told["recall@10, float32"] - told["recall@10, int8"]
    assert abs(told["loss"]) < 0.02 < told["recall@10, int8"]
    rows = Int8Rows.of(load_bundle(exact).model.table.rows[:])[:]
    assert load_bundle(small).model.table.rows[:].equal(rows)
    card = (small / "README.md").read_text()
    assert "recall@10, int8" in card and "cells searched" in card


def test_the_app_tells_in_sentences_what_is_lost(run, tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "apps" / "export.py"))["main"]
    main([str(run), str(tmp_path / "small"), "vectors=int8", "index=ivf", "index_recall=0.8"])
    loss, index = about(tmp_path / "small")["int8"], about(tmp_path / "small")["index"]
    main([str(run), str(tmp_path / "exact"), "index=exact"])
    _, int8, ivf, _, exact = capsys.readouterr().out.splitlines()
    assert int8 == (
        f"int8     Recall@10 of {NUM_USERS} test users is {loss['recall@10, int8']:.4f}, in float32 "
        f"{loss['recall@10, float32']:.4f}; the item vectors take 2 KiB, in float32 5 KiB"
    )
    assert ivf == (
        f"index    ivf finds {index['recall@10']:.2%} of the 10 best items of {NUM_USERS} test users; "
        f"{index['cells searched']} of 49 cells are searched"
    )
    assert exact == (
        f"index    exact finds 100.00% of the 10 best items of {NUM_USERS} test users; all items are compared"
    )


def test_an_index_is_opened_when_asked_for_and_held_against_its_digest_and_the_model(
    small, exact, tmp_path
):
    other = shutil.copytree(small, tmp_path / "other")
    whole = (other / "items.faiss").read_bytes()
    (other / "items.faiss").write_bytes(whole[:-1] + b"x")
    load_bundle(other)
    with pytest.raises(BundleError, match=r"items.faiss has changed since it was exported"):
        load_bundle(other, use_index=True)
    files = json.loads((other / "config.json").read_text())["files"]

    def forged(content):
        (other / "items.faiss").write_bytes(content)
        changed(other, files=files | {"items.faiss": digest_of(other / "items.faiss")})

    for content in (b"", whole[:200], b"not an index" * 9):
        forged(content)
        with pytest.raises(BundleError, match=r"items.faiss: FAISS cannot read it"):
            load_bundle(other, use_index=True)
    few = ItemShard(torch.randn(9, 8), 0, 9)
    ItemIndex.build("exact", few).write(tmp_path / "few")
    forged((tmp_path / "few").read_bytes())
    with pytest.raises(BundleError, match="it holds 9 items of 8, not 150 of 8"):
        load_bundle(other, use_index=True)
    changed(other, files={name: one for name, one in files.items() if name != "items.faiss"})
    with pytest.raises(BundleError, match="holds no index of its items; load it without use_index"):
        load_bundle(other, use_index=True)


def test_vectors_of_another_kind_than_told_are_refused(small, tmp_path):
    other = shutil.copytree(small, tmp_path / "other")
    changed(other, vectors="float32")
    with pytest.raises(BundleError, match=r"item_scales', which the model of config.json has not"):
        load_bundle(other)
    changed(other, vectors="int4")
    with pytest.raises(BundleError, match="vectors must be one of float32, int8; got 'int4'"):
        load_bundle(other)


def test_what_cannot_be_measured_is_not_exported(run, tmp_path):
    with pytest.raises(ValueError, match=r"is no dataset folder; give data=FOLDER"):
        export.export(run, tmp_path / "out", ExportConfig(vectors="int8", data=str(tmp_path)))
    assert not [*tmp_path.iterdir()]
    assert ExportConfig(data="x").problems() and ExportConfig(index_recall=0.5).problems()
    assert not ExportConfig(index="ivf", index_recall=0.5, data="x").problems()
