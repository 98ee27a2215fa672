"""Configurations that are no configuration: nothing is executed, no process ends, a sentence tells."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from hstu_rec.benchmarks.attention import AttentionTimes
from hstu_rec.benchmarks.encoder import EncoderTimes
from hstu_rec.benchmarks.loss import LossTimes
from hstu_rec.benchmarks.ranking import RankingTimes
from hstu_rec.config import RunConfig, load
from hstu_rec.data.intensity import CountingConfig, DirichletConfig
from hstu_rec.data.prepare import PrepareConfig
from hstu_rec.data.synthetic import SyntheticConfig
from hstu_rec.planning import PlannedRun
from hstu_rec.quality import QualitySettings
from tests.event_files import ROOT
from tests.faults.tries import Tries

pytestmark = pytest.mark.fault("R28")

SCHEMAS = (
    *(PlannedRun, PrepareConfig, SyntheticConfig, DirichletConfig, CountingConfig),
    *(QualitySettings, AttentionTimes, EncoderTimes, LossTimes, RankingTimes),
)


def told(schema: type, *arguments: str) -> str:
    """The sentences with which the arguments are refused."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(schema, arguments)
    return str(caught.value)


def written(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    "content",
    [
        'train:\n  seed: !!python/object/apply:os.system ["touch CANARY"]\n',
        '!!python/object/new:os.system ["touch CANARY"]\n',
        '!!python/object/apply:subprocess.check_call [["touch", "CANARY"]]\n',
        "name: !!python/name:os.system\n",
        "name: !!python/module:antigravity\n",
        '? !!python/object/apply:os.system ["touch CANARY"]\n: 1\n',
    ],
)
def test_python_objects_are_never_made(tmp_path: Path, content: str) -> None:
    canary = tmp_path / "canary"
    content = content.replace("CANARY", str(canary))
    path = written(tmp_path / "a.yaml", content)
    assert f"{path}: " in told(RunConfig, path)
    value = content.split(": ", 1)[-1].strip()
    assert "eval.ks=" in told(RunConfig, f"eval.ks={value}")
    # A folder is text.
    assert load(RunConfig, [f"train.run_dir={value}"]).train.run_dir == value
    assert not canary.exists()


def test_references_reach_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "a-password")
    path = tmp_path / "a.yaml"
    for content in (
        "name: ${oc.env:SECRET}",
        "train: ${oc.env:SECRET}",
        "eval: {ks: ['${oc.env:SECRET}']}",
        "${oc.env:SECRET}: 1",
        "base: ${oc.env:SECRET}",
        "name: ${data.path}",
        "name: ${",
        "name: ???",
        "eval: {ks: [???]}",
    ):
        sentence = told(RunConfig, written(path, content))
        assert f"{path}: " in sentence and "a-password" not in sentence
    sentence = told(RunConfig, "name=${oc.env:SECRET}", "train.seed=???")
    assert sentence.count("must be a plain value") == 2 and "a-password" not in sentence


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda: BOMB, "expansion exceeds"),
        (lambda: "train: &x\n  seed: *x\n", "recursive aliases"),
        (lambda: "a: " + "[" * 100_000, "nested deeper than 32 levels"),
        (lambda: "{a: " * 5000 + "1" + "}" * 5000, "nested deeper than 32 levels"),
        (lambda: "# a comment\n" * 200_000, "larger than 1 MiB"),
        (lambda: "".join(f"key{n}: 1\n" for n in range(3000)), "and 2980 more"),
        (lambda: "train:\n  seed: 1\n  seed: 2\n", "duplicate key seed"),
        (lambda: "train:\n  seed: 1\nname: a\ntrain:\n  patience: 2\n", "duplicate key train"),
        (lambda: "train:\n\tseed: 1\n", "indented by spaces"),
        (lambda: "name: a\n---\nname: b\n", "single document"),
        (lambda: "name: caf\xe9\n".encode("latin-1"), "it is not UTF-8 text"),
        (lambda: "name: cafe\n".encode("utf-16"), "it is not UTF-8 text"),
        (lambda: b"name: a\0b\n", "not allowed"),
        (lambda: os.urandom(2000), "a.yaml: "),
        (lambda: "null: 2\n", "a.yaml: "),
        (lambda: "1: 2\n", "unknown key '1'"),
        (lambda: "[1, 2]: 2\n", "a.yaml: "),
        (lambda: "text alone\n", "unknown key 'text alone'"),
        (lambda: "base: [a]\n", "does not exist"),
        (lambda: "base: .\n", "does not exist"),
        (lambda: "optm: {lr: 1}\n", "did you mean 'optim.lr'?"),
        (lambda: "optim: {lr: fast}\n", "optim.lr must be a number; got fast"),
        (lambda: "optim: [1]\n", "'optim' is a section"),
    ],
    ids=range(23),
)
def test_a_file_that_is_no_configuration_is_named(
    tmp_path: Path, content: Callable[[], str | bytes], sentence: str
) -> None:
    path = written(tmp_path / "a.yaml", content())
    found = told(RunConfig, path)
    assert f"{path}: " in found and sentence in found and len(found) < 10_000


