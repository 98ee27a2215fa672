"""Sharded checkpoints that are complete or absent, and whose damage is found before use.

    root/step_00000040/   __0_0.distcp  __1_0.distcp   tensors, one file a rank (DCP)
                          .metadata                    which tensor lies where (DCP)
                          meta.json                    epoch, step, best value, versions, ...
                          manifest.json                size and sha256 of every file above
    root/best, root/last  pointers: a text file with the name of a step folder

A save goes to `step_N.tmp`, is made durable, and is renamed; a pointer moves only afterwards. While
a step is replaced its former folder is `step_N.old`, which is read where `step_N` is absent.

All ranks call every function here together, and a failure on one rank raises CheckpointError on
all. `root` is a folder that all ranks see. Without a process group a single process does it all.

DCP's `.metadata` is a pickle: load only checkpoints from a place you trust.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_loader as loader
import torch.distributed.checkpoint.state_dict_saver as saver
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hstu_rec import distributed, hosts

MANIFEST, META = "manifest.json", "meta.json"
FORMAT_VERSION = 1
STEP_NAME = re.compile(r"step_(\d{8,})(\.old)?")
POINTER_NAME = re.compile(r"[a-z][a-z0-9_-]*")

# A checkpoint could not be written, found, verified or loaded; raised on every rank.
CheckpointError = hosts.RankError


def save(root: Path, step: int, state: dict[str, Any], meta: dict[str, Any]) -> Path:
    """Writes `state` and `meta` as `root/step_XXXXXXXX` and returns that path, durable.

    `state`: tensors (plain ones equal on all ranks, DTensors in shards), in a dict that may be
    nested, with the same keys on every rank; a sharded one may be absent where a rank owns no row.
    `meta`: what JSON can hold, without NaN or infinity.
    On failure (a full disk) earlier checkpoints, one of the same step too, are left as they were.
    """
    _agreed_leaves(state)
    final = root / f"step_{step:08d}"
    partial = final.with_name(final.name + ".tmp")
    hosts.on_main(lambda: _begin(partial, meta))
    try:
        _save_tensors(partial, state)
        names = hosts.on_main(lambda: sorted(path.name for path in partial.iterdir()))
        shares = hosts.together(lambda: {name: _digest(partial / name) for name in _share(names)})
        digests = {name: digest for share in shares for name, digest in share.items()}
        hosts.on_main(lambda: _publish(partial, final, digests))
    except CheckpointError:
        hosts.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise
    return final


def load(
    path: Path, state: dict[str, Any], apart: Callable[[str], bool] = lambda _: False
) -> dict[str, Any]:
    """Verifies the checkpoint, fills the tensors of `state` in place, returns its meta.

    Tensors of names that are `apart` are left alone (hstu_rec.saved_rows reads them).

    Works at any number of ranks and any sharding. Raises CheckpointError, before a tensor is
    touched, when a file is damaged or when keys, shapes or dtypes of `state` differ from what was
    saved: an optimizer whose state is still empty would otherwise load nothing without a word.
    """
    _check_there(path)
    if problems := _problems(path):
        raise CheckpointError(f"{path} is damaged: " + "; ".join(problems))
    reader = FileSystemReader(path)
    wanted = _agreed_leaves(state)
    hosts.together(
        lambda: _check_fit(path, reader.read_metadata().state_dict_metadata, wanted, apart)
    )
    tensors = {name: tensor for name, tensor in named_tensors(state).items() if not apart(name)}
    try:
        loader.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"{path} could not be read: {_reasons(error)}") from error
    return read_meta(path)


def read_meta(path: Path) -> dict[str, Any]:
    """The meta of a checkpoint. Raises CheckpointError when there is none, or it is damaged."""
    _check_there(path)

    def read() -> dict[str, Any]:
        try:
            return json.loads((path / META).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {META}: {error}") from error

    return hosts.on_main(read)


def _check_there(path: Path) -> None:
    if not hosts.on_main(path.is_dir):
        raise CheckpointError(f"there is no checkpoint {path}; give the folder of a step")


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that matches its manifest, and a sentence for each one skipped.

    (None, [...]) when there is none.
    """
    skipped: list[str] = []
    for path in hosts.on_main(lambda: _step_folders(root)):
        problems = _problems(path)
        if not problems:
            return path, skipped
        skipped.append(f"checkpoint {path.name} is skipped: " + "; ".join(problems))
    return None, skipped


def point(root: Path, name: str, path: Path) -> None:
    """Makes the pointer `name` ("best", "last") name the step folder `path`, in one move."""

    def move() -> None:
        if not POINTER_NAME.fullmatch(name) or STEP_NAME.fullmatch(name):
            raise ValueError(f"a pointer is named in lower case letters, like 'best'; got {name!r}")
        if not STEP_NAME.fullmatch(path.name) or not (root / path.name / MANIFEST).is_file():
            raise ValueError(f"pointer {name!r} needs a complete checkpoint of {root}; got {path}")
        write_file(root / name, (path.name + "\n").encode())

    hosts.on_main(move)


def resolve(root: Path, name: str) -> Path:
    """The step folder that the pointer `name` names; CheckpointError when there is none."""
    return hosts.on_main(lambda: _resolve(root, name))


def purge(root: Path, keep: set[Path] | int) -> None:
    """Removes step folders except those in `keep`, or except the newest `keep`, and leftovers.

    What a pointer names always stays.
    """
    hosts.on_main(lambda: _purge(root, keep))


