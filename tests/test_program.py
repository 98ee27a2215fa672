"""The exported program gives the encoder's queries, for any users and lengths, and refuses the rest."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch._inductor import aoti_load_package

from hstu_rec.bundle import Rows
from hstu_rec.data.histories import Histories
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.loss import LossConfig, SampledSoftmax
from hstu_rec.model import NextItemModel
from hstu_rec.program import exported_program, write_programs
from hstu_rec.quantised import Int8Rows
from hstu_rec.serving import _batch

PLAIN = EncoderConfig(dim=8, max_history_len=9)
CASES = {
    "hstu": PLAIN,
    "query time": replace(
        PLAIN,
        query_time="next",
        calendar="day",
        calendar_begin=1,
        calendar_end=10**7,
        use_position_embedding=True,
        is_bias_per_head=True,
        window=3,
    ),
    "sasrec": replace(PLAIN, attention="softmax", use_gate=False, ffn_dim=16, final_norm="layer"),
    "wide heads": replace(PLAIN, attention_dim=3, value_dim=5, norm="rms", use_time_bias=False),
    "one event": replace(PLAIN, max_history_len=1),
}


def model_of(config, rows, **settings):
    torch.manual_seed(5)
    model = NextItemModel(Rows(rows), HSTUEncoder(config), SampledSoftmax(LossConfig(**settings)))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)  # so that each of them counts
    return model.eval().requires_grad_(False)


def given(num_users, length):
    """Padded histories, the first of them full."""
    lengths = torch.randint(1, length + 1, (num_users,))
    lengths[0] = length
    ids = torch.randint(0, 100, (num_users, length))
    times = torch.randint(0, 10**7, (num_users, length)).sort(1).values
    return ids, lengths, times, torch.full((num_users,), 10**7 + 5)


def jagged_queries(model, ids, lengths, times, at):
    is_event = torch.arange(ids.shape[1]) < lengths[:, None]
    offsets = np.append(0, lengths.cumsum(0).numpy())
    users = pa.array(range(len(ids)))
    histories = Histories(users, ids[is_event].numpy(), times[is_event].numpy(), offsets)
    return model(_batch(histories, at.numpy(), offsets[:-1], offsets[1:]))[0]


@pytest.mark.parametrize("case", CASES)
def test_the_program_gives_the_encoders_queries_for_any_users_and_lengths(case):
    config, rows = CASES[case], torch.randn(100, 8)
    rows = Int8Rows.of(rows) if case == "query time" else rows
    model = model_of(config, rows, similarity="dot" if case == "sasrec" else "cosine")
    program = exported_program(model, rows).module()
    longest = config.max_history_len
    for shape in ((1, 1), (1, longest), (2, min(2, longest)), (40, longest)):
        inputs = given(*shape)
        expected = jagged_queries(model, *inputs)
        torch.testing.assert_close(program(*inputs), expected, atol=1e-5, rtol=1e-5)


def refused(program):
    """Which of bad inputs the program refuses."""
    good = {"ids": [[1, 2]], "lengths": [2]}
    bad = [{"lengths": [0]}, {"lengths": [3]}, {"ids": [[1, 100]]}, {"ids": [[1, -1]]}]
    bad += [{"ids": [[1] * 10]}]
    found = []
    for one in bad:
        ids, lengths = (torch.tensor((good | one)[name]) for name in ("ids", "lengths"))
        try:
            program(ids, lengths, 0 * ids, torch.tensor([9]))
            found.append(False)
        except (RuntimeError, IndexError, AssertionError):
            found.append(True)
    return found


def test_the_program_refuses_ids_lengths_and_histories_that_are_none():
    rows = torch.randn(100, 8)
    assert refused(exported_program(model_of(PLAIN, rows), rows).module()) == [True] * 5


ALONE = """
import sys
import torch

program = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2], weights_only=True)
torch.testing.assert_close(program(*inputs[:4]), inputs[4], atol=1e-5, rtol=1e-5)
assert "hstu_rec" not in sys.modules
print("done")
"""


def test_torch_alone_runs_the_file(tmp_path):
    rows = torch.randn(100, 8)
    model = model_of(CASES["query time"], rows)
    write_programs(model, rows, tmp_path / "program.pt2", None)
    inputs = given(7, 5)
    torch.save([*inputs, jagged_queries(model, *inputs)], tmp_path / "inputs")
    command = [sys.executable, "-c", ALONE, tmp_path / "program.pt2", tmp_path / "inputs"]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.slow
def test_the_compiled_program_gives_the_same_and_refuses_the_same(tmp_path):
    rows = torch.randn(100, 8)
    model = model_of(CASES["query time"], rows)
    write_programs(model, rows, tmp_path / "program.pt2", tmp_path / "program_cpu.pt2")
    program = aoti_load_package(str(tmp_path / "program_cpu.pt2"))
    for shape in ((1, 1), (1, 9), (40, 6)):
        inputs = given(*shape)
        expected = jagged_queries(model, *inputs)
        torch.testing.assert_close(program(*inputs), expected, atol=1e-5, rtol=1e-5)
    assert refused(program) == [True] * 5


def test_without_a_compiler_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    rows = torch.randn(100, 8)
    with pytest.raises(ValueError, match=r"compiled by g\+\+, and there is none; .*program=torch"):
        write_programs(model_of(PLAIN, rows), rows, tmp_path / "a.pt2", tmp_path / "b.pt2")
