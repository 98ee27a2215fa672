"""The installation: what is pinned, where torch comes from, what works without the rest."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import hstu_rec
from hstu_rec import versions as versions_module
from hstu_rec.versions import TRIPLES, check_triple, versions

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ROOT / "requirements"


@pytest.fixture
def install() -> ModuleType:
    """requirements/install.py as a module of its own."""
    spec = importlib.util.spec_from_file_location("install", REQUIREMENTS / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(name: str) -> dict[str, str]:
    """{package: version} of a requirements file; every line must pin one."""
    lines = (REQUIREMENTS / name).read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith(("#", "--"))]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.+]*", line) for line in wanted)
    return dict(line.lower().replace("_", "-").split("==") for line in wanted)


def test_the_cpu_environment_is_pinned_and_holds_nothing_of_cuda(install: ModuleType) -> None:
    pinned = pins("cpu.txt")
    assert not [name for name in pinned if re.search("nvidia|cuda|triton|cu1", name)]
    assert "fbgemm-gpu" not in pinned
    assert "torch" not in pinned  # install.py chooses where it comes from
    assert (pinned["fbgemm-gpu-cpu"], pinned["torchrec"]) == TRIPLES[install.TORCH[:4]]


def test_the_cpu_build_of_fbgemm_is_there_under_the_name_that_torchrec_requires() -> None:
    named = tomllib.loads((REQUIREMENTS / "fbgemm-gpu" / "pyproject.toml").read_text())["project"]
    pinned = pins("cpu.txt")["fbgemm-gpu-cpu"]
    assert named["name"] in {re.split("[<>=;! ]", one)[0] for one in requires("torchrec") or []}
    assert (named["version"], named["dependencies"]) == (
        f"{pinned}+cpu",
        [f"fbgemm-gpu-cpu=={pinned}"],
    )


def test_what_tests_and_the_site_need_beside_it_is_pinned_once() -> None:
    names = [name for file in ("cpu.txt", "dev.txt", "docs.txt") for name in pins(file)]
    assert len(names) == len(set(names))


def test_the_serving_environment_is_pinned_as_the_whole_one_and_lacks_what_trains() -> None:
    pinned, whole = pins("serve.txt"), pins("cpu.txt") | pins("dev.txt") | pins("docs.txt")
    assert not {"torch", "torchrec", "fbgemm-gpu-cpu", "duckdb", "torchx"} & set(pinned)
    assert {"fastapi", "uvicorn", "faiss-cpu", "numpy", "pyarrow", "safetensors"} <= set(pinned)
    assert not [name for name in pinned.keys() & whole.keys() if pinned[name] != whole[name]]


def test_the_cuda_requirements_are_a_triple_that_works() -> None:
    pinned = pins("cuda.txt")
    release = ".".join(pinned["torch"].split(".")[:2])
    assert (pinned["fbgemm-gpu"], pinned["torchrec"]) == TRIPLES[release]


def test_every_dependency_of_the_project_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.match(r"[A-Za-z0-9-]+", one)[0] for one in wanted}  # pyright: ignore
    assert names - {"torch"} <= set(pins("cpu.txt") | pins("serve.txt"))


def test_a_commit_is_held_against_what_lint_and_types_run() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"  # nothing is fetched
    as_they_are = [word for name in ("stamp", "dev", "docs") for word in ("-o", f".venv/.{name}")]
    done = subprocess.run(
        ["make", "-n", *as_they_are, "lint", "types"],
        # Not as a part of the make that runs the tests, which tells of folders.
        env={name: value for name, value in os.environ.items() if not name.startswith("M")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    ran = [line.removeprefix(f"{ROOT}/") for line in done.stdout.splitlines()]
    assert [hook["entry"] for hook in local["hooks"]] == ran
    assert all(
        (hook["language"], hook["pass_filenames"]) == ("system", False) for hook in local["hooks"]
    )


def test_a_server_that_never_answers_is_not_waited_for(install: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began_at = time.monotonic()
        assert not install.is_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/", 0.5)
        assert time.monotonic() - began_at < 3
    assert not install.is_reachable("http://127.0.0.1:1/", 0.5)


@pytest.mark.parametrize(
    ("is_up", "expected_sources"),
    [(True, ["index"]), (True, ["index", "own"]), (False, ["own"])],
)
def test_torch_comes_from_its_cpu_index_or_else_from_where_pip_looks(
    is_up: bool,
    expected_sources: list[str],
    install: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        assert command[-1] == f"torch=={install.TORCH}+cpu"  # the CUDA build can never match
        assert "--no-deps" in command
        tried.append("index" if install.CPU_INDEX in command else "own")
        return subprocess.CompletedProcess(command, 0 if len(tried) == len(expected_sources) else 1)

    monkeypatch.setattr(install, "is_reachable", lambda url: is_up)
    monkeypatch.setattr(install.subprocess, "run", run)
    install.install_torch()
    assert tried == expected_sources


def test_without_a_cpu_build_the_installation_stops_with_a_sentence(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "is_reachable", lambda url: False)
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(install.subprocess, "run", lambda command, **_: failed)
    with pytest.raises(SystemExit, match=r"does not answer, and pip finds no CPU build of torch"):
        install.main()


@pytest.mark.parametrize("target", ["env", "demo", "test"])
def test_one_command_makes_the_environment_and_does_the_work(target: str, tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "requirements").mkdir()
    for name in ("install.py", "cpu.txt", "dev.txt", "serve.txt"):
        (tmp_path / "requirements" / name).touch()
    (tmp_path / "pyproject.toml").touch()
    done = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [
        "-m venv --clear .venv",
        "requirements/install.py",
        "--no-deps -r requirements/serve.txt",
    ]
    steps += [" -e .", "touch .venv/.stamp"]
    steps += {"demo": ["apps/train.py configs/demo.yaml"], "test": ["-m pytest"]}.get(target, [])
    places = [done.stdout.find(step) for step in steps]
    assert places == sorted(places) and places[0] >= 0


def test_beside_a_clone_called_like_the_package_the_package_is_found(tmp_path: Path) -> None:
    clone, site = tmp_path / "hstu_rec", tmp_path / "site"
    shutil.copytree(ROOT / "hstu_rec", clone / "hstu_rec")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    line = re.search(r"^\t\$\(BIN\)/pip (install .* -e \.)$", (ROOT / "Makefile").read_text(), re.M)
    assert line is not None
    pip = [sys.executable, "-m", "pip", *shlex.split(line[1]), "--no-index", "--target", str(site)]
    subprocess.run(pip, cwd=clone, check=True, timeout=120)
    # Without the packages of this environment, where the package may be installed in another way.
    code = (
        f"import site; site.addsitedir({str(site)!r}); import hstu_rec; print(hstu_rec.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{hstu_rec.__version__}\n", done.stderr


def fake_versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    def version(name: str) -> str:
        if name.replace("-", "_") not in installed:
            raise PackageNotFoundError(name)
        return installed[name.replace("-", "_")]

    monkeypatch.setattr(versions_module, "version", version)


@pytest.mark.parametrize(
    "installed",
    [
        {"torch": "2.13.0+cpu", "fbgemm_gpu_cpu": "1.8.0", "torchrec": "1.8.0"},
        {"torch": "2.11.0+cu130", "fbgemm_gpu": "1.6.0", "torchrec": "1.6.1"},
        {"torch": "2.11.0+cu130", "fbgemm_gpu": "1.6.0+cu130", "torchrec": "1.6.1+cu130"},
    ],
)
def test_versions_that_belong_together_are_accepted(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_versions(monkeypatch, **installed)
    check_triple()
    assert versions()["torch"] == installed["torch"]


@pytest.mark.parametrize(
    "installed",
    [
        {},
        {"torch": "2.13.0+cpu"},
        {"torch": "2.13.0+cpu", "fbgemm_gpu_cpu": "1.9.0", "torchrec": "1.9.2"},
        {"torch": "2.13.0+cpu", "fbgemm_gpu": "1.8.0", "torchrec": "1.8.0"},
        {"torch": "2.13.0+cpu", "fbgemm_gpu_cpu": "1.8.0", "torchrec": "1.6.1"},
        {"torch": "2.11.0+cu130", "fbgemm_gpu": "1.8.0", "torchrec": "1.8.0"},
        {"torch": "3.0.0", "fbgemm_gpu": "1.8.0", "torchrec": "1.8.0"},
    ],
)
def test_versions_that_do_not_belong_together_name_the_right_ones(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_versions(monkeypatch, **installed)
    with pytest.raises(ImportError, match=r"torch 2\.13 with fbgemm 1\.8\.0 and torchrec 1\.8\.0"):
        check_triple()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_the_source_tree_is_told_with_its_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "versions.py"
    source.write_text("# as committed")
    monkeypatch.setattr(versions_module, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert versions_module.commit() is None and "commit" not in versions()
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "of something else")
    assert versions_module.commit() is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "source")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is no commit")
    short = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert versions_module.commit() == versions()["commit"] == short
    source.write_text("# changed")
    assert versions_module.commit() == f"{short}+changes"


def test_what_the_guides_write_into_a_clone_is_no_change_of_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    git(tmp_path, "add", ".gitignore")
    written = (".venv", "serve", "data/mine", "runs/mine", "shared/mine", "site")
    for name in written:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    assert git(tmp_path, "status", "--porcelain") == "A  .gitignore"


def test_without_git_no_commit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert versions_module.commit() is None


def test_the_installed_versions_belong_together() -> None:
    check_triple()


def test_the_package_says_its_version_once() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{hstu_rec.__version__}"' in project


BLOCK = """
import sys

