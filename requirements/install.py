"""Installs the pinned CPU environment into the Python that runs this; nothing of CUDA is downloaded.

torch's CPU build comes from PyTorch's own CPU index where a short probe reaches it, else from what pip
finds by itself, if that is a CPU build.
"""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_TIMEOUT_S = 5
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def is_cpu_index_reachable() -> bool:
    """True when PyTorch's CPU index answers in time."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=PROBE_TIMEOUT_S) as answer:
            return answer.status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError, OSError):
        return False


def torch_arguments() -> list[str]:
    """pip's arguments for a CPU build of torch; exits with a sentence when there is none."""
    if is_cpu_index_reachable():
        return ["--index-url", CPU_INDEX, f"torch=={TORCH}+cpu"]
    dry_run = [
        "install",
        "--dry-run",
        "--quiet",
        "--ignore-installed",
        "--no-deps",
        "--report",
        "-",
    ]
    # Metadata alone is read where the index offers it; a local file costs nothing.
    answer = subprocess.run(
        [*PIP, *dry_run, "--retries", "1", f"torch=={TORCH}+cpu"], capture_output=True, text=True
    )
    if answer.returncode == 0:
        found = json.loads(answer.stdout)["install"][0]["metadata"]["version"]
        return [f"torch=={found}"]
    sys.exit(
        f"error: {CPU_INDEX} does not answer, and pip finds no CPU build of torch {TORCH} elsewhere; "
        f"put torch-{TORCH}+cpu's wheel where pip looks (pip config set global.find-links FOLDER)"
    )


def main() -> None:
    subprocess.run([*PIP, "install", "--quiet", "--no-deps", *torch_arguments()], check=True)
    pins = Path(__file__).with_name("cpu.txt")
    # --no-deps: torchrec asks for an unpinned fbgemm-gpu, which is the CUDA build.
    subprocess.run([*PIP, "install", "--quiet", "--no-deps", "-r", str(pins)], check=True)
    check = "import torch; assert torch.version.cuda is None, 'a CUDA build of torch was installed'"
    subprocess.run([sys.executable, "-c", check], check=True)


if __name__ == "__main__":
    main()
