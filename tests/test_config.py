"""Configuration: YAML over typed dataclasses, overrides, and errors that tell everything at once."""

import io
import math
import re
import runpy
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_rec.config import (
    RunConfig,
    differences,
    help_text,
    leaves,
    load,
    run_app,
    save,
)
from hstu_rec.data.prepare import PrepareConfig
from hstu_rec.data.synthetic import SyntheticConfig
from hstu_rec.evaluator import EvalConfig
from hstu_rec.export import ExportConfig
from hstu_rec.planning import PlannedRun
from hstu_rec.ranker.config import RankRunConfig
from hstu_rec.recommending import RecommendConfig
from hstu_rec.run_config import OptimConfig
from hstu_rec.settings import hints_of

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int = 2
    """How many."""
    rate: float = 0.5
    is_on: bool = True
    kind: Literal["red", "green"] = "red"
    folder: Path = Path("somewhere")
    limit: float | None = None
    note: str | None = None
    sizes: tuple[int, ...] = (1, 2, 3)
    cuts: list[int] = field(default_factory=lambda: [5, 10])

    def problems(self) -> list[str]:
        return [] if self.count > 0 else [f"count must be above 0; got {self.count}"]


@dataclass(frozen=True, kw_only=True)
class Outer:
    title: str = "t"
    """What it is called,
    on two lines."""
    inner: Inner = field(default_factory=Inner)
    other: Inner = field(default_factory=Inner)


def problems_of(schema: type, *arguments: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(schema, arguments)
    return str(caught.value)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_no_argument_gives_the_defaults() -> None:
    assert load(Outer, []) == Outer()
    assert load(RunConfig, []) == RunConfig()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("count=7", 7),
        ("rate=1e-3", 0.001),
        ("rate=2", 2.0),
        ("is_on=false", False),
        ("kind=green", "green"),
        ("folder=a/b", Path("a/b")),
        ("limit=3", 3.0),
        ("limit=null", None),
        ("note=null", None),
        ("note=1.10", "1.10"),
        ("note=a: b # c", "a: b # c"),
        ("note=", ""),
        ("note=x=y", "x=y"),
        ("sizes=[9]", (9,)),
        ("cuts=[1, 2, 3]", [1, 2, 3]),
        ("cuts=[]", []),
    ],
)
def test_an_override_gets_the_type_of_its_field(setting: str, expected: object) -> None:
    value = getattr(load(Outer, [f"inner.{setting}"]).inner, setting.split("=")[0])
    assert value == expected
    assert type(value) is type(expected)


def test_later_settings_win_over_earlier_ones_and_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "inner: {count: 3, rate: 1e-3}\ntitle: from a\n")
    second = write(tmp_path / "b.yaml", "inner:\n  count: 4\n")
    loaded = load(Outer, [first, second, "inner.is_on=no", "inner.count=5", "inner.count=6"])
    assert loaded == Outer(title="from a", inner=Inner(count=6, rate=0.001, is_on=False))
    assert load(Outer, ["inner.count=5", second]).inner.count == 4


def test_a_leading_double_dash_is_ignored() -> None:
    assert load(Outer, ["--", "--inner.count=5"]).inner.count == 5


def test_the_settings_of_a_base_come_before_those_of_the_file(tmp_path: Path) -> None:
    files = {
        "far": "train:\n  max_epochs: 1\n  patience: 1\n  seed: 1\n",
        "near": "base: far.yaml\ntrain:\n  patience: 2\n  seed: 2\n",
        "own": "base: near.yaml\ntrain:\n  seed: 3\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    loaded = load(RunConfig, [str(tmp_path / "own.yaml")]).train
    assert (loaded.max_epochs, loaded.patience, loaded.seed) == (1, 2, 3)


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("other.yaml", "other.yaml does not exist"),
        ("own.yaml", "based on itself"),
        ("../{folder}/own.yaml", "based on itself"),
    ],
)
def test_a_base_that_cannot_be_is_told(base: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"base: {base.format(folder=tmp_path.name)}\n")
    with pytest.raises(ValueError, match=told):
        load(RunConfig, [str(tmp_path / "own.yaml")])


