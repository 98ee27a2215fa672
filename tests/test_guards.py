"""Guards of a step on whatever device there is; their faults on two ranks are in tests/faults."""

import json
import math
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch

from hstu_rec import distributed
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stream import open_dataset
from hstu_rec.guards import DivergenceAlarm, GuardConfig
from hstu_rec.learner import Learner
from tests.datasets import write_dataset
from tests.faults.not_finite import injected, trained

NUM_ITEMS = 300
HAS_CUDA = torch.cuda.is_available()
SETTINGS = {
    "rowwise_adagrad": [],
    "adagrad": ["table.optimizer=adagrad", "loss.use_seen_bias=true"],
    "sgd": ["table.optimizer=sgd", "loss.negatives=all"],
    "recomputed": ["train.recompute=true", "encoder.attention=softmax"],
}
ON_CUDA = {
    "graphs": ["train.cuda_graphs=true", "encoder.attention_kernel=triton"],
    "compiled": ["train.compile=true"],
    "bfloat16": ["train.precision=bfloat16"],
    "uvm": ["table.kernel=uvm"],
    "uvm_caching": ["table.kernel=uvm_caching"],
    "adam": ["table.optimizer=adam"],
}


def forget_gradients(learner):
    for one in learner.dense:
        one.grad = None


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """40 users of 3 to 16 events."""
    random = np.random.default_rng(5)
    items = [random.integers(0, NUM_ITEMS, n).tolist() for n in random.integers(3, 17, 40)]
    folder = tmp_path_factory.mktemp("guards") / "data"
    write_dataset(folder, items, num_items=NUM_ITEMS)
    return folder


