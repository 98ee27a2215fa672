"""The counted operations are those of the formulas, and those that torch counts of the dense part."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hstu_rec import trainer
from hstu_rec.config import RunConfig, load
from hstu_rec.encoder import EncoderConfig, HSTUEncoder
from hstu_rec.flops import encoder_flops, loss_flops
from hstu_rec.learner import Learner
from hstu_rec.loss import LossConfig
from tests.datasets import write_dataset

LENGTHS = [1, 7, 4]
CONFIGS = {
    "hstu": {},
    "sasrec": {"attention": "softmax", "use_gate": False, "ffn_dim": 24},
    "wide heads": {"attention_dim": 3, "value_dim": 10, "ffn_dim": 8},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("window", [0, 3])
def test_an_encoder_has_the_products_of_its_formulas(options, window):
    config = EncoderConfig(dim=16, num_layers=2, num_heads=2, window=window, **options)
    encoder = HSTUEncoder(config)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    with FlopCounterMode(display=False) as counter:
        encoder(torch.randn(sum(LENGTHS), 16), offsets, torch.arange(sum(LENGTHS)))
    counts = counter.get_flop_counts()["Global"]
    dense = sum(n for name, n in counts.items() if "bmm" not in str(name))
    width = (config.attention_dim or 8) + (config.value_dim or 8)
    pairs = sum(min(i + 1, window or 99) for length in LENGTHS for i in range(length))
    expected = 3 * dense + 2 * 3.5 * 2 * 2 * width * pairs
    assert dense > 0 and encoder_flops(config, np.array(LENGTHS)).sum() == pytest.approx(expected)


def test_a_loss_has_three_products_of_positions_and_candidates():
    for negatives, count in (("all", 1000), ("uniform", 64), ("in_batch", 0)):
        config = LossConfig(negatives=negatives, num_negatives=64)
        assert loss_flops(config, 8, np.array([10, 0]), 1000).tolist() == [
            3 * 2 * 8 * 10 * count,
            0,
        ]


def test_what_the_device_reaches_is_measured_before_the_first_step(tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path / "data", [[0, 1, 2, 3]] * 4, num_items=4)
    told = []
    step = Learner.step
    monkeypatch.setattr(trainer.NextItemRun, "begin", lambda run: told.append("measured"))
    monkeypatch.setattr(Learner, "step", lambda *given: told.append("step") or step(*given))
    settings = [f"data.path={dataset.path}", f"train.run_dir={tmp_path}/run", "train.max_epochs=1"]
    trainer.train(load(RunConfig, [*settings, "encoder.dim=8", "train.device=cpu"]))
    assert told[:2] == ["measured", "step"] and told.count("measured") == 1
