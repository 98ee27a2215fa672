"""What differs between the processes of a run is told by all of them, when it starts."""

import json
import os
import shutil
from pathlib import Path

import pytest

from hstu_rec import distributed, hosts
from hstu_rec.config import RunConfig, load
from hstu_rec.trainer import train
from tests.datasets import write_dataset
from tests.ranks import run_ranks

SETTINGS = [
    *("data.path=data", "train.run_dir=run", "train.device=cpu", "train.max_epochs=1"),
    *("data.batch_users=4", "encoder.dim=8", "loss.num_negatives=4"),
]


def refusals(root: Path) -> list[str]:
    """What train says on this rank, in the folder of its own `root/<rank>`: nothing shared; then the other
    host with another seed, with other data, and with none."""
    hosts.SHOWN_WITHIN_S = 0.3
    os.chdir(root / str(distributed.rank()))
    is_other = distributed.rank() == 1
    told = [refusal()]
    told.append(refusal(f"train.seed={5 if is_other else 4}"))
    if is_other:
        stats = json.loads(Path("data/stats.json").read_text()) | {"first_timestamp": 8}
        Path("data/stats.json").write_text(json.dumps(stats))
    told.append(refusal())
    if is_other:
        shutil.rmtree("data")
    told.append(refusal())
    return told


def refusal(*settings: str) -> str:
    with pytest.raises(ValueError) as raised:
        train(load(RunConfig, [*SETTINGS, *settings]))
    return str(raised.value)


def test_hosts_that_differ_are_refused_on_all_ranks_in_the_same_sentence(tmp_path):
    for host in ("0", "1"):
        path = tmp_path / host / "data"
        write_dataset(path, [[1, 2, 3, 4, 5]] * 8, num_items=9)
        stats = json.loads((path / "stats.json").read_text())
        # The time that preparing took may differ.
        (path / "stats.json").write_text(
            json.dumps(stats | {"prepare_s": float(host), "first_timestamp": 7})
        )
    first, second = run_ranks(2, refusals, tmp_path)
    assert first == second
    not_shared, other_seed, other_data, no_data = first
    assert not_shared.startswith("train.run_dir run is not the folder of that name on ")
    assert not_shared.endswith("give one on a file system that all hosts share")
    assert "train.seed 4 and 5; give every process the same" in other_seed
    assert other_data.startswith("the data in data.path data differ between process 0 on ")
    assert "first_timestamp 7 and 8; copy the folder of one host to the others" in other_data
    assert no_data.startswith("data.path: data is no prepared dataset (items.parquet, counts.arrow")
    # Nothing of a refused run is left.
    assert [sorted(path.name for path in (tmp_path / "0").glob("run/*"))] == [[]]
    assert not (tmp_path / "1/run").exists()


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        ([("no disk", "a"), ("no disk", "b")], "no disk"),
        ([(None, "a"), ("no disk", "b"), ("no disk", "b")], "on b: no disk"),
        ([("no disk", "a"), ("no data", "b")], "on a: no disk; on b: no data"),
        ([("no disk", "a"), (None, "a")], "no disk"),
    ],
)
def test_hosts_are_named_where_they_differ(sentences, expected):
    assert hosts._told(sentences) == expected
