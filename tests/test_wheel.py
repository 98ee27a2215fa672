"""The wheel: what is in it, and what it says of itself."""

import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import hstu_rec

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("hstu_rec", "tests", "apps", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "-w", "dist", "."], cwd=folder, check=True, timeout=120)
    (built,) = (folder / "dist").iterdir()
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def about(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_the_wheel_holds_every_module_and_no_test(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "hstu_rec").rglob("*.py")]
    assert sorted(names) == sorted([*modules, "hstu_rec/py.typed"])


def test_it_runs_on_every_platform_and_brings_its_licence(wheel: zipfile.ZipFile) -> None:
    assert Path(str(wheel.filename)).name == f"hstu_rec-{hstu_rec.__version__}-py3-none-any.whl"
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_what_it_says_of_itself_is_what_an_index_asks_for(about: Message) -> None:
    assert (about["Name"], about["Version"]) == ("hstu-rec", hstu_rec.__version__)
    assert about["License-Expression"] == "Apache-2.0" and about["Requires-Python"] == ">=3.11"
    assert about["Summary"] and "Typing :: Typed" in about.get_all("Classifier", [])
    assert about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload().startswith("# hstu_rec")  # pyright: ignore


def test_torchrec_comes_with_an_extra_and_fbgemm_with_the_choice_of_torch(about: Message) -> None:
    required = about.get_all("Requires-Dist", [])
    assert {'torchrec; extra == "distributed"', "torch"} <= set(required)
    assert not [one for one in required if "fbgemm" in one]
