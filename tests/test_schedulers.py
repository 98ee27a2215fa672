"""Jobs of several hosts as torchx hands them to Slurm and Kubernetes: what each host is made to run.

The commands of a job are run by the shell, as the cluster's hosts would, with a torchrun that only tells its
arguments.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
ARGUMENTS = ["apps/train.py", "configs/demo.yaml", "data.path=/shared/a b", "eval.ks=[1, 5]"]
FOUR_HOSTS = ["dist.ddp", "-j", "4x8", "--gpu", "8"]

# `torchrun` and `srun`: a line of JSON a call into $SEEN; srun then runs the command of every group.
TORCHRUN = """
import json, os, sys
told = {"argv": sys.argv[1:], "env": dict(os.environ)}
with open(os.environ["SEEN"], "a") as file:
    print(json.dumps(told), file=file)
"""
SRUN = """
import itertools, os, subprocess, sys
for is_colon, group in itertools.groupby(sys.argv[1:], lambda word: word == ":"):
    words = list(group)
    if not is_colon:
        start = next(at for at, word in enumerate(words) if not word.startswith("--"))
        given = [word for word in words[:start] if word.startswith("--export=ALL,")]
        pairs = dict(pair.split("=", 1) for pair in given[0].split(",")[1:])
        subprocess.run(words[start:], env={**os.environ, **pairs}, check=True)
"""
# Stands for the kubernetes package where it is not installed: torchx only makes its data classes.
KUBERNETES = {
    "__init__.py": "",
    "client/models.py": """
def __getattr__(name):
    if not name.startswith("V1"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, **fields: self.__dict__.update(fields)})
""",
    "client/__init__.py": """
import re

class ApiClient:
    def sanitize_for_serialization(self, value):
        if isinstance(value, (list, tuple)):
            return [self.sanitize_for_serialization(one) for one in value]
        if isinstance(value, dict):
            return {key: self.sanitize_for_serialization(one) for key, one in value.items()}
        if hasattr(value, "__dict__"):
            camel = {re.sub("_(.)", lambda m: m[1].upper(), k): v for k, v in vars(value).items()}
            return self.sanitize_for_serialization(
                {key: one for key, one in camel.items() if one is not None}
            )
        return value
