"""Which torch, fbgemm and torchrec belong together: each fbgemm release is built for one torch release."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# torch release -> (fbgemm release, torchrec release), as tried.
TRIPLES = {"2.13": ("1.8.0", "1.8.0"), "2.11": ("1.6.0", "1.6.1")}
FBGEMM_NAMES = ("fbgemm-gpu-cpu", "fbgemm-gpu")


def _installed(*names: str) -> str | None:
    """Version of the first of `names` that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_triple() -> None:
    """Raises ImportError that names the right torch, fbgemm, torchrec when the installed ones do not fit."""
    torch_version = _installed("torch") or "none"
    found = (_installed(*FBGEMM_NAMES), _installed("torchrec"))
    # Builds from PyTorch's own indexes are called 1.6.0+cu130.
    releases = tuple(one and one.split("+")[0] for one in found)
    wanted = TRIPLES.get(".".join(torch_version.split(".")[:2]))
    is_cuda_fbgemm_on_cpu_torch = torch_version.endswith("+cpu") and not _installed(FBGEMM_NAMES[0])
    if releases == wanted and not is_cuda_fbgemm_on_cpu_torch:
        return
    table = "; ".join(
        f"torch {torch} with fbgemm {fbgemm} and torchrec {torchrec}"
        for torch, (fbgemm, torchrec) in TRIPLES.items()
    )
    raise ImportError(
        f"torch {torch_version}, {_fbgemm_name()} {found[0]} and torchrec {found[1]} do not belong "
        f"together; install one of: {table} (fbgemm is 'fbgemm-gpu-cpu' with a CPU build of torch, else "
        "'fbgemm-gpu'), as requirements/ does it"
    )


def _fbgemm_name() -> str:
    """What the installed fbgemm is called."""
    return next((name for name in FBGEMM_NAMES if _installed(name)), "fbgemm")


def commit() -> str | None:
    """Short hash of the source tree's commit, with "+changes" when tracked files differ; None outside git."""
    folder = Path(__file__).parent
    try:
        # A copy of the package inside a repository of something else is not that repository's commit.
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        return _git(folder, "describe", "--always", "--exclude=*", "--dirty=+changes").strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    """What git prints about `folder`."""
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def versions() -> dict[str, str | None]:
    """What a result was made with; `commit` only where there is one."""
    found = {
        "hstu_rec": _installed("hstu-rec"),
        "python": sys.version.split()[0],
        "torch": _installed("torch"),
        "torchrec": _installed("torchrec"),
        "fbgemm": _installed(*FBGEMM_NAMES),
    }
    made_of = commit()
    return found if made_of is None else {**found, "commit": made_of}