def test_a_section_without_content_sets_nothing(tmp_path: Path) -> None:
    assert load(Outer, [write(tmp_path / "a.yaml", "inner:\n  # count: 3\n")]) == Outer()
    assert load(Outer, [write(tmp_path / "b.yaml", "")]) == Outer()


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "iner: {count: 1}\ninner: {kind: gren, sizes: [1, x]}\n")
    text = problems_of(
        Outer, path, "inner.rate=fast", "inner.is_on=[", "count=3", "inner=3", "other.count=0"
    )
    assert f"{path}: unknown key 'iner.count'; did you mean 'inner.count'?" in text
    assert "inner.kind must be one of red, green; got gren; did you mean 'green'?" in text
    assert "inner.sizes must be a list in brackets, [...], each a whole number; got [1, x]" in text
    assert "'inner.rate=fast': inner.rate must be a number; got fast" in text
    assert "inner.is_on=[" in text
    assert "unknown key 'count'; did you mean inner.count or other.count?" in text
    assert "'inner' is a section; set its keys: inner.count, inner.rate" in text
    assert "other.count must be above 0; got 0" in text
    assert len(text.splitlines()) == 1 + 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("title", "1.10"),
        ("title", "true"),
        ("inner.count", "1.5"),
        ("inner.count", "true"),
        ("inner.count", "null"),
        ("inner.count", "[1]"),
        ("inner.is_on", "5"),
        ("inner.note", "1.10"),
        ("inner.cuts", "3"),
        ("inner.cuts", "[1.5]"),
        ("inner.folder", "3"),
    ],
)
@pytest.mark.fault("R28")
def test_a_value_of_the_wrong_type_is_refused_not_converted(
    key: str, value: str, tmp_path: Path
) -> None:
    section, _, name = key.rpartition(".")
    content = f"{section}: {{{name}: {value}}}" if section else f"{name}: {value}"
    assert f": {key} must be " in problems_of(Outer, write(tmp_path / "a.yaml", content))


