"""Inputs of steps are functions of their places, wherever and whenever they are made."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from hstu_rec import distributed
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.learner import Learner
from hstu_rec.pipeline import Place
from tests.datasets import write_dataset

NUM_ITEMS = 20
# As training goes, over the end of an epoch, and then elsewhere, as after a resumption.
PLACES = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 1), (0, 2)]


def learner_of(path, is_threaded):
    config = load(RunConfig, [f"data.path={path}", "encoder.dim=8", "data.batch_users=9"])
    learner = Learner(config, Dataset(path), torch.device("cpu"))
    if is_threaded:
        learner.inputs._thread = ThreadPoolExecutor(1)  # as on CUDA
    return learner


def losses(path, is_threaded):
    with distributed.process_group("cpu"):
        learner = learner_of(path, is_threaded)
        assert learner.stream.num_steps(0) == 3
        found = [learner.step(*place, step).loss for step, place in enumerate(PLACES)]
        assert len(learner.inputs._made) <= 2
        return found


@pytest.fixture
def path(tmp_path):
    random = np.random.default_rng(1)
    sequences = [random.integers(0, NUM_ITEMS, n).tolist() for n in random.integers(4, 12, 26)]
    write_dataset(tmp_path / "data", sequences, num_items=NUM_ITEMS)
    return tmp_path / "data"


@pytest.mark.fault("R25")
def test_a_thread_makes_the_same_inputs(path):
    plain = losses(path, is_threaded=False)
    assert losses(path, is_threaded=True) == plain
    assert len(set(plain)) == len(plain)


def test_what_a_thread_raises_ends_the_step_that_needs_it(path, monkeypatch):
    def fail(*_):
        raise ValueError("a damaged batch")

    with distributed.process_group("cpu"):
        learner = learner_of(path, is_threaded=True)
        learner.step(0, 0, 0)
        monkeypatch.setattr(learner.stream, "batch", fail)
        learner.inputs.make_ahead(Place(0, 2, 2))
        with pytest.raises(ValueError, match="a damaged batch"):
            learner.step(0, 1, 1)
