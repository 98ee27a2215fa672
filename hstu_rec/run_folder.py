"""The folder of a run, its own: new, or one that is gone on with."""

import time
from pathlib import Path

from hstu_rec import distributed, hosts, lock
from hstu_rec.run_config import AnyTrainConfig
from hstu_rec.tracking import METRICS_FILE

# Folders of runs that were given none.
RUNS = Path("runs")
# What the features of a ranker mean; only its runs have it.
FEATURES_FILE = "features.json"
# By one of them a run's folder is known.
OF_A_RUN = ("checkpoints", "config.yaml", METRICS_FILE, lock.LOCK)


def settings_file(folder: Path) -> Path:
    """The config.yaml of a next-item run. Raises ValueError for the folder of a ranker."""
    if (folder / FEATURES_FILE).exists():
        raise ValueError(
            f"{folder} is a run of apps/train_ranker.py; hstu_rec.ranker.load_ranker reads it, and this is "
            "for runs of apps/train.py"
        )
    return folder / "config.yaml"


def of_this_job(config: AnyTrainConfig) -> Path | None:
    """The folder to go on in, where the launcher has started the job again and train.run_dir names none.
    Collective."""
    job = distributed.job()
    if config.run_dir or job is None or not distributed.num_restarts():
        return None
    return hosts.on_main(lambda: lock.folder_of(job, RUNS))


def run_folder(config: AnyTrainConfig, name: str) -> Path:
    """train.run_dir, or `runs/<time>-<name>`, the same on every rank; it need not be there.

    Raises ValueError on all ranks when another run is there already, or train.resume is nowhere.
    """
    hosts.together(lambda: _check_resume(config.resume))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = hosts.on_main(lambda: Path(config.run_dir or RUNS / f"{stamp}-{name}"))
    # Process 0 looks, because it also begins to write.
    hosts.on_main(lambda: _check_unused(folder, config.resume))
    return folder


def _check_resume(resume: str) -> None:
    if resume not in ("none", "auto") and not Path(resume).is_dir():
        raise ValueError(
            f"train.resume '{resume}' does not exist; give none, auto (the newest checkpoint of "
            "train.run_dir), or a checkpoint's folder, RUN/checkpoints/step_<number>"
        )


def _check_unused(folder: Path, resume: str) -> None:
    is_own = resume == "auto" or Path(resume).is_relative_to(folder)
    metrics = folder / METRICS_FILE
    # A file without a row was left by a run that could not begin.
    is_used = (folder / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size)
    if not is_own and is_used:
        raise ValueError(
            f"train.run_dir {folder} holds a run already; give another folder, remove this one, or go "
            "on with that run: train.resume=auto"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"train.run_dir {folder} is no folder; give one")
    # What begins with a dot a run may have left that was killed as it began (hosts.make_shared).
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not names & {*OF_A_RUN} and any(not name.startswith(".") for name in names):
        raise ValueError(
            f"train.run_dir {folder} holds other files, and no run; give a folder that is empty or not there"
        )
