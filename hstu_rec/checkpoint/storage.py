"""DCP's files of tensors with JSON in place of a pickle for where each tensor lies.

    {"item.weight": {"dtype": "float32", "shape": [5, 3], "chunks": [
        {"offsets": [0, 0], "sizes": [3, 3], "file": "__0_0.distcp", "begin": 0, "length": 1325}, ...]}}

DCP pickles its `.metadata`, and whoever unpickles a file runs what its writer put there.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from hstu_rec.checkpoint.folder import PART_NAME, TENSORS
from hstu_rec.durable import write_file


class StorageWriter(FileSystemWriter):
    """Writes durable files of tensors, and TENSORS when all are there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Called by DCP on each rank."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch.save complains of its archive, in place of the full disk that cut it short.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from error

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Called by DCP on one rank, with what all have written."""
        stored = {one.index: one.storage_data for part in results for one in part}
        tensors = {
            name: _described(name, entry, stored)
            for name, entry in metadata.state_dict_metadata.items()
        }
        write_file(Path(self.path) / TENSORS, json.dumps(tensors, indent=1).encode())


class StorageReader(FileSystemReader):
    """Reads what StorageWriter wrote."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Which tensor lies where. Raises ValueError where the file does not tell."""
        path = Path(self.path) / TENSORS
        tensors: dict[str, Any] = {}
        stored: dict[MetadataIndex, _StorageInfo] = {}
        try:
            for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
                tensors[name] = _read(name, entry, stored)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return Metadata(tensors, storage_data=stored)


def _described(name: str, entry: Any, stored: dict[MetadataIndex, Any]) -> dict[str, Any]:
    assert isinstance(entry, TensorStorageMetadata), name  # a state holds tensors only
    chunks = []
    for chunk in entry.chunks:
        place = stored[MetadataIndex(name, chunk.offsets)]
        chunks.append(
            {
                "offsets": list(chunk.offsets),
                "sizes": list(chunk.sizes),
                "file": place.relative_path,
                "begin": place.offset,
                "length": place.length,
            }
        )
    dtype = str(entry.properties.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(entry.size), "chunks": chunks}


def _read(
    name: str, entry: dict[str, Any], stored: dict[MetadataIndex, _StorageInfo]
) -> TensorStorageMetadata:
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is of {entry['dtype']}")
    chunks = []
    for chunk in entry["chunks"]:
        offsets, sizes = torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])
        file = chunk["file"]
        if not PART_NAME.fullmatch(file):
            raise ValueError(f"{name!r} is in {file!r}, which is no file of a rank")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
        index = MetadataIndex(name, offsets)
        stored[index] = _StorageInfo(os.fspath(file), int(chunk["begin"]), int(chunk["length"]))
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(entry["shape"]), chunks)
