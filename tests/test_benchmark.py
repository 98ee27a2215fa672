"""The timed runs train as train does."""

import re

import numpy as np
import pytest
import torch

from hstu_rec import distributed
from hstu_rec.benchmark import figures_by_epoch
from hstu_rec.config import RunConfig, load
from hstu_rec.trainer import train
from tests.datasets import write_dataset


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A small run with all that a step depends on: dropout, a decaying rate, rows of co-occurrence."""
    random = np.random.default_rng(3)
    sequences = [random.integers(0, 25, n).tolist() for n in random.integers(3, 15, 40)]
    path = tmp_path_factory.mktemp("curve") / "data"
    write_dataset(path, sequences, num_items=25)
    small = ["encoder.dim=8", "encoder.dropout=0.3", "data.batch_users=9", "optim.lr=0.01"]
    rest = ["optim.warmup_steps=7", "loss.use_seen_bias=true", "table.init=co_occurrence"]
    return [f"data.path={path}", *small, *rest, "train.device=cpu"]


def test_the_curve_has_the_test_figures_of_runs_of_that_many_epochs(settings, tmp_path):
    with distributed.process_group("cpu") as device:
        lines = list(figures_by_epoch(load(RunConfig, [*settings, "train.max_epochs=3"]), device))
    assert len(lines) == 3
    for epochs in (1, 3):
        once = [f"train.max_epochs={epochs}", f"train.eval_every_epochs={epochs}"]
        folder = f"train.run_dir={tmp_path / str(epochs)}"
        test = train(load(RunConfig, [*settings, *once, folder]))["test"]
        expected = [
            f"{test[part][name]:.4f}"
            for part in ("seen_allowed", "seen_masked")
            for name in ("recall@10", "ndcg@10")
        ]
        assert re.findall(r"\d\.\d{4}", lines[epochs - 1]) == expected
    seconds = [float(line.split()[2]) for line in lines]
    assert seconds == sorted(seconds)


def test_a_curve_needs_the_cut_off_that_it_shows(settings):
    config = load(RunConfig, [*settings, "eval.ks=[1,5]", "train.select=seen_masked/ndcg@5"])
    with pytest.raises(ValueError, match=r"eval.ks must hold 10, which is shown; got \[1, 5\]"):
        next(figures_by_epoch(config, torch.device("cpu")))
