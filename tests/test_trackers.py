"""W&B and MLflow behind one protocol, against small stand-ins of their interfaces."""

import importlib.machinery
import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from hstu_rec import trackers
from hstu_rec.config import RunConfig, load
from hstu_rec.hosts import RankError
from hstu_rec.trackers import TrackingConfig
from hstu_rec.tracking import Tracker, read_metrics
from tests.shared_models import train_run, write_data


class WandbRun:
    """What wandb.init returns, as far as it is used; every call is kept."""

    def __init__(self, calls, **given):
        self.calls, self.given, self.logged, self.summary = calls, given, [], {}
        self.id = given["id"] or f"run{len(calls)}"
        self.failing = False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, data):
        if self.failing:
            raise ConnectionError("no route")
        self.logged.append(data)

    def finish(self, exit_code):
        self.exit_code = exit_code


class MlflowClient:
    """mlflow.MlflowClient: experiments by name, runs by id."""

    experiments: dict[str, str]
    runs: dict[str, SimpleNamespace]

    def get_experiment_by_name(self, name):
        found = self.experiments.get(name)
        return found and SimpleNamespace(experiment_id=found)

    def create_experiment(self, name):
        self.experiments[name] = f"e{len(self.experiments)}"
        return self.experiments[name]

    def create_run(self, experiment_id, run_name):
        run_id = f"r{len(self.runs)}"
        run = SimpleNamespace(name=run_name, experiment=experiment_id, params={}, metrics=[])
        self.runs[run_id] = run
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id, status):
        self.runs[run_id].status = status

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100 and all(len(one.value) <= 500 for one in params)
        assert not any("@" in one.key for one in metrics)
        self.runs[run_id].params |= {one.key: one.value for one in params}
        self.runs[run_id].metrics += [(one.key, one.value, one.step) for one in metrics]

    def set_terminated(self, run_id, status):
        self.runs[run_id].status = status


def module(name, **members):
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(members)
    return made


@pytest.fixture
def wandb_runs(monkeypatch):
    runs = []

    def init(**given):
        runs.append(WandbRun(runs, **given))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=init))
    return runs


@pytest.fixture
def mlflow_runs(monkeypatch):
    MlflowClient.experiments, MlflowClient.runs = {}, {}
    entities = module(
        "mlflow.entities",
        Metric=lambda key, value, timestamp, step: SimpleNamespace(
            key=key, value=value, timestamp=timestamp, step=step
        ),
        Param=lambda key, value: SimpleNamespace(key=key, value=value),
    )
    mlflow = module("mlflow", MlflowClient=MlflowClient, entities=entities)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return MlflowClient.runs


def track(folder, to, steps, settings=None, error=None):
    with Tracker(folder, is_main=True, config=TrackingConfig(to=to, project="mine")) as tracker:
        tracker.begin("a run", settings or {"optim.lr": 1e-3, "eval.ks": [1, 5]})
        for step in steps:
            tracker.log("train", step, {"loss": 9.0 - step})
        tracker.log("valid", steps[-1], {"seen_masked/recall@10": 0.5})
        tracker.summarise({"test/seen_masked/recall@10": 0.25})
        if error:
            raise error


def test_wandb_is_told_settings_figures_by_step_and_the_end(tmp_path, wandb_runs):
    track(tmp_path, ["wandb"], [0, 1])
    (run,) = wandb_runs
    assert run.given["project"] == "mine" and run.given["name"] == "a run"
    assert run.given["config"] == {"optim.lr": 1e-3, "eval.ks": [1, 5]}
    assert run.given["dir"] == str(tmp_path) and run.given["id"] is None
    assert run.logged == [
        {"step": 0, "train/loss": 9.0},
        {"step": 1, "train/loss": 8.0},
        {"step": 1, "valid/seen_masked/recall@10": 0.5},
    ]
    assert run.summary == {"test/seen_masked/recall@10": 0.25} and run.exit_code == 0
    assert not (tmp_path / "tensorboard").exists()


