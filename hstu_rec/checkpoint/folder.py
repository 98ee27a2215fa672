"""The folder of a run's checkpoints: names, manifests, pointers, and which of them are kept."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hstu_rec import distributed, hosts
from hstu_rec.durable import digest_of, sync, write_file

MANIFEST, META, TENSORS = "manifest.json", "meta.json", "tensors.json"
FORMAT_VERSION = 2
STEP_NAME = re.compile(r"step_(\d{8,})(\.old)?")
POINTER_NAME = re.compile(r"[a-z][a-z0-9_-]*")
# What a rank writes. No file of another name is opened.
PART_NAME = re.compile(r"__\d+_\d+\.distcp")
Group = dist.ProcessGroup | None

# A checkpoint could not be written, found, verified or loaded; raised on every rank.
CheckpointError = hosts.RankError


def check_there(path: Path) -> None:
    """Raises CheckpointError unless there is a folder `path`."""
    if not hosts.on_main(path.is_dir):
        raise CheckpointError(f"there is no checkpoint {path}; give the folder of a step")


def read_meta(path: Path) -> dict[str, Any]:
    """The meta of a checkpoint. Raises CheckpointError when there is none, or it is damaged."""
    check_there(path)

    def read() -> dict[str, Any]:
        try:
            return json.loads((path / META).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {META}: {error}") from error

    return hosts.on_main(read)


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that matches its manifest, and a sentence for each one skipped.

    (None, [...]) when there is none.
    """
    skipped: list[str] = []
    for path in hosts.on_main(lambda: _step_folders(root)):
        problems = problems_of(path)
        if not problems:
            return path, skipped
        skipped.append(f"checkpoint {path.name} is skipped: " + "; ".join(problems))
    return None, skipped


def point(root: Path, name: str, path: Path, group: Group = None) -> None:
    """Makes the pointer `name` ("best", "last") name the step folder `path`, in one move."""

    def move() -> None:
        if not POINTER_NAME.fullmatch(name) or STEP_NAME.fullmatch(name):
            raise ValueError(f"a pointer is named in lower case letters, like 'best'; got {name!r}")
        if not STEP_NAME.fullmatch(path.name) or not (root / path.name / MANIFEST).is_file():
            raise ValueError(f"pointer {name!r} needs a complete checkpoint of {root}; got {path}")
        write_file(root / name, (path.name + "\n").encode())

    hosts.on_main(move, group)


def has_pointer(root: Path, name: str) -> bool:
    """Whether there is a pointer of that name. Collective."""
    return hosts.on_main(lambda: (root / name).is_file())


def resolve(root: Path, name: str) -> Path:
    """The step folder that the pointer `name` names; CheckpointError when there is none."""
    return hosts.on_main(lambda: _resolve(root, name))


def set_aside(root: Path, after: Path) -> list[str]:
    """Renames step folders newer than `after`, which no run goes on from, to `<name>.aside`, and removes
    pointers to them; the names of these folders. Collective."""
    return hosts.on_main(lambda: _set_aside(root, after))


def purge(root: Path, keep: int, group: Group = None) -> None:
    """Removes step folders except the newest `keep`, and leftovers; what a pointer names always stays."""
    hosts.on_main(lambda: _purge(root, keep), group)


def problems_of(path: Path) -> list[str]:
    """What is wrong with the checkpoint's files, by file; each rank hashes its share of them."""
    try:
        files = hosts.on_main(lambda: _read_manifest(path))
    except CheckpointError as error:
        return [str(error)]
    parts = hosts.together(
        lambda: {name: _problem(path / name, files[name]) for name in share_of([*files])}
    )
    found = {name: problem for part in parts for name, problem in part.items()}
    return [found[name] for name in files if found[name]]


def publish(partial: Path, final: Path, digests: dict[str, dict[str, Any]]) -> None:
    """Completes the folder `partial` with a manifest and moves it to `final`, where one may be."""
    manifest = {"format_version": FORMAT_VERSION, "files": dict(sorted(digests.items()))}
    write_file(partial / MANIFEST, json.dumps(manifest, indent=2).encode())
    former = final.with_name(final.name + ".old")
    if final.exists():
        if former.exists():
            shutil.rmtree(former)
        os.rename(final, former)
    os.rename(partial, final)
    sync(final.parent, is_deep=False)
    if former.exists():
        shutil.rmtree(former)


def share_of(names: list[str]) -> list[str]:
    """This rank's part of the files to hash."""
    return names[distributed.rank() :: distributed.world_size()]


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 by name of file."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format_version"], manifest["files"]
        complete = all({"size", "sha256"} <= entry.keys() for entry in files.values())
        if not complete or not {META, TENSORS} <= files.keys():
            raise ValueError("entries are missing")
        for name in files.keys() - {META, TENSORS}:
            if not PART_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no file of a checkpoint")
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is unreadable: {error}") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{MANIFEST} has format_version {version}; this version reads {FORMAT_VERSION}"
        )
    return files


def _problem(path: Path, expected: dict[str, Any]) -> str:
    """One sentence, or "" for a file that is as it was written."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            return f"{path.name} is no plain file"
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{path.name} has {size} bytes instead of {expected['size']}"
        is_same = digest_of(path)["sha256"] == expected["sha256"]
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} is unreadable: {error}"
    return "" if is_same else f"{path.name} has changed since it was written (sha256 differs)"


def _step_folders(root: Path) -> list[Path]:
    """Complete or not, newest first; `step_N.old` only where `step_N` is absent."""
    if not root.is_dir():
        return []
    steps = {path: match for path in root.iterdir() if (match := STEP_NAME.fullmatch(path.name))}
    present = {int(match[1]) for match in steps.values() if not match[2]}
    kept = [path for path, match in steps.items() if not match[2] or int(match[1]) not in present]
    return sorted(kept, key=lambda path: int(steps[path][1]), reverse=True)


def _resolve(root: Path, name: str) -> Path:
    if not (root / name).is_file():
        raise ValueError(f"{root} has no pointer {name!r}; it has {_pointers(root) or 'none'}")
    target = _target(root, name)
    if not STEP_NAME.fullmatch(target):
        raise ValueError(f"pointer {root / name} names {target!r}, which is no step folder")
    for path in (root / target, root / f"{target}.old"):
        if path.is_dir():
            return path
    raise ValueError(f"pointer {root / name} names {target}, which is missing")


def _target(root: Path, name: str) -> str:
    """What a pointer holds."""
    return (root / name).read_text(encoding="utf-8").strip()


def _pointers(root: Path) -> list[str]:
    return sorted(
        path.name for path in root.glob("*") if path.is_file() and POINTER_NAME.fullmatch(path.name)
    )


def _set_aside(root: Path, after: Path) -> list[str]:
    moved = []
    for path in _step_folders(root):
        if path.name == after.name:
            break
        aside = path.with_name(path.name + ".aside")
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(path, aside)
        moved.append(path.name)
    for name in _pointers(root):
        if _target(root, name) in moved:
            (root / name).unlink()
    sync(root, is_deep=False)
    return moved


def _purge(root: Path, keep: int) -> None:
    folders = _step_folders(root)
    kept = {path.name for path in folders[:keep]}
    for name in _pointers(root):
        target = _target(root, name)
        kept |= {target, target + ".old"}
    for path in folders:
        if path.name not in kept:
            # Renamed first: a kill half-way leaves a leftover, not a damaged checkpoint.
            doomed = path.with_name(path.name + ".tmp")
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
    leftovers = {path for path in root.glob("step_*") if path.name.endswith((".tmp", ".old"))}
    for path in leftovers - set(_step_folders(root)):
        shutil.rmtree(path)