@pytest.mark.parametrize(
    "content",
    [
        "inner: [",
        "title: a\ntitle: b",
        "- title",
        "3",
        "title: !!python/object/apply:os.getcwd []",
        "title: ${oc.env:HOME}",
    ],
)
@pytest.mark.fault("R28")
def test_a_file_that_is_no_plain_yaml_is_named(content: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.yaml", content)
    text = problems_of(Outer, path, "inner.count=0")
    assert f"{path}: " in text
    assert "inner.count must be above 0" in text


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.yaml' is neither"):
        load(Outer, ["nowhere.yaml"])


@pytest.mark.fault("R28")
def test_a_misspelt_key_of_a_run_is_answered_with_the_right_one() -> None:
    assert "did you mean 'optim.lr'?" in problems_of(RunConfig, "optm.lr=1")
    assert "did you mean 'train.patience'?" in problems_of(RunConfig, "train.patient=1")
    assert "did you mean 'seen_allowed/ndcg@10'?" in problems_of(
        RunConfig, "train.select=seen_allowed/ndgc@10"
    )


@pytest.mark.parametrize(
    ("select", "ks"),
    [
        ("seen_masked/ndcg@10", [1, 5, 10]),
        ("seen_allowed/recall@5", [1, 5]),
        ("seen_allowed/mrr", [1, 5]),
    ],
)
def test_validations_measure_what_selects_beside_the_cut_offs_of_the_result(select, ks):
    config = load(RunConfig, ["eval.ks=[5,1]", f"train.select={select}", "eval.batch_users=7"])
    assert sorted(config.validation().ks) == ks and config.validation().batch_users == 7
    assert config.eval.ks == [5, 1]


@pytest.mark.parametrize(
    "select", ["seen_masked/ndcg@0", "masked/mrr", "mrr", "seen_masked/mrr@5", ""]
)
def test_what_selects_must_be_a_metric(select):
    assert "train.select must be seen_masked or seen_allowed, and" in problems_of(
        RunConfig, f"train.select={select}"
    )


@pytest.mark.parametrize(
    "setting",
    [
        "optim.lr=0",
        "optim.clip_norm=-1",
        "optim.beta2=1",
        "optim.final_lr_fraction=-0.1",
        "train.max_epochs=0",
        "train.patience=-1",
        "train.resume=auto",
        "data.batch_users=-1",
        "table.lr=0",
        "eval.ks=[0]",
        "eval.batch_users=0",
        "encoder.dim=0",
        "loss.temperature=0",
        "name=",
        "name=../../x",
        "name=a/b",
        "name=.hidden",
        f"name={'x' * 201}",
    ],
)
def test_a_value_out_of_range_names_its_key(setting: str) -> None:
    assert f"\n  {setting.split('=')[0]} " in problems_of(RunConfig, setting)


@pytest.mark.parametrize("value", ["inf", ".inf", "-Infinity", "nan", "1e999"])
@pytest.mark.parametrize(
    "key",
    ["optim.lr", "optim.weight_decay", "table.lr", "loss.temperature", "guard.divergence_factor"],
)
def test_a_number_that_is_not_finite_is_refused(key: str, value: str) -> None:
    assert f"{key} must be a number; got " in problems_of(RunConfig, f"{key}={value}")
    assert "which is not finite" in problems_of(RunConfig, f"{key}={value}")


def test_sections_made_in_python_have_no_infinite_numbers() -> None:
    told = OptimConfig(lr=math.inf, clip_norm=math.inf).problems()
    assert told == [
        "lr must be finite and above 0; got inf",
        "clip_norm must be finite and at least 0; got inf",
    ]


@given(
    st.builds(
        Inner,
        count=st.integers(1, 2**63 - 1),
        rate=st.floats(allow_nan=False, allow_infinity=False),
        is_on=st.booleans(),
        kind=st.sampled_from(["red", "green"]),
        folder=st.sampled_from([Path("a b"), Path("1e3"), Path("/x/ü")]),
        limit=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        note=st.none() | st.text(st.characters(codec="utf-8", exclude_characters="$")),
        sizes=st.lists(st.integers(-(2**63), 2**63 - 1)).map(tuple),
        cuts=st.lists(st.integers(-(2**63), 2**63 - 1)),
    )
)
def test_a_saved_configuration_reads_back_equal(inner: Inner) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        save(Outer(inner=inner), path)
        assert load(Outer, [str(path)]) == Outer(inner=inner)


@pytest.mark.parametrize(
    "text", ["1e-3", "null", "yes", "010", "1_0", "0x1f", "1:30", "~", "2020-01-01"]
)
def test_text_that_looks_like_something_else_stays_text(text: str, tmp_path: Path) -> None:
    assert load(Outer, [f"title={text}"]).title == text
    save(Outer(title=text), tmp_path / "a.yaml")
    assert load(Outer, [str(tmp_path / "a.yaml")]).title == text


def test_a_saved_run_configuration_holds_every_key_and_reads_back_equal(tmp_path: Path) -> None:
    changed = load(RunConfig, ["name=x", "optim.lr=3e-4", "eval.ks=[10]", "encoder.dim=32"])
    save(changed, tmp_path / "config.yaml")
    assert load(RunConfig, [str(tmp_path / "config.yaml")]) == changed
    text = (tmp_path / "config.yaml").read_text()
    for key in keys_of(changed):
        assert f"{key}:" in text


def test_the_leaves_of_a_configuration_are_its_settings_by_dotted_key() -> None:
    found = leaves(load(Outer, ["inner.count=5", "inner.sizes=[9]", "inner.folder=a/b"]))
    assert found["inner.count"] == 5 and found["other.count"] == 2 and found["title"] == "t"
    assert found["inner.sizes"] == [9] and found["inner.folder"] == "a/b"
    assert [key.split(".")[-1] for key in found] == keys_of(Outer())


def keys_of(section: Any) -> list[str]:
    found: list[str] = []
    for one in fields(section):
        value = getattr(section, one.name)
        found += keys_of(value) if is_dataclass(value) else [one.name]
    return found


def test_the_help_lists_every_key_with_default_choices_and_doc() -> None:
    text = help_text(Outer)
    assert "  title=t  (text)\n      What it is called, on two lines.\n" in text
    assert "  inner.count=2  (a whole number)\n      How many.\n" in text
    assert "  other.kind=red  (red, green)\n" in text
    assert re.search(r"inner.limit=null  \(.* or null\)", text)
    assert "inner.sizes=[1, 2, 3]  (a list in brackets, [...], each a whole number)" in text
    assert "inner.is_on=true  (true or false)" in text
    assert help_text(Outer, r"inner\.(count|is_on)").count("=") == 2


def run_help(app: str, *words: str) -> str:
    script = runpy.run_path(str(CONFIGS.parent / "apps" / f"{app}.py"))
    with redirect_stdout(io.StringIO()) as stdout:
        script["main"]([*words, "help"])
    return stdout.getvalue()


HELP_OF = {
    "train": RunConfig, "evaluate": EvalConfig, "prepare": PrepareConfig, "export": ExportConfig,
    "recommend": RecommendConfig, "plan": PlannedRun, "make_events": SyntheticConfig,
    "train_ranker": RankRunConfig,
}  # fmt: skip


@pytest.mark.parametrize("app", HELP_OF)
def test_the_help_of_every_app_lists_every_setting(app: str) -> None:
    lines, prefix = run_help(app).splitlines(), "eval." if app == "evaluate" else ""
    for key in hints_of(HELP_OF[app]):
        place = [i for i, line in enumerate(lines) if line.startswith(f"  {prefix}{key}=")]
        assert place and lines[place[0]].endswith(")"), key
        assert lines[place[0] + 1].startswith("      "), key


def test_the_help_of_every_measure_lists_its_settings() -> None:
    schemas = runpy.run_path(str(CONFIGS.parent / "apps" / "benchmark.py"))["SCHEMAS"]
    for measure, schema in schemas.items():
        text = run_help("benchmark", measure)
        assert [key for key in hints_of(schema) if f"  {key}=" not in text] == []


def test_the_help_of_train_tells_what_the_demo_changes() -> None:
    demo = load(RunConfig, [str(CONFIGS / "demo.yaml")])
    assert differences(RunConfig()) == "" and "encoder.dim=" in differences(demo)
    assert f"configs/demo.yaml sets {differences(demo)}" in run_help("train")


def test_every_key_of_a_run_is_documented() -> None:
    lines = help_text(RunConfig).splitlines()
    keys = [i for i, line in enumerate(lines) if not line.startswith("      ")]
    assert len(keys) == len(keys_of(RunConfig()))
    assert [lines[i] for i in keys if not lines[i + 1 : i + 2] or i + 1 in keys] == []


@pytest.mark.parametrize(
    "name",
    sorted(p.name for p in CONFIGS.glob("*.yaml") if p.name != "published.yaml"),
)
def test_every_configuration_in_the_tree_is_valid(name: str) -> None:
    schema = RankRunConfig if name.endswith("_ranker.yaml") else RunConfig
    assert load(schema, [str(CONFIGS / name)]).name == Path(name).stem


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (ValueError("optim.lr must be above 0"), 2, "error: optim.lr must be above 0\n"),
        (FileNotFoundError("no such folder"), 2, "error: no such folder\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_a_mistake_of_the_user_is_a_sentence_and_an_exit_code(
    raised: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(arguments: list[str]) -> None:
        assert arguments == ["a", "b=1"]
        raise raised

    monkeypatch.setattr(sys, "argv", ["app.py", "--", "a", "b=1"])
    with redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as exited:
        run_app(main)
    assert exited.value.code == code
    assert stderr.getvalue() == told


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(_: list[str]) -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(AssertionError, match="an invariant"):
        run_app(main)
