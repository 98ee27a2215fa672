"""Installs the pinned CPU environment into the Python that runs this; nothing of CUDA is downloaded.

    python requirements/install.py [serve.txt]

torch's CPU build comes from PyTorch's own CPU index where a short probe reaches it, else from where pip
looks by itself. The version's local part, +cpu, is what keeps the CUDA build of the public index away.
"""

import subprocess
import sys
import threading
import urllib.request
from http.client import HTTPException
from pathlib import Path

TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_TIMEOUT_S = 5
PIP_INSTALL = [
    *(sys.executable, "-m", "pip", "install"),
    *("--disable-pip-version-check", "--no-input", "-qq", "--no-deps"),
]


def is_reachable(url: str, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """True when `url` answers within `timeout_s`, name resolution and every retry included."""
    answers = []

    def probe() -> None:
        try:
            with urllib.request.urlopen(url, timeout=timeout_s) as answer:
                answers.append(answer.status)
        except (OSError, HTTPException):
            # No such name, no route, refused, timed out, a bad certificate, an HTTP error, no HTTP.
            answers.append(0)

    # A thread, because a socket's timeout does not limit the name resolution.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers == [200]


def install_torch() -> None:
    """Installs the CPU build of torch; exits with a sentence when there is none."""
    is_index_up = is_reachable(f"{CPU_INDEX}/torch/")
    sources = [["--index-url", CPU_INDEX]] if is_index_up else []
    for source in [*sources, []]:
        command = [*PIP_INSTALL, "--retries", "1", *source, f"torch=={TORCH}+cpu"]
        if subprocess.run(command).returncode == 0:
            return
    state = "answers, but pip could not install from it" if is_index_up else "does not answer"
    sys.exit(
        f"error: {CPU_INDEX} {state}, and pip finds no CPU build of torch {TORCH} for Python "
        f"{sys.version_info.major}.{sys.version_info.minor} elsewhere; put the wheel of torch "
        f"{TORCH}+cpu where pip looks (pip config set global.find-links FOLDER)"
    )


def main(name: str = "cpu.txt") -> None:
    """Installs torch and the pins `name` beside this file, then checks the build that is there."""
    print(f"installing torch {TORCH}+cpu and requirements/{name}, about a minute", flush=True)
    install_torch()
    # --no-deps: torchrec asks for an unpinned fbgemm-gpu, which is the CUDA build until the next step.
    pins = Path(__file__).with_name(name)
    if subprocess.run([*PIP_INSTALL, "-r", str(pins)]).returncode:
        sys.exit(f"error: pip could not install {pins.name}; its last lines above say why")
    name_of_fbgemm = str(Path(__file__).with_name("fbgemm-gpu"))
    has_fbgemm = "fbgemm-gpu-cpu" in pins.read_text(encoding="utf-8")
    named = [*PIP_INSTALL, "--no-build-isolation", name_of_fbgemm]
    if has_fbgemm and subprocess.run(named).returncode:
        sys.exit(f"error: pip could not install {name_of_fbgemm}; its last lines above say why")
    check = "import sys, torch; sys.exit(torch.version.cuda is not None)"
    if subprocess.run([sys.executable, "-c", check]).returncode:
        sys.exit(f"error: the torch that was installed is no working CPU build of {TORCH}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