def write_file(path: Path, content: bytes) -> None:
    """Writes `path` durably, in one move: readers see the former file or the whole new one."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)


def named_tensors(state: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a nested dict by path: {"a": {"b": t}} -> {"a/b": t}."""
    tensors: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            inner = named_tensors(value, name + "/")
        elif isinstance(value, torch.Tensor):
            inner = {name: value}
        else:
            raise ValueError(
                f"state {name!r} is a {type(value).__name__}; a checkpoint's state holds tensors, "
                "other values belong in meta"
            )
        if clash := tensors.keys() & inner.keys():
            raise ValueError(f"state has two tensors named {sorted(clash)[0]!r}")
        tensors |= inner
    return tensors


def _share(names: list[str]) -> list[str]:
    """This rank's part of the files to hash."""
    return names[distributed.rank() :: distributed.world_size()]


def _agreed_leaves(state: dict[str, Any]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Size and dtype by name, over all ranks; CheckpointError on all where they disagree."""
    ranks = hosts.together(lambda: _leaves(state))
    agreed = {name: leaf for leaves, _ in ranks for name, leaf in leaves.items()}
    for leaves, plain in ranks:
        if plain != ranks[0][1] or any(leaf != agreed[name] for name, leaf in leaves.items()):
            raise CheckpointError("the state has other keys, shapes or dtypes on other ranks")
    return agreed


def _leaves(
    state: dict[str, Any],
) -> tuple[dict[str, tuple[torch.Size, torch.dtype]], set[str]]:
    """This rank's sizes and dtypes by name, and the names that are not sharded."""
    tensors = named_tensors(state)
    plain = {name for name, t in tensors.items() if type(t) in (torch.Tensor, nn.Parameter)}
    return {name: (tensor.size(), tensor.dtype) for name, tensor in tensors.items()}, plain


def _begin(partial: Path, meta: dict[str, Any]) -> None:
    try:
        text = json.dumps(meta, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"meta must be plain JSON (None instead of NaN or inf): {error}"
        ) from error
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    write_file(partial / META, text.encode())


def _save_tensors(folder: Path, state: dict[str, Any]) -> None:
    writer = FileSystemWriter(folder, sync_files=True)
    try:
        saver.save(named_tensors(state), storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"{folder} could not be written: {_reasons(error)}") from error


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items())


def _publish(partial: Path, final: Path, digests: dict[str, dict[str, Any]]) -> None:
    manifest = {"format_version": FORMAT_VERSION, "files": dict(sorted(digests.items()))}
    write_file(partial / MANIFEST, json.dumps(manifest, indent=2).encode())
    former = final.with_name(final.name + ".old")
    if final.exists():
        if former.exists():
            shutil.rmtree(former)
        os.rename(final, former)
    os.rename(partial, final)
    _sync_folder(final.parent)
    if former.exists():
        shutil.rmtree(former)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": sha256}


def _problems(path: Path) -> list[str]:
    """What is wrong with the checkpoint's files, by file; each rank hashes its share of them."""
    try:
        files = hosts.on_main(lambda: _read_manifest(path))
    except CheckpointError as error:
        return [str(error)]
    parts = hosts.together(
        lambda: {name: _problem(path / name, files[name]) for name in _share([*files])}
    )
    found = {name: problem for part in parts for name, problem in part.items()}
    return [found[name] for name in files if found[name]]


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 by name of file."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format_version"], manifest["files"]
        complete = all({"size", "sha256"} <= entry.keys() for entry in files.values())
        if not complete or not {META, ".metadata"} <= files.keys():
            raise ValueError("entries are missing")
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
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{path.name} has {size} bytes instead of {expected['size']}"
        is_same = _digest(path)["sha256"] == expected["sha256"]
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} is unreadable: {error}"
    return "" if is_same else f"{path.name} has changed since it was written (sha256 differs)"


def _check_fit(
    path: Path,
    saved: dict[str, Any],
    wanted: dict[str, tuple[torch.Size, torch.dtype]],
    apart: Callable[[str], bool],
) -> None:
    saved, wanted = ({n: v for n, v in names.items() if not apart(n)} for names in (saved, wanted))
    sentences = [f"{name!r} is not in the checkpoint" for name in wanted if name not in saved]
    sentences += [
        f"{name!r} is in the checkpoint but not in the state to fill (fill an optimizer's state "
        "before loading into it)"
        for name in saved
        if name not in wanted
    ]
    for name in wanted.keys() & saved.keys():
        entry = saved[name]
        is_tensor = isinstance(entry, TensorStorageMetadata)
        found = (entry.size, entry.properties.dtype) if is_tensor else "no tensor"
        if found != wanted[name]:
            sentences.append(f"{name!r} was saved as {found}, the state to fill has {wanted[name]}")
    if sentences:
        shown = sentences[:5] + [f"and {len(sentences) - 5} more"] * (len(sentences) > 5)
        raise ValueError(f"{path} does not fit: " + "; ".join(shown))


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
    target = (root / name).read_text(encoding="utf-8").strip()
    if not STEP_NAME.fullmatch(target):
        raise ValueError(f"pointer {root / name} names {target!r}, which is no step folder")
    for path in (root / target, root / f"{target}.old"):
        if path.is_dir():
            return path
    raise ValueError(f"pointer {root / name} names {target}, which is missing")


def _pointers(root: Path) -> list[str]:
    return sorted(
        path.name for path in root.glob("*") if path.is_file() and POINTER_NAME.fullmatch(path.name)
    )


def _purge(root: Path, keep: set[Path] | int) -> None:
    folders = _step_folders(root)
    kept = {path.name for path in (folders[:keep] if isinstance(keep, int) else keep)}
    for name in _pointers(root):
        target = (root / name).read_text(encoding="utf-8").strip()
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


def _sync_folder(folder: Path) -> None:
    """Makes the folder's entries durable, as fsync of a file does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
