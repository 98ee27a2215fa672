"""Saving and loading a checkpoint's tensors, in shards, at any number of ranks."""

import json
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
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hstu_rec import distributed, hosts
from hstu_rec.checkpoint.folder import (
    META,
    CheckpointError,
    Group,
    check_there,
    problems_of,
    publish,
    read_meta,
    share_of,
)
from hstu_rec.checkpoint.storage import StorageReader, StorageWriter
from hstu_rec.durable import digest_of, write_file


def save(
    root: Path, step: int, state: dict[str, Any], meta: dict[str, Any], group: Group = None
) -> Path:
    """Writes `state` and `meta` as `root/step_XXXXXXXX` and returns that path, durable.

    `state`: tensors (plain ones equal on all ranks, DTensors in shards), in a dict that may be
    nested, with the same keys on every rank; a sharded one may be absent where a rank owns no row.
    `meta`: what JSON can hold, without NaN or infinity.
    `group`: of all ranks, on CPU, for a thread beside the main one.
    On failure (a full disk) earlier checkpoints, one of the same step too, are left as they were.
    """
    _agreed_leaves(state, group)
    final = root / f"step_{step:08d}"
    partial = final.with_name(final.name + ".tmp")
    hosts.on_main(lambda: _begin(partial, meta), group)
    try:
        _save_tensors(partial, state, group)
        names = hosts.on_main(lambda: sorted(path.name for path in partial.iterdir()), group)
        digests: dict[str, dict[str, Any]] = {}
        mine = share_of(names)
        for part in hosts.together(lambda: {n: digest_of(partial / n) for n in mine}, group):
            digests |= part
        hosts.on_main(lambda: publish(partial, final, digests), group)
    except CheckpointError:
        hosts.on_main(lambda: shutil.rmtree(partial, ignore_errors=True), group)
        raise
    return final


def load(
    path: Path,
    state: dict[str, Any],
    apart: Callable[[str], bool] = lambda _: False,
    *,
    is_verified: bool = False,
) -> dict[str, Any]:
    """Verifies the checkpoint, fills the tensors of `state` in place, returns its meta.

    Tensors of names that are `apart` are left alone (SavedRows reads them).

    is_verified: the files were held against the manifest already, as `newest` does.

    Works at any number of ranks and any sharding. Raises CheckpointError, before a tensor is
    touched, when a file is damaged or when keys, shapes or dtypes of `state` differ from what was
    saved: an optimizer whose state is still empty would otherwise load nothing without a word.
    """
    check_there(path)
    if not is_verified and (problems := problems_of(path)):
        raise CheckpointError(f"{path} is damaged: " + "; ".join(problems))
    reader = StorageReader(path)
    wanted = _agreed_leaves(state)
    hosts.together(
        lambda: _check_fit(path, reader.read_metadata().state_dict_metadata, wanted, apart)
    )
    tensors = {name: tensor for name, tensor in named_tensors(state).items() if not apart(name)}
    try:
        loader.load(tensors, storage_reader=reader, no_dist=not distributed.has_group())
    except CheckpointException as error:
        raise CheckpointError(f"{path} could not be read: {_reasons(error)}") from error
    return read_meta(path)


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


def _agreed_leaves(
    state: dict[str, Any], group: Group = None
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Size and dtype by name, over all ranks; CheckpointError on all where they disagree."""
    ranks = hosts.together(lambda: _leaves(state), group)
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


def _save_tensors(folder: Path, state: dict[str, Any], group: Group) -> None:
    writer, alone = StorageWriter(folder), not dist.is_initialized()
    try:
        saver.save(named_tensors(state), storage_writer=writer, no_dist=alone, process_group=group)
    except CheckpointException as error:
        raise hosts.SystemRankError(f"{folder} could not be written: {_reasons(error)}") from error


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items())


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
