"""The timed runs train as train does."""

import re

import numpy as np
import pytest
import torch

from hstu_rec import distributed
from hstu_rec.benchmarks import guarding, ranking, saving
from hstu_rec.benchmarks.attention import AttentionTimes, attention_times
from hstu_rec.benchmarks.attention_forms import FORMS, Batch, Shape, padded
from hstu_rec.benchmarks.attention_tuning import OptionTimes, option_times
from hstu_rec.benchmarks.encoder import EncoderTimes, encoder_of, encoder_times, training_work
from hstu_rec.benchmarks.guarding import Unguarded, guard_times
from hstu_rec.benchmarks.loss import LossTimes, loss_times, own_loss, plain_loss
from hstu_rec.benchmarks.ranking import RankingTimes, ranking_times
from hstu_rec.benchmarks.saving import saving_times
from hstu_rec.benchmarks.steps import PaddedStream, compare_steps, figures_by_epoch, hold_scores
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.learner import Learner
from hstu_rec.ops import jagged_attention_reference
from hstu_rec.ranking import rank_targets
from hstu_rec.trainer import train
from tests.datasets import write_dataset

CPU = torch.device("cpu")


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


def test_a_padded_step_that_holds_scores_is_the_same_step(settings):
    config = load(RunConfig, [*settings, "encoder.use_time_bias=true"])
    with distributed.process_group("cpu") as device:
        losses = []
        for is_held in (False, True):
            learner = Learner(config, Dataset(config.data.path), device, PaddedStream)
            if is_held:
                learner.encoder.layout = hold_scores
            learner.begin()
            losses.append([learner.step(0, at, at).loss for at in range(3)])
        names = [line[:12].strip() for line in compare_steps(config, device)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert names == ["jagged", "padded", "padded, held"]


def test_attention_is_timed_by_shape_and_form_on_cpu_as_well():
    config = load(
        AttentionTimes, ["shapes=[2x8-uniform-20,1x4-power-64]", "num_events=200", "repeats=2"]
    )
    head, *lines = attention_times(config, torch.device("cpu"))
    assert head.startswith("torch.float32; forward")
    size = 1 + len(FORMS)
    assert len(lines) == 2 * size
    for index, name in enumerate(["2x8-uniform-20", "1x4-power-64"]):
        shape, *forms = lines[index * size : (index + 1) * size]
        lengths = Shape.of(name).lengths(200)
        assert shape == f"{name}: {len(lengths)} users, {lengths.sum()} events"
        assert 100 < lengths.sum() <= 200 and lengths.max() <= Shape.of(name).longest
        for form, line in zip(FORMS, forms, strict=True):
            assert line.startswith(f"  {form} ")
            if form.startswith("compiled") or form in ("varlen", "peer"):
                assert " none: " in line
                continue
            forward, both = re.findall(r"([\d.]+) / +([\d.]+) ms", line)[0]
            assert float(forward) > 0 and float(both) > 0 and float(line.split()[-1]) > 0
        assert forms[0].endswith("x 1.00")


def test_the_padded_forms_are_the_attention_of_the_reference():
    lengths = torch.tensor([7, 7, 7])
    batch = Batch(Shape(2, 3, "full", 7), lengths, torch.float64, torch.device("cpu"))
    attend, (q, k, v, position, time) = padded(batch, has_bias=True, is_compiled=False)
    times = attend.args[3]
    rows = (x.detach().flatten(0, 1) for x in (q, k, v))
    expected = jagged_attention_reference(
        *rows,
        batch.offsets,
        kind="silu",
        scale=1 / 7,
        position_bias=position.detach(),
        time_bias=time.detach(),
        timestamps=times.flatten(),
    )
    torch.testing.assert_close(attend().detach().flatten(0, 1), expected)


def test_a_form_of_another_name_is_refused():
    with pytest.raises(
        ValueError, match=r"forms must be of jagged, jagged\+bias, .*; got \['fast'\]"
    ):
        load(AttentionTimes, ["forms=[fast]"])


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("forms=[]", "forms must be distinct, one at least"),
        ("shapes=[1x8-full-9,1x8-full-9]", "shapes must be distinct"),
        ("shapes=[1x8-full-0]", "shapes must be like 4x128-uniform-1024"),
    ],
)
def test_bad_settings_of_attention_are_refused(setting, problem):
    with pytest.raises(ValueError, match=problem):
        load(AttentionTimes, [setting])


def test_a_peer_that_is_not_timed_is_refused():
    with pytest.raises(ValueError, match="peer has no effect"):
        load(AttentionTimes, ["forms=[jagged]", "peer=somewhere"])


def test_compile_options_are_timed_on_cuda_alone():
    with pytest.raises(ValueError, match="timed on CUDA"):
        list(option_times(load(OptionTimes, ["shapes=[1x16-full-9]"]), CPU))
    with pytest.raises(ValueError, match="shapes must be like 4x128-uniform-1024"):
        load(OptionTimes, ["shapes=[4]"])


@pytest.mark.parametrize("shape", ["4x128", "4x128-wide-5", "0x8-full-9", "axb-full-9"])
def test_a_shape_of_another_form_is_refused(shape):
    with pytest.raises(ValueError, match=rf"like 4x128-uniform-1024 \(or .*\); got '{shape}'"):
        load(AttentionTimes, [f"shapes=[{shape}]"])