def test_mlflow_is_told_the_same_by_names_that_it_takes(tmp_path, mlflow_runs):
    settings = {f"key.{number}": "x" * 600 for number in range(150)}
    track(tmp_path, ["mlflow", "tensorboard"], [0, 1], settings)
    (run,) = mlflow_runs.values()
    assert run.name == "a run" and run.experiment == MlflowClient.experiments["mine"]
    assert run.params.keys() == settings.keys()
    assert run.metrics == [
        ("train/loss", 9.0, 0),
        ("train/loss", 8.0, 1),
        ("valid/seen_masked/recall_at_10", 0.5, 1),
        ("test/seen_masked/recall_at_10", 0.25, 1),
    ]
    assert run.status == "FINISHED" and (tmp_path / "tensorboard").exists()


def test_a_run_that_goes_on_is_the_same_one_in_the_services(tmp_path, wandb_runs, mlflow_runs):
    both = ["wandb", "mlflow"]
    with pytest.raises(KeyError):
        track(tmp_path, both, [0, 1, 2], error=KeyError("stopped"))
    assert wandb_runs[0].exit_code == 1 and mlflow_runs["r0"].status == "FAILED"
    track(tmp_path, both, [1, 2, 3])
    assert [run.given["id"] for run in wandb_runs] == [None, wandb_runs[0].id]
    assert wandb_runs[1].given["resume"] == "allow" and wandb_runs[1].logged[0]["step"] == 1
    assert [*mlflow_runs] == ["r0"] and mlflow_runs["r0"].status == "FINISHED"
    assert json.loads((tmp_path / "trackers.json").read_text())["mlflow"] == "r0"


def test_a_service_that_fails_is_told_once_and_the_run_goes_on(tmp_path, wandb_runs):
    settings = TrackingConfig(to=["wandb"])
    told = pytest.warns(UserWarning, match=r"wandb failed: ConnectionError: no route; it gets no")
    with told as warned, Tracker(tmp_path, is_main=True, config=settings) as tracker:
        tracker.begin("a run", {})
        wandb_runs[0].failing = True
        for step in range(5):
            tracker.log("train", step, {"loss": 1.0})
            time.sleep(0.01)
    assert len([one for one in warned if "wandb" in str(one.message)]) == 1
    assert len(read_metrics(tmp_path)) == 5 and not wandb_runs[0].logged


def test_a_service_that_hangs_holds_up_neither_steps_nor_the_end(tmp_path, wandb_runs, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_WITHIN_S", 0.2)
    monkeypatch.setattr(WandbRun, "log", lambda self, data: time.sleep(3))
    began = time.monotonic()
    with pytest.warns(UserWarning, match="wandb has not taken everything"):
        track(tmp_path, ["wandb"], range(50))
    assert time.monotonic() - began < 2 and len(read_metrics(tmp_path)) == 51


def test_a_service_that_cannot_begin_is_a_sentence(tmp_path, wandb_runs, monkeypatch):
    def refuse(**given):
        raise PermissionError("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ValueError, match=r"wandb cannot begin: PermissionError: api_key not con"):
        track(tmp_path, ["wandb"], [0])


def test_only_the_main_process_begins_a_run(tmp_path, wandb_runs):
    with Tracker(tmp_path, is_main=False, config=TrackingConfig(to=["wandb"])) as tracker:
        tracker.begin("a run", {})
        tracker.log("train", 0, {"loss": 1.0})
    assert not wandb_runs


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("to=[wanb]", r"tracking.to must hold any of tensorboard, wandb, mlflow; got wanb"),
        ("to=[wandb,wandb]", "names one twice"),
        ("project=", "tracking.project must not be empty"),
    ],
)
def test_wrong_settings_are_told(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(RunConfig, [f"tracking.{setting}"])


def test_a_missing_package_ends_a_run_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(RankError, match=r"tracking.to names wandb, which is not installed; pip in"):
        train_run(tmp_path / "data", tmp_path / "run", "tracking.to=[wandb]")
    assert not (tmp_path / "run").exists()


def test_a_training_run_is_told_with_its_test_figures(tmp_path, wandb_runs):
    write_data(tmp_path / "data", num_users=60, num_items=30)
    few = ["tracking.to=[wandb]", "train.max_epochs=1", "train.log_every_steps=1"]
    train_run(tmp_path / "data", tmp_path / "run", *few)
    (run,) = wandb_runs
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert run.given["name"] == "run" and run.given["config"]["encoder.dim"] == 8
    recall = result["test"]["seen_masked"]["recall@10"]
    assert run.summary["test/seen_masked/recall@10"] == recall
    assert any("train/loss" in one for one in run.logged) and run.exit_code == 0
