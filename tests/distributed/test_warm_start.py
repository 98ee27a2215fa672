"""Runs that begin from another with a grown catalogue: known rows stay, to the bit, new ones are told how."""

import functools
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from hstu_rec import checkpoint, distributed, warm_start
from hstu_rec.checkpoint.storage import StorageReader
from hstu_rec.config import RunConfig, load, save
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.item_map import keep_item_map
from hstu_rec.data.stream import eval_batches
from hstu_rec.durable import digest_of
from hstu_rec.item_table import has_rows, shards_of
from hstu_rec.learner import Learner, resolved
from hstu_rec.trainer import train
from hstu_rec.training import Training
from hstu_rec.warm_start import former_run
from tests.datasets import write_dataset
from tests.ranks import run_ranks

DIM = 8
WEIGHT = "model/table.collection.embeddings.item.weight"
MOMENT = "fused/table.collection.embeddings.item.weight/item.momentum1"


def write_day(
    path: Path, numbers: list[int], kind: type = int, days: int = 20, num_users: int = 30
):
    """Users who go through items of these numbers; own ids are the numbers, or texts with them."""
    random = np.random.default_rng(len(numbers))
    lengths = random.integers(4, 12, num_users)
    favour = np.sort(random.integers(0, len(numbers), (num_users, 12)), axis=1)
    items = [favour[user, :n].tolist() for user, n in enumerate(lengths)]
    times = [np.sort(random.integers(0, days * 86_400, n) + 10**9).tolist() for n in lengths]
    ids = numbers if kind is int else [f"item {number:05d}" for number in numbers]
    return write_dataset(path, items, times, len(numbers), ids)


def settings_of(data: Path, folder: Path, *settings: str) -> list[str]:
    """A small run of two epochs, validated after each."""
    small = [f"encoder.dim={DIM}", "encoder.max_history_len=9", "encoder.dropout=0"]
    steps = ["data.batch_users=8", "loss.num_negatives=12", "eval.with_baselines=false"]
    often = ["train.eval_every_epochs=1", "train.patience=0", "train.log_every_steps=1"]
    paths = [f"data.path={data}", f"train.run_dir={folder}", "train.device=cpu"]
    return [*small, *steps, *often, *paths, "train.max_epochs=2", *settings]


def train_once(data: Path, folder: Path, *settings: str):
    return train(load(RunConfig, settings_of(data, folder, *settings)))


OLD = list(range(0, 400, 10))
# Others come between, before and behind; some are gone.
NEW = sorted({*OLD[3:20], *OLD[24:], -7, 35, 36, 111, 222, 395, 1_000})
NUM_KNOWN = len({*OLD} & {*NEW})


def on_ranks(world_size: int, function, *args):
    """The results by rank; a single rank is this process."""
    if world_size > 1:
        return run_ranks(world_size, function, *args)
    with distributed.process_group("cpu"):
        return [function(*args)]


@pytest.fixture(scope="module")
def former(tmp_path_factory):
    """By number of ranks: (run folder, rows and moments) of yesterday, whose dataset is gone."""

    def make(world_size: int, kind: type):
        folder = tmp_path_factory.mktemp("former")
        write_day(folder / "data", OLD, kind)
        on_ranks(world_size, train_once, folder / "data", folder / "run")
        shutil.rmtree(folder / "data")  # as a daily prepare does
        best = checkpoint.resolve(folder / "run" / "checkpoints", "best")
        saved = {WEIGHT: torch.zeros(len(OLD), DIM), MOMENT: torch.zeros(len(OLD))}
        dcp.load(saved, storage_reader=StorageReader(best), no_dist=True)
        assert saved[MOMENT].any()
        return folder / "run", {name: tensor.numpy() for name, tensor in saved.items()}

    return functools.cache(make)


def begin_warm(data: Path, former_folder: Path, folder: Path, settings: list[str]):
    """(counts, {name: [(first row, rows)]}) after a warm start, before any step."""
    warm_start.BLOCK_ROWS = 5
    config = load(RunConfig, settings_of(data, folder, *settings))
    folder.mkdir(parents=True, exist_ok=True)
    dataset = Dataset(data)
    learner = Learner(config, dataset, torch.device("cpu"))
    begun = warm_start.warm_start(former_run(str(former_folder)), learner, dataset, folder)
    assert [path.name for path in folder.iterdir()] == ["items.parquet"]
    state = checkpoint.named_tensors(learner.state())
    parts = {
        name: [(first, rows.detach().numpy().copy()) for rows, first in shards_of(tensor)]
        for name, tensor in state.items()
        if has_rows(name)
    }
    return vars(begun.items), parts