def test_the_encoder_is_timed_on_cpu_as_well():
    options = ["shapes=[2x4-full-6]", "num_layers=[1]", "num_events=[30]", "precision=float32"]
    head, shape, *lines = encoder_times(load(EncoderTimes, [*options, "repeats=2"]), CPU)
    assert head.startswith("float32; forward + backward")
    assert shape == "2x4-full-6, 1 layers: 4 users, 24 events"
    assert [line.split()[0] for line in lines] == ["jagged", "jagged+bias", "padded+bias"]
    assert lines[0].endswith("x 1.00") and all(float(line.split()[1]) > 0 for line in lines)


def test_the_padded_encoder_is_the_same_function():
    encoder = encoder_of(Shape.of("2x4-full-6"), 2, "jagged+bias", 0.0)
    lengths = torch.full((5,), 6)
    forms = ("jagged+bias", "padded+bias")
    found = [training_work(encoder, lengths, form, torch.float32, CPU)() for form in forms]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("num_layers=[2]", "num_layers must be above 0, one for each of shapes"),
        ("num_events=[0,5]", "num_events must be above 0"),
        ("forms=[fast]", "forms must be of jagged"),
        ("shapes=[4,5]", "shapes must be like 4x128-uniform-1024; got '4'"),
        ("repeats=0", "repeats must be at least 1; got 0"),
    ],
)
def test_bad_settings_of_the_encoder_are_refused(setting, problem):
    with pytest.raises(ValueError, match=problem):
        load(EncoderTimes, [setting])


def test_the_loss_is_timed_on_cpu_as_well():
    config = load(LossTimes, ["cases=[30x8-50,9x4-1]", "repeats=2"])
    head, *lines = loss_times(config, torch.device("cpu"))
    assert head.startswith("float32; forward + backward")
    assert [line.split()[0] for line in lines] == [
        "30x8-50",
        "own",
        "plain",
        "9x4-1",
        "own",
        "plain",
    ]
    assert lines[1].endswith("x 1.00") and float(lines[2].split()[1]) > 0


def test_both_forms_of_the_loss_are_the_same_function():
    torch.manual_seed(2)
    leaves = [torch.randn(n, 8, requires_grad=True) for n in (30, 30, 50)]
    ids = torch.randint(0, 50, (30,))
    found = [form(*leaves, ids) for form in (own_loss, plain_loss)]
    torch.testing.assert_close(*found)
    grads = [torch.autograd.grad(loss, leaves) for loss in found]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("cases=[30-4]", "cases must be like 16384x128-2048; got '30-4'"),
        ("precision=half", "one of float32, tf32, bfloat16"),
        ("repeats=0", "repeats must be at least 1; got 0"),
    ],
)
def test_bad_settings_of_the_loss_are_refused(setting, problem):
    with pytest.raises(ValueError, match=problem):
        load(LossTimes, [setting])


@pytest.mark.parametrize("sizes", [(40, 500, 8), (3, 7, 5)])
def test_timed_ranks_are_checked(sizes):
    num_queries, num_items, dim = sizes
    config = RankingTimes(
        num_queries=num_queries, num_items=num_items, dim=dim, num_seen=5, repeats=1
    )
    (line,) = ranking_times(config, CPU)
    assert line.startswith(f"{num_queries} queries, {num_items} items x {dim}, 5 seen a query: ")
    assert line.endswith(f"; {min(num_queries, 16)} queries equal float64")


def test_a_wrong_rank_is_not_timed(monkeypatch):
    def too_low(queries, shard, chunk):
        allowed, masked = rank_targets(queries, shard, chunk)
        return allowed, masked - 1

    monkeypatch.setattr(ranking, "rank_targets", too_low)
    config = RankingTimes(num_queries=20, num_items=50, dim=4, num_seen=3, repeats=1)
    with pytest.raises(ArithmeticError, match="16 ranks differ from those counted in float64"):
        list(ranking_times(config, CPU))


def test_steps_without_guards_train_the_same_and_are_timed_in_turn(settings, monkeypatch):
    config = load(RunConfig, [*settings, "data.batch_users=4"])
    losses = []
    with distributed.process_group("cpu") as device:
        for is_guarded in (True, False):
            learner = Learner(config, Dataset(config.data.path), device)
            if not is_guarded:
                learner.guard = Unguarded(config.guard, learner.dense)
            learner.begin()
            losses.append([learner.step(0, at, at).loss for at in range(4)])
        with pytest.raises(ValueError, match="and 410 are timed; give more users"):
            next(guard_times(config, device))
        monkeypatch.setattr(guarding, "NUM_WARM_UP", 1)
        monkeypatch.setattr(guarding, "NUM_TIMED", 2)
        names = [line.split()[0] for line in guard_times(config, device)]
    assert losses[0] == losses[1] and names == ["wall", "CPU"]


def test_blocks_with_a_checkpoint_and_without_are_timed_in_turn(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saving, "NUM_BLOCKS", 4)
    config = load(RunConfig, [*settings, "data.batch_users=4", "checkpoint.every_steps=1"])
    with distributed.process_group("cpu") as device:
        lines = list(saving_times(config, device))
        with pytest.raises(ValueError, match="steps and 250 are timed"):
            config = load(RunConfig, [*settings, "checkpoint.every_steps=50"])
            next(saving_times(config, device))
    assert [line.split()[0] for line in lines] == ["without", "with", "slower", "memory"]
    assert all(len(re.findall(r"\d\.\d\d\b", line.split("(")[1])) == 2 for line in lines[:2])
    assert list(tmp_path.iterdir()) == []
