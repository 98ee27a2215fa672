"""The documented launch lines, each run for real with a small script on two gloo processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCHX = ["torchx", "run", "-s", "local_cwd", "dist.ddp", "-j", "1x2"]
TORCHRUN = ["torchrun", "--nproc-per-node", "2"]
PROBE = """
import json, sys
from pathlib import Path
import torch.distributed as dist

if "raise_before=1" in sys.argv:
    raise ValueError("before the group")
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
seen = {"name": __name__, "world_size": world_size, "argv": sys.argv, "path": sys.path[0]}
Path(__file__).with_name(f"rank{rank}.json").write_text(json.dumps(seen))
dist.barrier()
dist.destroy_process_group()
if f"fail_on={rank}" in sys.argv:
    sys.exit(3)
"""


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    path = tmp_path / "probe.py"
    path.write_text(PROBE)
    return path


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs `command` from the repository's root, with this Python's own torchx and torchrun."""
    folder = str(Path(sys.executable).parent)
    hidden = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHXCONFIG"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"PATH": f"{folder}:{environment['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def seen_by_ranks(probe: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(probe.parent.glob("rank*.json"))]


FORMS = {
    "torchx": lambda script: [*TORCHX, script],
    "torchx_script": lambda script: [*TORCHX, "--script", script, "--"],
    "torchrun": lambda script: [*TORCHRUN, script],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_starts_two_ranks_with_the_arguments_as_given(form: str, probe: Path) -> None:
    arguments = ["configs/demo.yaml", "data.path=a b", "optim.lr=1e-3", "eval.ks=[1, 5]"]
    done = launch(*FORMS[form](str(probe)), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {
        "name": "__main__",
        "world_size": 2,
        "argv": [str(probe), *arguments],
        "path": str(probe.parent),
    }
    assert seen_by_ranks(probe) == [expected, expected]


def test_no_argument_is_needed(probe: Path) -> None:
    done = launch(*TORCHX, os.path.relpath(probe, ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one["argv"][1:] for one in seen_by_ranks(probe)] == [[], []]


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_that_fails_fails_the_launch(form: str, probe: Path) -> None:
    done = launch(*FORMS[form](str(probe)), "fail_on=1")
    assert done.returncode != 0
    assert len(seen_by_ranks(probe)) == 2


def test_the_error_of_a_script_is_shown(probe: Path) -> None:
    done = launch(*TORCHX, str(probe), "raise_before=1")
    assert done.returncode != 0
    assert "ValueError: before the group" in done.stdout + done.stderr


def test_a_script_that_does_not_exist_is_named() -> None:
    done = launch(*TORCHX, "apps/trian.py")
    assert done.returncode != 0
    assert "error: 'apps/trian.py' is no file; name a script of apps/" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "error: no script was given;"),
        (["--"], "error: no script was given;"),
        (["apps"], "error: 'apps' is no file;"),
        (["optim.lr=1e-3", "apps/train.py"], "error: 'optim.lr=1e-3' is no file;"),
    ],
)
def test_the_dispatcher_asks_for_a_script_first(arguments: list[str], sentence: str) -> None:
    done = launch(sys.executable, ".torchx/launch.py", *arguments)
    assert done.returncode != 0
    assert done.stderr.startswith(sentence)


def test_the_dispatcher_takes_one_leading_separator_only(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text("import json, sys; print(json.dumps(sys.argv))")
    arguments = ["--", "--key", "value"]
    done = launch(sys.executable, ".torchx/launch.py", "--", str(script), *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(script), *arguments]


@pytest.mark.parametrize("form", ["torchx", "torchrun"])
def test_a_wrong_setting_of_an_app_is_a_sentence(form: str) -> None:
    done = launch(*FORMS[form]("apps/train.py"), "optm.lr=1e-3")
    assert done.returncode != 0
    assert "unknown key 'optm.lr'; did you mean 'optim.lr'?" in done.stdout + done.stderr


POSITIONALS = {
    "train": [],
    "train_ranker": [],
    "prepare": ["in", "out"],
    "evaluate": ["{run}"],
    "benchmark": ["step"],
    "make_events": ["counting", "{run}/out.parquet"],
    "plan": [],
    "export": ["{run}", "{run}/out"],
    "recommend": ["{run}", "{run}/data", "{run}/out"],
    "serve": ["{run}"],
}


@pytest.mark.parametrize("app", sorted(path.stem for path in (ROOT / "apps").glob("*.py")))
def test_python_alone_starts_every_app_and_a_mistake_exits_with_2(app: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    positionals = [word.format(run=tmp_path) for word in POSITIONALS[app]]
    done = launch(sys.executable, f"apps/{app}.py", *positionals, "no.such.key=1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "unknown key 'no.such.key'" in done.stderr
    assert done.stderr.startswith("error: ")