def whole(results, name):
    shards = sorted(
        (part for _, parts in results for part in parts.get(name, [])), key=lambda p: p[0]
    )
    return np.concatenate([rows for _, rows in shards])


@pytest.mark.parametrize(
    ("ranks_before", "kind", "world_size", "sharding", "new_rows"),
    [
        (2, str, 1, "row_wise", "mean"),
        (1, int, 2, "row_wise", "random"),
        (2, str, 3, "row_wise", "popularity"),
        (2, str, 2, "table_wise", "mean"),
    ],
)
def test_known_rows_stay_and_new_ones_begin_as_told(
    former, tmp_path, ranks_before, kind, world_size, sharding, new_rows
):
    folder, before = former(ranks_before, kind)
    dataset = write_day(tmp_path / "data", NEW, kind)
    settings = [f"table.sharding={sharding}", f"table.new_rows={new_rows}", "train.warm_start=x"]
    results = on_ranks(
        world_size, begin_warm, tmp_path / "data", folder, tmp_path / "run", settings
    )
    for counts, _ in results:
        assert counts == {
            "num_known": NUM_KNOWN,
            "num_new": len(NEW) - NUM_KNOWN,
            "num_retired": len(OLD) - NUM_KNOWN,
        }
    rows, moments = whole(results, WEIGHT), whole(results, MOMENT)
    assert rows.shape == (len(NEW), DIM) and moments.shape == (len(NEW),)
    is_known = np.isin(NEW, OLD)
    olds = np.searchsorted(OLD, np.array(NEW)[is_known])
    np.testing.assert_array_equal(rows[is_known], before[WEIGHT][olds])
    np.testing.assert_array_equal(moments[is_known], before[MOMENT][olds])
    assert not moments[~is_known].any()
    counts = dataset.train_counts
    if new_rows == "random":
        new = rows[~is_known]
        assert np.abs(new[:, None] - before[WEIGHT]).max(2).min() > 1e-4
        assert 0.01 < new.std() < 0.03
    else:
        expected = expected_rows(new_rows, rows[is_known], counts[is_known], counts[~is_known])
        np.testing.assert_allclose(rows[~is_known], expected, rtol=1e-6, atol=1e-8)


def expected_rows(new_rows, known, known_counts, new_counts):
    """Means of known rows, of all or of those with as many binary digits in their training counts."""
    known = known.astype(np.float64)
    if new_rows == "mean":
        return np.broadcast_to(known.mean(0), (len(new_counts), DIM))
    sizes = np.array([int(count).bit_length() for count in known_counts])
    wanted = [int(count).bit_length() for count in new_counts]
    assert len({*wanted}) > 1
    nearest = [min(sorted({*sizes}), key=lambda one: abs(one - size)) for size in wanted]
    return np.stack([known[sizes == size].mean(0) for size in nearest])


@pytest.fixture(scope="module")
def yesterday(tmp_path_factory):
    """(dataset folder, run folder, result) of one process, with calendars by day."""
    folder = tmp_path_factory.mktemp("yesterday")
    write_day(folder / "data", OLD)
    result = train_once(folder / "data", folder / "run", *CALENDARS)
    return folder / "data", folder / "run", result


CALENDARS = ["encoder.calendar=day", "encoder.query_time=next"]


def rows_of_metrics(folder: Path, kind: str):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_a_warm_start_is_measured_as_the_run_that_it_is_from(yesterday, tmp_path):
    data, run, result = yesterday
    warm = f"train.warm_start={run}"
    train_once(data, tmp_path / "run", *CALENDARS, warm)
    first = rows_of_metrics(tmp_path / "run", "valid")[0]
    assert (first["step"], first["epoch"]) == (0, 0)
    for part, values in result["valid"].items():
        if isinstance(values, dict):
            assert {name: first[f"{part}/{name}"] for name in values} == values
    config = load(RunConfig, [str(run / "config.yaml")])
    again = load(RunConfig, [str(tmp_path / "run" / "config.yaml")])
    assert again.encoder == config.encoder


def queries(learner: Learner, dataset: Dataset, users: int):
    """Of validation, of the first users."""
    learner.model.eval()
    with torch.no_grad():
        batch = next(iter(eval_batches(dataset, "valid", 9, users))).history
        return learner.model(batch)[0]