class Blocked:
    names = {"torchrec", "fbgemm_gpu", "torchx", "duckdb", "pyarrow"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} is blocked")
        return None

sys.meta_path.insert(0, Blocked())
"""
ENCODER_ALONE = (
    BLOCK
    + """
import torch
import hstu_rec

assert "torch" in sys.modules and "hstu_rec.encoder" not in sys.modules
assert {"HSTU", "HSTUEncoder", "RunConfig"} <= set(dir(hstu_rec))
encoder = hstu_rec.HSTUEncoder(hstu_rec.EncoderConfig(dim=8, num_heads=2))
offsets = torch.tensor([0, 2, 2, 5])
out = encoder(torch.randn(5, 8), offsets, torch.arange(5), torch.arange(5))
assert out.shape == (5, 8) and out.isfinite().all()
model = hstu_rec.HSTU(num_items=10, hidden_dim=8, num_heads=2, num_layers=1, max_seq_len=4)
ids = torch.tensor([[0, 3, 4], [1, 2, 0]])
logits = model(ids, torch.arange(6).view(2, 3), ids != 0)
assert logits.shape == (2, 3, 11) and logits[0, 1, 1:].isfinite().all()
assert not Blocked.names & {name.split(".")[0] for name in sys.modules}
print("done")
"""
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_encoder_works_without_torchrec_fbgemm_torchx_duckdb_and_pyarrow() -> None:
    done = run_python(ENCODER_ALONE)
    assert done.stdout == "done\n", done.stderr


def test_the_blocked_imports_are_really_blocked() -> None:
    assert "pyarrow is blocked" in run_python(BLOCK + "import hstu_rec.data.dataset").stderr


@pytest.mark.parametrize(
    "app",
    [
        "train",
        "evaluate",
        "export",
        "recommend",
        "prepare",
        "benchmark",
        "make_events",
        "plan",
        "serve",
    ],
)
def test_every_app_starts_without_triton(app: str) -> None:
    code = BLOCK.replace('"torchrec",', '"triton",').replace('"fbgemm_gpu", ', "")
    code = code.replace('"torchx", "duckdb", "pyarrow"', "")
    run = f"sys.argv = ['{app}.py', 'help']\nrunpy.run_path('apps/{app}.py', run_name='__main__')"
    done = run_python(f"{code}import runpy\n{run}")
    assert "Traceback" not in done.stderr and done.stdout, done.stderr


def test_every_public_name_can_be_had_and_others_are_refused() -> None:
    for name in hstu_rec.__all__:
        assert getattr(hstu_rec, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hstu_rec.no_such_name


def test_the_lazy_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "hstu_rec" / "__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: f"hstu_rec.{module}" for name, module in hstu_rec._MODULE_OF.items()}
    assert sorted(seen) == sorted(hstu_rec.__all__)
