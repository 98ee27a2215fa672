"""Which torch, fbgemm and torchrec belong together: each fbgemm release is built for one torch release."""

import sys
from importlib.metadata import PackageNotFoundError, version

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
    wanted = TRIPLES.get(".".join(torch_version.split(".")[:2]))
    if wanted is not None and found == wanted:
        return
    table = "; ".join(
        f"torch {torch} with fbgemm {fbgemm} and torchrec {torchrec}"
        for torch, (fbgemm, torchrec) in TRIPLES.items()
    )
    raise ImportError(
        f"torch {torch_version}, fbgemm {found[0]} and torchrec {found[1]} do not belong together; "
        f"install one of: {table} (fbgemm is 'fbgemm-gpu-cpu' without CUDA, else 'fbgemm-gpu')"
    )


def versions() -> dict[str, str | None]:
    """What a result was made with."""
    return {
        "hstu_rec": _installed("hstu-rec"),
        "python": sys.version.split()[0],
        "torch": _installed("torch"),
        "torchrec": _installed("torchrec"),
        "fbgemm": _installed(*FBGEMM_NAMES),
    }