""",
}


def write_program(folder: Path, name: str, source: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{source}")
    (folder / name).chmod(0o755)


def dry_run(folder: Path, *command: str) -> str:
    """What `torchx run --dryrun COMMAND` hands to the scheduler."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCHXCONFIG", "PYTHONPATH")}
    paths = [os.environ.get("PYTHONPATH", "")]
    if importlib.util.find_spec("kubernetes") is None:
        for name, source in KUBERNETES.items():
            (folder / "stand_in/kubernetes" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "stand_in/kubernetes" / name).write_text(source)
        paths.append(str(folder / "stand_in"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    torchx = str(Path(sys.executable).with_name("torchx"))
    done = subprocess.run(
        [torchx, "run", "--dryrun", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("=== SCHEDULER REQUEST ===\n")[1]


def run_as_host(folder: Path, command: list[str], **variables: str) -> list[dict[str, Any]]:
    """What torchrun is told when a host runs `command` with `variables`, call by call."""
    write_program(folder / "bin", "torchrun", TORCHRUN)
    write_program(folder / "bin", "srun", SRUN)
    seen = folder / "seen.jsonl"
    seen.unlink(missing_ok=True)
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SEEN": str(seen), **variables}
    subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True)
    return [json.loads(line) for line in seen.read_text().splitlines()]


def told(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """torchrun's options, and the script with its arguments."""
    script = argv.index(".torchx/launch.py")
    return dict(zip(argv[0:script:2], argv[1:script:2], strict=True)), argv[script:]


def check_host(call: dict[str, Any], first_host: str) -> None:
    options, script = told(call["argv"])
    assert script == [".torchx/launch.py", *ARGUMENTS]
    assert options["--rdzv_backend"] == "c10d"
    assert options["--rdzv_endpoint"] == f"{first_host}:29500"
    assert (options["--nnodes"], options["--nproc_per_node"]) == ("4", "8")


def slurm_script(folder: Path, *options: str) -> str:
    text = dry_run(folder, "-s", "slurm", *options, *ARGUMENTS)
    return text[text.index("#!/bin/bash") :]


def groups_of(script: str) -> list[set[str]]:
    """The options of each of a Slurm job's groups of hosts."""
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [set(line.split()[1:]) for line in lines if line != "#SBATCH hetjob"]


def test_slurm_makes_every_host_meet_at_the_first(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(slurm_script(tmp_path, *FOUR_HOSTS))
    first = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST_HET_GROUP_0": "node003"}
    calls = run_as_host(tmp_path, ["bash", "job.sh"], **first)
    assert len(calls) == 4
    for call in calls:
        check_host(call, "node003")
        assert told(call["argv"])[0]["--rdzv_id"] == "17"


def test_slurm_is_asked_for_gpus_and_cores_and_no_gigabyte_of_memory(tmp_path: Path) -> None:
    groups = groups_of(slurm_script(tmp_path, *FOUR_HOSTS))
    assert len(groups) == 4
    for group in groups:
        assert {"--gpus-per-task=8", "--cpus-per-task=32", "--ntasks-per-node=1"} <= group
        assert not any(option.startswith("--mem") for option in group)


def test_slurm_takes_what_is_given_and_retries(tmp_path: Path) -> None:
    limits = ["-cfg", "partition=gpu,time=1-00:00:00"]
    sizes = ["--cpu", "96", "--memMB", "900000", "--max_retries", "3"]
    script = slurm_script(tmp_path, *limits, *FOUR_HOSTS, *sizes)
    expected = {"--partition=gpu", "--time=1-00:00:00", "--cpus-per-task=96", "--mem=900000"}
    assert all(expected <= group for group in groups_of(script))
    assert "export TORCHX_MAX_RETRIES=3\n" in script


def test_slurm_hands_variables_to_every_host(tmp_path: Path) -> None:
    variables = "NCCL_SOCKET_IFNAME=ib0,GLOO_SOCKET_IFNAME=ib0,OMP_NUM_THREADS=4"
    (tmp_path / "job.sh").write_text(slurm_script(tmp_path, *FOUR_HOSTS, "--env", variables))
    first = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST_HET_GROUP_0": "node003"}
    for call in run_as_host(tmp_path, ["bash", "job.sh"], **first):
        assert {pair for pair in variables.split(",")} <= {
            f"{name}={value}" for name, value in call["env"].items()
        }


def test_processes_are_started_again_unless_env_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(slurm_script(tmp_path, *FOUR_HOSTS))
    first = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST_HET_GROUP_0": "node003"}
    for call in run_as_host(tmp_path, ["bash", "job.sh"], **first):
        assert call["env"]["PET_MAX_RESTARTS"] == "3"
        assert call["env"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    variables = "OMP_NUM_THREADS=4"
    (tmp_path / "job.sh").write_text(slurm_script(tmp_path, *FOUR_HOSTS, "--env", variables))
    for call in run_as_host(tmp_path, ["bash", "job.sh"], **first):
        assert "PET_MAX_RESTARTS" not in call["env"]


@pytest.fixture(scope="module")
def kubernetes_tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The pods of a job on four hosts with a shared volume, by host."""
    where = ["--image", "registry/hstu-rec", "--mounts", "type=volume,src=claim,dst=/shared"]
    folder = tmp_path_factory.mktemp("kubernetes")
    text = dry_run(folder, "-s", "kubernetes", *FOUR_HOSTS, *where, *ARGUMENTS)
    job = yaml.safe_load(text)
    assert job["spec"]["schedulerName"] == "volcano" and job["spec"]["queue"] == "default"
    return [task["template"]["spec"] for task in job["spec"]["tasks"]]


def test_kubernetes_makes_every_host_meet_at_the_first(
    kubernetes_tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert len(kubernetes_tasks) == 4
    for number, pod in enumerate(kubernetes_tasks):
        (container,) = pod["containers"]
        variables = {one["name"]: one["value"] for one in container["env"]}
        # As Volcano's plugins for services and variables set it in every pod.
        hosts = {"VC_LAUNCH_0_HOSTS": "launch-0-0.launch"}
        (call,) = run_as_host(tmp_path, container["command"], **hosts, **variables)
        check_host(call, "launch-0-0.launch" if number else "localhost")
        assert {"containerPort": 29500, "name": "c10d"} in container["ports"]


def test_kubernetes_gives_gpus_cores_and_the_volume(kubernetes_tasks: list[dict[str, Any]]) -> None:
    for pod in kubernetes_tasks:
        (container,) = pod["containers"]
        assert container["image"] == "registry/hstu-rec"
        limits = container["resources"]["limits"]
        assert limits == {"cpu": "32000m", "nvidia.com/gpu": "8"}
        mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
        volumes = {one["name"]: one for one in pod["volumes"]}
        assert volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"] == "claim"
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