@pytest.fixture(autouse=True)
def precision():
    """A learner sets that of the process."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def learner_of(path, settings, device):
    sizes = ["encoder.dim=32", "encoder.max_history_len=16", "data.batch_users=8"]
    if "loss.negatives=all" not in settings:
        sizes.append("loss.num_negatives=50")
    config = load(RunConfig, [f"data.path={path}", *sizes, *settings])
    return Learner(config, Dataset(path), device)


def copies(learner):
    return {name: value.detach().to("cpu", copy=True) for name, value in trained(learner).items()}


def assert_equal(learner, before):
    for name, value in copies(learner).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.fault("R13")
@pytest.mark.parametrize(
    "settings",
    [
        *(pytest.param(one, id=name) for name, one in SETTINGS.items()),
        *(
            pytest.param(one, id=name, marks=pytest.mark.skipif(not HAS_CUDA, reason="is for CUDA"))
            for name, one in ON_CUDA.items()
        ),
    ],
)
def test_steps_that_are_not_finite_change_nothing_on_this_device(path, settings):
    """A GPU's host tells of them when the next step is through, or at once at an epoch's end."""
    with distributed.process_group() as device:
        learner = learner_of(path, settings, device)
        learner.step(0, 0, 0)
        faults = [(where, value) for where in ("rows", "loss") for value in (math.nan, math.inf)]
        faults += [(index, math.nan) for index in range(len(learner.dense))]
        is_late = device.type == "cuda" and "table.optimizer=adam" not in settings
        for where, value in faults:
            before = copies(learner)
            with (
                injected(learner, where, value, 0),
                pytest.raises(FloatingPointError) as raised,
            ):
                learner.step(0, 1, 1)
                assert is_late and where != "loss"  # else it has raised
                assert_equal(learner, before)
                learner.step(0, 1, 2)
            assert "at step 1 (epoch 0, batch 1); nothing was changed by it" in str(raised.value)
            assert_equal(learner, before)
            learner.guard._unread.clear()
            forget_gradients(learner)  # where backward itself has raised
        last = learner.stream.num_steps(0) - 1
        with injected(learner, "rows", math.nan, 0), pytest.raises(FloatingPointError) as raised:
            learner.step(0, last, 3)
        assert "at step 3" in str(raised.value)
        forget_gradients(learner)
        loss = learner.step(1, 0, 4).loss
        assert math.isfinite(loss)
        assert any(not torch.equal(value, before[name]) for name, value in copies(learner).items())


@pytest.mark.skipif(not HAS_CUDA, reason="is for CUDA")
def test_the_guard_does_not_make_the_host_wait_for_a_gpu(path, monkeypatch):
    called = []

    def without_waiting(name, method, *arguments, **options):
        called.append(name)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return method(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    with distributed.process_group() as device:
        learner = learner_of(path, [], device)
        learner.step(0, 0, 0)
        names = ("begin", "weigh", "is_finite", "keep", "end")
        for name in names:
            method = getattr(learner.guard, name)
            monkeypatch.setattr(learner.guard, name, partial(without_waiting, name, method))
        losses = [learner.step(0, index, index).loss for index in range(1, 4)]
    assert set(called) == set(names) and all(map(math.isfinite, losses))


def alarm_after(losses, **options):
    """The number of losses up to an alarm, None if there was none; the alarm."""
    config, alarm = GuardConfig(**options), DivergenceAlarm()
    for step, loss in enumerate(losses):
        try:
            alarm.see(loss, step, config)
        except FloatingPointError as error:
            assert f"at step {step}," in str(error)
            return step + 1, alarm
    return None, alarm


NOISE = np.random.default_rng(2)
LEARNING = 4 + 4 * np.exp(-np.arange(400) / 50) + NOISE.normal(0, 0.5, 400)


@pytest.mark.fault("R14")
@pytest.mark.parametrize(
    "losses",
    [
        LEARNING,
        np.concatenate([LEARNING, 1 + LEARNING[50:]]),  # a step back
        np.concatenate([LEARNING, [1e9] * 40, LEARNING[100:] + 1]),  # a spike, however high
        np.concatenate([LEARNING, *[[100, 4, 5]] * 100]),  # spikes
        np.concatenate([LEARNING / 1e3, LEARNING / 10]),  # near 0, where ratios are large
        np.concatenate([[math.nan, math.inf], LEARNING]),  # steps that were skipped
        np.linspace(3, 3.001, 1000),  # learns nothing
    ],
    ids=["learning", "a step back", "a spike", "spikes", "near 0", "skipped", "nothing"],
)
def test_ordinary_losses_raise_no_alarm(losses):
    assert alarm_after(losses)[0] is None


@pytest.mark.fault("R14")
@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        (np.concatenate([LEARNING, [9.0] * 100]), 450),
        (np.concatenate([[5.0], np.full(100, 1e3)]), 51),  # from the first step on
        (np.concatenate([LEARNING, *[[1e4, 1e4, 4]] * 100]), 550),  # two of three
        (np.concatenate([LEARNING, np.linspace(4, 12, 200)]), 503),  # little by little
    ],
    ids=["at once", "first step", "two of three", "little by little"],
)
def test_losses_that_run_away_raise_an_alarm(losses, steps):
    assert alarm_after(losses)[0] == pytest.approx(steps, abs=12)
    assert alarm_after(losses, divergence_factor=0)[0] is None


def test_an_alarm_goes_on_from_its_plain_values():
    losses = np.concatenate([LEARNING, [9.0] * 100])
    whole = alarm_after(losses)[0]
    _, alarm = alarm_after(losses[:430])
    again = DivergenceAlarm(**json.loads(json.dumps(asdict(alarm), allow_nan=False)))
    assert again == alarm and alarm.num_bad == 30
    with pytest.raises(FloatingPointError):
        for step in range(430, whole):
            again.see(losses[step], step, GuardConfig())
    assert step == whole - 1


@pytest.mark.fault("R14")
@pytest.mark.parametrize("rates", [[], ["optim.lr=0.01", "table.lr=1"]], ids=["normal", "x 10"])
def test_training_on_the_demo_has_no_bad_losses(rates):
    options = ["configs/demo.yaml", "data.path=synthetic", "train.device=cpu", *rates]
    config = load(RunConfig, options)
    with distributed.process_group("cpu") as device:
        learner = Learner(config, open_dataset(config.data), device)
        learner.begin()
        for index in range(28):
            learner.step(0, index, index)
            assert learner.alarm.num_bad == 0
    assert learner.alarm.best < 8


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["guard.divergence_factor=0.5"], "guard.divergence_factor must be above 1, or 0"),
        (["guard.divergence_factor=nan"], "guard.divergence_factor must be a number; got nan"),
        (["guard.max_skipped_steps=0", "guard.on_nonfinite=skip"], "must be at least 1; got 0"),
        (["guard.max_skipped_steps=3"], "no effect with on_nonfinite 'raise'"),
        (
            ["guard.divergence_factor=0", "guard.divergence_steps=9"],
            "no effect with divergence_factor 0",
        ),
        (["guard.on_nonfinite=skip", "table.optimizer=adam"], "moves rows even by a gradient of 0"),
    ],
)
def test_settings_that_guard_nothing_are_refused(settings, sentence):
    with pytest.raises(ValueError) as raised:
        load(RunConfig, settings)
    assert sentence in str(raised.value)
