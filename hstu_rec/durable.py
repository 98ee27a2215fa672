"""Files that are there after a power cut, whole, and known again."""

import hashlib
import os
from pathlib import Path
from typing import Any


def write_file(path: Path, content: bytes) -> None:
    """Writes `path` durably, in one move: readers see the former file or the whole new one."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent, is_deep=False)


def make_folder(folder: Path, what: str, *, exist_ok: bool = False) -> None:
    """Makes `folder` and those above it; `what` names it to the user, who gave it or a folder beside it.

    Raises the OSError that mkdir does, with a sentence.
    """
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        # A FileExistsError of what is no folder, or of a file above, would come again.
        kind = NotADirectoryError if isinstance(error, FileExistsError) else type(error)
        where = "" if error.filename == str(folder) else f": {error.filename}"
        advice = "give a folder where this user may write, on a disk with room"
        raise kind(f"{what} cannot be made ({error.strerror}{where}); {advice}") from error


def sync(folder: Path, *, is_deep: bool = True) -> None:
    """Flushes a folder's entries, which fsync of a file does not, and if `is_deep` its files, to the disk."""
    paths = [*(path for path in folder.iterdir() if is_deep and path.is_file()), folder]
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def digest_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": sha256}