def test_places_that_hold_no_file_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")  # reading it would wait for ever
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for place in (tmp_path, tmp_path / "fifo.yaml", tmp_path / "loop.yaml", tmp_path / "nothing"):
        assert f"'{place}' is neither a key=value setting nor a YAML file" in told(
            RunConfig, str(place)
        )
    for argument in ("x" * 100_000, "a\0b"):
        assert "is neither a key=value setting" in told(RunConfig, argument)
    for argument in (
        "a." * 5000 + "b=1",
        "train.seed=" + "9" * 6000,
        "eval.ks=" + "[" * 5000,
        "a\0b=1",
    ):
        assert len(told(RunConfig, argument)) < 25_000


def leaves_of(section: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in fields(section):
        value = getattr(section, one.name)
        if is_dataclass(value):
            found |= leaves_of(value, f"{prefix}{one.name}.")
        else:
            found[prefix + one.name] = value
    return found


NUMBERS = {
    schema: [
        key
        for key, value in leaves_of(schema()).items()
        if type(value) in (int, float) or key in ("plan.popularity_power", "min_rating")
    ]
    for schema in SCHEMAS
}
WHOLE = {
    schema: [key for key in keys if type(leaves_of(schema())[key]) is int]
    for schema, keys in NUMBERS.items()
}


def refused_each(schema: type, keys: list[str], value: str) -> Iterator[tuple[str, str]]:
    """(key, what is told when it and some others are set to `value`)."""
    for begin in range(0, len(keys), 15):  # no more than are told at once
        some = keys[begin : begin + 15]
        sentences = told(schema, *(f"{key}={value}" for key in some))
        yield from ((key, sentences) for key in some)


def test_numbers_that_are_none_are_refused_for_every_setting(tries: Tries) -> None:
    assert sum(map(len, NUMBERS.values())) > 90
    for schema, keys in NUMBERS.items():
        for value in (".nan", ".inf", "-.inf", "[]", "true", "1e400", "a"):
            for key, sentences in refused_each(schema, keys, value):
                tries.count(f"'{key}={value}': {key} must be " in sentences)
        for value in ("", "1.5", str(2**63), str(-(2**63) - 1)):
            for key, sentences in refused_each(schema, WHOLE[schema], value):
                tries.count(f"'{key}={value}': {key} must be a whole number; got" in sentences)


def test_whole_numbers_may_be_written_as_one_likes(tries: Tries) -> None:
    def loaded(schema: type, value: str) -> Any:
        try:
            return load(schema, [f"{key}={value}" for key in WHOLE[schema]])
        except ValueError as error:  # what a hundred is too much for
            return str(error)

    for schema in SCHEMAS:
        wanted = loaded(schema, "100")
        for value in ("1e2", "100.0", "1.0e+2"):
            tries.count(loaded(schema, value) == wanted)
    assert load(PlannedRun, ["eval.ks=[1e1, 5]", "plan.num_items=1e6"]).eval.ks == [10, 5]


@pytest.mark.parametrize(
    ("schema", "settings", "sentence"),
    [
        (
            RunConfig,
            "loss.frequency_power=1",
            "loss.frequency_power has no effect with negatives 'uniform'",
        ),
        (RunConfig, "loss.negatives=all loss.exchange=queries", "loss.exchange has no effect"),
        (RunConfig, "loss.negatives=all loss.num_negatives=9", "loss.num_negatives has no effect"),
        (RunConfig, "loss.negatives=all loss.use_logq=true", "loss.use_logq has no effect"),
        (
            RunConfig,
            "loss.negatives=in_batch loss.num_negatives=9",
            "loss.num_negatives has no effect",
        ),
        (RunConfig, "table.init_norm=2", "table.init_norm has no effect with init 'normal'"),
        (RunConfig, "table.cache_load_factor=.1", "table.cache_load_factor has no effect"),
        (RunConfig, "data.length_choice=newest", "data.length_choice has no effect"),
        (RunConfig, "data.synthetic.seed=3", "data.synthetic.* has no effect"),
        (
            PrepareConfig,
            "valid_fraction=.2",
            "valid_fraction has no effect with split=leave_one_out",
        ),
        (PrepareConfig, "test_fraction=.2", "test_fraction has no effect"),
        (
            PrepareConfig,
            "split=time valid_time=5 test_time=6 valid_fraction=.2",
            "valid_fraction has no effect beside valid_time and test_time",
        ),
        (PrepareConfig, "rating_column=stars", "rating_column has no effect"),
    ],
)
def test_a_setting_without_effect_is_told(schema: type, settings: str, sentence: str) -> None:
    assert sentence in told(schema, *settings.split())


@pytest.mark.parametrize("kind", ["frequency", "mixed"])
def test_settings_with_an_effect_are_taken(kind: str) -> None:
    settings = [f"loss.negatives={kind}", "loss.frequency_power=1", "loss.exchange=queries"]
    assert load(RunConfig, [*settings, "loss.num_negatives=1e3"]).loss.num_negatives == 1000
    assert load(RunConfig, ["loss.negatives=in_batch", "loss.exchange=queries"])
    assert load(PrepareConfig, ["split=time", "valid_fraction=.2"]).valid_fraction == 0.2


def test_training_refuses_a_poisoned_file_in_one_sentence(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    content = f'name: !!python/object/apply:os.system ["touch {canary}"]\n'
    done = subprocess.run(
        [sys.executable, "apps/train.py", written(tmp_path / "a.yaml", content), "optim.lr=.nan"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == "" and not canary.exists()
    assert done.stderr.startswith("error: the configuration has problems:\n")
    assert "a.yaml: " in done.stderr and "optim.lr must be a number; got nan" in done.stderr
    assert "Traceback" not in done.stderr
