"""Small trained runs with own ids, and their bundles."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from hstu_rec import bundle
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.durable import digest_of
from hstu_rec.trainer import train
from tests.datasets import write_dataset

SMALL = [
    *("encoder.dim=8", "encoder.max_history_len=6", "encoder.num_layers=1", "encoder.dropout=0"),
    *("loss.num_negatives=32", "loss.use_seen_bias=true", "optim.lr=1e-2", "table.lr=0.3"),
    *("eval.with_baselines=false", "eval.ks=[10]", "train.device=cpu", "train.max_epochs=3"),
]


def write_data(path: Path, num_users: int = 1000, num_items: int = 150) -> Dataset:
    """Users of 3 to 14 events, each in most cases followed by the item after it; own ids are texts."""
    random = np.random.default_rng(7)
    items, times = [], []
    for length in random.integers(3, 15, num_users):
        jumps = np.where(random.random(length) < 0.7, 1, random.integers(0, num_items, length))
        items.append((np.cumsum(jumps) % num_items).tolist())
        times.append(np.sort(random.integers(10**9, 10**9 + 10**6, length)).tolist())
    ids = [f"item {number:04d}" for number in random.permutation(num_items)]
    return write_dataset(path, items, times, num_items, ids)


def train_run(data: Path, folder: Path, *settings: str) -> None:
    """A run of seconds."""
    train(load(RunConfig, [*SMALL, f"data.path={data}", f"train.run_dir={folder}", *settings]))


def events_of(dataset: Dataset, users: np.ndarray) -> tuple[dict, dict[int, int], list[str]]:
    """(events in own ids before the test target, in random order; its time by user; its own id)."""
    ends = dataset.valid_ends[users]
    items, times, offsets = dataset.gather(users, 0 * users, ends)
    targets, target_times, _ = dataset.gather(users, ends, ends + 1)
    own = np.array(dataset.item_ids.to_pylist())
    order = np.lexsort(
        (times, np.random.default_rng(1).permutation(len(users)).repeat(np.diff(offsets)))
    )
    events = {
        "user_id": np.repeat(users, np.diff(offsets))[order],
        "item_id": own[items][order],
        "timestamp": times[order],
    }
    at = dict(zip(users.tolist(), target_times.tolist(), strict=True))
    return events, at, own[targets].tolist()


def lists(table) -> dict[int, list[str]]:
    """Items by user, best first."""
    found: dict[int, list[str]] = {}
    columns = (table.column(name).to_pylist() for name in ("user_id", "rank", "item_id"))
    for user, rank, item in zip(*columns, strict=True):
        found.setdefault(user, []).append(item)
        assert rank == len(found[user])
    return found


def program_lists(folder: Path, dataset: Dataset, longest: int) -> dict[int, list[str]]:
    """Ten best unseen items of every user by a bundle's program.pt2 and plain products with the vectors of
    its files, by the newest `longest` events."""
    program, num_users = torch.export.load(folder / "program.pt2").module(), dataset.num_users
    units = load_file(folder / "item_vectors.safetensors")["item_vectors"].double().numpy()
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    own = pq.read_table(folder / "items.parquet").column("item_id").to_pylist()
    users, ends = np.arange(num_users), dataset.valid_ends
    items, times, offsets = dataset.gather(users, 0 * users, ends)
    _, at, _ = dataset.gather(users, ends, ends + 1)
    ids, seconds = np.zeros((2, num_users, longest), dtype=np.int64)
    lengths = np.minimum(np.diff(offsets), longest)
    for user, (end, length) in enumerate(zip(offsets[1:], lengths, strict=True)):
        ids[user, :length], seconds[user, :length] = (
            items[end - length : end],
            times[end - length : end],
        )
    queries = program(*map(torch.from_numpy, (ids, lengths, seconds, at)))
    scores = queries.detach().double().numpy() @ units.T
    scores[np.repeat(users, np.diff(offsets)), items] = -np.inf
    return {user: [own[row] for row in np.argsort(-scores[user])[:10]] for user in users}


def changed(folder: Path, **values) -> None:
    """Writes config.json anew with other values."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refreshed(folder: Path) -> None:
    """Makes sizes and hashes of config.json fit the files as they are now: a forger would."""
    changed(folder, files={name: digest_of(folder / name) for name in bundle.READ})
