"""Runs on two hosts: network namespaces of this machine, each with its own name, joined by a cable."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.datasets import write_dataset
from tests.faults.launched import environment

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
HOSTS = {"first": "10.77.0.1", "second": "10.77.0.2"}
TRAIN = [
    *("apps/train.py", "name=two", "train.device=cpu", "train.max_epochs=2", "train.patience=0"),
    *("train.eval_every_epochs=1", "train.log_every_steps=1", "data.batch_users=8"),
    *("encoder.dim=8", "encoder.max_history_len=9", "loss.num_negatives=12"),
    "eval.with_baselines=false",
]
# A host takes its name and its table of names, waits for the cable, and runs the command.
HOST = """
hostname $NAME
mount --bind $FOLDER/hosts_$NAME /etc/hosts
until ip link show veth0 > $FOLDER/link_$NAME 2>&1; do sleep 0.05; done
ip link set lo up
ip addr add $ADDRESS/24 dev veth0
ip link set veth0 up
exec "$@" > $FOLDER/out_$NAME 2>&1
"""
BOTH = """
own=$(readlink /proc/self/ns/net)
NAME=second ADDRESS=10.77.0.2 PET_NODE_RANK=1 unshare -num bash -e $FOLDER/host.sh "$@" &
until [ "$(readlink /proc/$!/ns/net)" != "$own" ]; do sleep 0.05; done
ip link add veth0 type veth peer name veth0 netns $!
is_bad=0
NAME=first ADDRESS=10.77.0.1 PET_NODE_RANK=0 bash -e $FOLDER/host.sh "$@" || is_bad=1
wait $! || is_bad=1
exit $is_bad
"""
# Unprivileged where the kernel lets users make namespaces.
UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--uts", "--mount"]


def why_not() -> str:
    """Why this machine cannot make two hosts, found out by trying; empty when it can."""
    pair = "ip link add veth0 type veth peer name veth1 && mount -t tmpfs none /mnt && hostname x"
    try:
        tried = subprocess.run([*UNSHARE, "sh", "-c", pair], capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"no program {error.filename}"
    return "" if tried.returncode == 0 else f"no network namespaces: {tried.stderr.strip()}"


WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "can be made")


def job_of_two_hosts(
    folder: Path, *command: str, is_name_loopback: bool = False
) -> tuple[list[str], dict[str, str]]:
    """What runs `command` on both hosts, and variables that it needs; it ends well when both do, and each
    writes to `folder`/out_<host>.

    `is_name_loopback`: a host's own name is 127.0.1.1 to itself, as many systems have it.
    """
    (folder / "host.sh").write_text(HOST)
    (folder / "both.sh").write_text(BOTH)
    for host in HOSTS:
        names = HOSTS | ({host: "127.0.1.1"} if is_name_loopback else {})
        lines = [
            f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **names}.items()
        ]
        (folder / f"hosts_{host}").write_text("".join(lines))
    return [*UNSHARE, "bash", str(folder / "both.sh"), *command], {"FOLDER": str(folder)}


def on_two_hosts(
    folder: Path, *command: str, is_name_loopback: bool = False, **variables: str
) -> tuple[int, dict[str, str]]:
    """Runs `command` on both hosts; 0 when it ends well on both, and what each of them wrote."""
    job, needed = job_of_two_hosts(folder, *command, is_name_loopback=is_name_loopback)
    done = subprocess.run(job, env=environment(**needed, **variables), cwd=ROOT, timeout=180)
    return done.returncode, {host: (folder / f"out_{host}").read_text() for host in HOSTS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 50, n).tolist() for n in random.integers(3, 15, 60)]
    return write_dataset(tmp_path_factory.mktemp("two") / "data", sequences, num_items=50).path


def test_two_hosts_train_what_two_processes_of_one_host_do(data: Path, tmp_path: Path) -> None:
    settings = [*TRAIN, f"data.path={data}"]
    runs = {name: tmp_path / name for name in ("two", "one")}
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "first:29500", "--rdzv-id", "7"]
    torchrun = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    failed, told = on_two_hosts(tmp_path, *torchrun, *settings, f"train.run_dir={runs['two']}")
    assert not failed, told
    one = [
        str(BIN / "torchrun"),
        "--nproc-per-node",
        "2",
        *settings,
        f"train.run_dir={runs['one']}",
    ]
    subprocess.run(one, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=180)
    results = {name: json.loads((run / "result.json").read_text()) for name, run in runs.items()}
    assert results["two"]["timing"]["processes"] == 2
    for part in ("test", "valid", "protocol"):
        assert results["two"][part] == results["one"][part]
    # Every row and weight, to the last bit: files of DCP, one a rank.
    digests = {}
    for name, run in runs.items():
        manifest = json.loads(
            next((run / "checkpoints").glob("step_*14/manifest.json")).read_text()
        )
        digests[name] = {k: v for k, v in manifest["files"].items() if k.endswith(".distcp")}
    assert len(digests["two"]) == 2
    assert digests["two"] == digests["one"]


PROBE = """
import sys, torch
sys.path.insert(0, ".")
from hstu_rec import distributed
from hstu_rec.config import run_app

def main(arguments):
    with distributed.process_group("cpu"):
        total = distributed.all_reduce_sum(torch.tensor([1, distributed.rank()]))
        local = distributed.local_world_size()
        # In one piece, because both processes of a host write to one file.
        print(f"sum {total.tolist()} on this host {local}\\n", end="", flush=True)

run_app(main)
"""
STATIC = ["torchrun", "--nnodes", "2", "--master-addr", HOSTS["first"]]


@pytest.fixture
def probe(tmp_path: Path) -> str:
    (tmp_path / "probe.py").write_text(PROBE)
    return str(tmp_path / "probe.py")


def test_hosts_meet_over_the_interface_that_is_given(probe: str, tmp_path: Path) -> None:
    failed, told = on_two_hosts(
        tmp_path,
        *STATIC,
        *("--nproc-per-node", "2", probe),
        is_name_loopback=True,
        GLOO_SOCKET_IFNAME="veth0",
    )
    assert not failed, told
    for text in told.values():
        assert text.count("sum [4, 6] on this host 2") == 2


def test_a_name_that_other_hosts_cannot_reach_is_a_sentence(probe: str, tmp_path: Path) -> None:
    failed, told = on_two_hosts(tmp_path, *STATIC, probe, is_name_loopback=True)
    assert failed
    for host, text in told.items():
        assert (
            f"error: the processes are on several hosts, but this one's name, {host}, is 127.0.1.1, "
            "which no other host reaches; set GLOO_SOCKET_IFNAME (and on CUDA NCCL_SOCKET_IFNAME) to "
            "the network interface between the hosts, one of: lo, veth0"
        ) in text


def test_data_that_one_host_lacks_is_told_by_both(data: Path, tmp_path: Path) -> None:
    # The second host has an empty folder in its place.
    (tmp_path / "start.sh").write_text(
        f'[ $(hostname) = first ] || mount -t tmpfs none {data}\nexec "$@"\n'
    )
    start = ["bash", "-e", str(tmp_path / "start.sh")]
    failed, told = on_two_hosts(tmp_path, *start, *STATIC, *TRAIN, f"data.path={data}")
    assert failed
    for text in told.values():
        assert f"error: on second: data.path: {data} is no prepared dataset" in text