def test_three_days_without_training_change_nothing_of_the_first(yesterday, tmp_path):
    data, run, _ = yesterday
    first_day, former, numbers = Dataset(data), run, OLD
    with distributed.process_group("cpu"):
        config = load(RunConfig, [str(run / "config.yaml")])
        learner = Learner(config, first_day, torch.device("cpu"))
        saved = checkpoint.load(checkpoint.resolve(run / "checkpoints", "best"), learner.state())
        named = checkpoint.named_tensors(learner.state())
        before = {name: shards_of(named[name])[0][0].clone() for name in (WEIGHT, MOMENT)}
        asked = queries(learner, first_day, 20)
        for day in range(1, 4):
            numbers = sorted({*numbers, day, 100 * day + 1, 10_000 + day} - {OLD[day]})
            here = tmp_path / f"{day}"
            dataset = write_day(here / "data", numbers, days=20 + 10 * day, num_users=30 + day)
            config = load(RunConfig, settings_of(here / "data", here / "run", *CALENDARS))
            origin = former_run(str(former))
            config = resolved(config, dataset, origin.config.encoder)
            origin.check(config)
            learner = Learner(config, dataset, torch.device("cpu"))
            former = here / "run"
            former.mkdir()
            begun = warm_start.warm_start(origin, learner, dataset, former)
            assert begun.items.num_new == 3 and begun.items.num_retired == 1
            assert begun.num_steps == saved["progress"]["step"]
            progress = {"step": 0, "steps_before": begun.num_steps}
            path = checkpoint.save(
                former / "checkpoints", 0, learner.state(), {"progress": progress, "items": None}
            )
            checkpoint.point(former / "checkpoints", "best", path)
            save(config, former / "config.yaml")
            keep_item_map(dataset.path, former)
        named = checkpoint.named_tensors(learner.state())
        kept = [number for number in OLD if number in numbers]
        now, then = np.searchsorted(numbers, kept), np.searchsorted(OLD, kept)
        for name, rows in before.items():
            assert torch.equal(shards_of(named[name])[0][0][now], rows[then])
        # The first day's histories, where all their items are left, mean what they did, in a later calendar.
        assert len(learner.encoder.calendar.embedding) > len(saved) and len(kept) == len(OLD) - 3
        mapped = write_mapped(tmp_path / "mapped", first_day, np.searchsorted(numbers, OLD))
        is_whole = [has_none(first_day, user, {1, 2, 3}) for user in range(20)]
        assert sum(is_whole) > 3
        again = queries(learner, mapped, 20)
        assert torch.equal(again[is_whole], asked[is_whole])


def write_mapped(path: Path, dataset: Dataset, places: np.ndarray) -> Dataset:
    """The same users with other indices of items."""
    everyone = np.arange(dataset.num_users)
    items, times, offsets = dataset.gather(everyone, 0 * everyone, dataset.lengths)
    parts = [slice(*pair) for pair in itertools.pairwise(offsets)]
    mapped = [places[items[part]].tolist() for part in parts]
    return write_dataset(path, mapped, [times[part].tolist() for part in parts])


def has_none(dataset: Dataset, user: int, items: set[int]) -> bool:
    ids, _, _ = dataset.gather(*(np.array([n]) for n in (user, 0, dataset.lengths[user])))
    return not items & {*ids.tolist()}


class Stopped(Exception):
    """Stands for whatever ends a run early."""


def test_an_interrupted_warm_started_run_goes_on(yesterday, tmp_path, monkeypatch):
    _, run, _ = yesterday
    gone = shutil.copytree(run, tmp_path / "gone")
    write_day(tmp_path / "data", NEW, days=40)
    settings = [*CALENDARS, f"train.warm_start={gone}", "train.resume=auto"]
    train_once(tmp_path / "data", tmp_path / "whole", *settings)
    validate = Training._validate

    def validate_and_stop(training):
        validate(training)
        if training.progress.epoch == 1:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_validate", validate_and_stop)
        with pytest.raises(Stopped):
            train_once(tmp_path / "data", tmp_path / "run", *settings)
    shutil.rmtree(gone)
    result = train_once(tmp_path / "data", tmp_path / "run", *settings)
    assert len(rows_of_metrics(tmp_path / "run", "warm_start")) == 1
    for kind in ("train", "valid"):
        expected, found = (rows_of_metrics(tmp_path / one, kind) for one in ("whole", "run"))
        # A validation whose result was in no checkpoint yet is done again, to the same figures.
        by_step = {row["step"]: untimed(row) for row in found}
        assert [by_step[row["step"]] for row in found] == [untimed(row) for row in found]
        assert list(by_step.values()) == [untimed(row) for row in expected]
    assert result["timing"]["epochs"] == 2
    begin, end = (load_encoder(one / "config.yaml") for one in (run, tmp_path / "run"))
    assert begin.calendar_begin == end.calendar_begin
    assert begin.calendar_end < end.calendar_end


def untimed(row):
    return {name: value for name, value in row.items() if name != "time_s"}


def load_encoder(path: Path):
    return load(RunConfig, [str(path)]).encoder


def refusal(data: Path, folder: Path, *settings: str) -> str:
    with pytest.raises(ValueError) as raised:
        train_once(data, folder, *settings)
    return str(raised.value)


def test_another_model_is_refused_with_all_that_differs(yesterday, tmp_path):
    data, run, _ = yesterday
    other = ["encoder.dim=4", "table.optimizer=sgd", "loss.use_seen_bias=true"]
    sentence = refusal(data, tmp_path / "run", *CALENDARS, f"train.warm_start={run}", *other)
    for differs in (
        "encoder.dim is 8 there and 4 here",
        "table.optimizer is rowwise_adagrad there",
    ):
        assert differs in sentence
    assert "loss.use_seen_bias is False there and True here" in sentence
    assert not (tmp_path / "run").exists()
    early = ["encoder.calendar_begin=1", "encoder.calendar_end=1000000000"]
    sentence = refusal(data, tmp_path / "run", *CALENDARS, f"train.warm_start={run}", *early)
    assert "encoder.calendar_begin is 1000" in sentence and "encoder.calendar_end is" in sentence


def test_a_run_folder_that_does_not_tell_its_items_is_refused(yesterday, tmp_path):
    data, run, _ = yesterday
    bare = shutil.copytree(run, tmp_path / "bare")
    (bare / "items.parquet").unlink()
    step = next(iter((bare / "checkpoints").glob("step_*")))
    for given in (bare, step, tmp_path / "typo"):
        sentence = refusal(data, tmp_path / "run", *CALENDARS, f"train.warm_start={given}")
        assert f"{bare / 'items.parquet' if given != tmp_path / 'typo' else given}" in sentence
        assert "missing; give the folder of a run" in sentence
    assert not (tmp_path / "run").exists()


def test_own_ids_must_be_of_one_type_and_have_something_in_common(yesterday, tmp_path):
    _, run, _ = yesterday
    write_day(tmp_path / "strings", OLD, str)
    write_day(tmp_path / "others", [number + 1 for number in OLD])
    warm = [*CALENDARS, f"train.warm_start={run}"]
    sentence = refusal(tmp_path / "strings", tmp_path / "run", *warm)
    assert "item ids are whole numbers in" in sentence and "and strings in" in sentence
    assert "nothing in common" in refusal(tmp_path / "others", tmp_path / "run2", *warm)


def test_a_map_of_other_items_is_refused(yesterday, tmp_path):
    data, run, _ = yesterday
    other = shutil.copytree(run, tmp_path / "other")
    shutil.copy(write_day(tmp_path / "data", OLD[1:]).path / "items.parquet", other)
    sentence = refusal(data, tmp_path / "run", *CALENDARS, f"train.warm_start={other}")
    assert f"does not fit torch.float32 [{len(OLD)}, {DIM}] and {len(OLD) - 1} former" in sentence
    for path in (other / "checkpoints").glob("step_*/meta.json"):
        path.write_text(path.read_text().replace('"items": null', '"items": "0123"'))
        manifest = json.loads((path.parent / "manifest.json").read_text())
        manifest["files"]["meta.json"] = digest_of(path)
        (path.parent / "manifest.json").write_text(json.dumps(manifest))
    sentence = refusal(data, tmp_path / "run2", *CALENDARS, f"train.warm_start={other}")
    assert "does not hold the items that" in sentence


def test_settings_that_contradict_a_warm_start_are_told(tmp_path):
    cases = {
        "two beginnings": ["train.warm_start=a", "train.resume=b/checkpoints/step_00000001"],
        "another run than train.run_dir": ["train.warm_start=a/checkpoints", "train.run_dir=a"],
        "table.new_rows has no effect": ["table.new_rows=mean"],
    }
    for sentence, given in cases.items():
        with pytest.raises(ValueError, match=sentence):
            load(RunConfig, given)
    own = ["train.run_dir=b", "train.resume=b/checkpoints/step_00000001"]
    assert load(RunConfig, ["train.warm_start=a", *own]).train.warm_start == "a"
