"""Sharded checkpoints that are complete or absent, and whose damage is found before use.

    root/step_00000040/   __0_0.distcp  __1_0.distcp   tensors, one file a rank (DCP)
                          tensors.json                 which tensor lies where
                          meta.json                    where the run stood, its settings, data, versions
                          manifest.json                size and sha256 of every file above
    root/best, root/last  pointers: a text file with the name of a step folder

A save goes to `step_N.tmp`, is made durable, and is renamed; a pointer moves only afterwards. While
a step is replaced its former folder is `step_N.old`, which is read where `step_N` is absent.

All ranks call every function here together, and a failure on one rank raises CheckpointError on
all. `root` is a folder that all ranks see. Without a process group a single process does it all.

    folder.py   names, manifest, pointers, what is kept      tensors.py   save, load
    saver.py    saves beside training                        storage.py   DCP's files without a pickle
    saved_rows.py  rows of a saved tensor by number

Loading executes nothing that a checkpoint holds: where tensors lie is JSON, and their numbers are read by
torch.load(weights_only=True).
"""

from hstu_rec.checkpoint.folder import (
    STEP_NAME,
    CheckpointError,
    has_pointer,
    newest,
    point,
    problems_of,
    purge,
    read_meta,
    resolve,
    set_aside,
)
from hstu_rec.checkpoint.saver import CheckpointConfig, Saver
from hstu_rec.checkpoint.tensors import load, named_tensors, save

__all__ = [
    "STEP_NAME",
    "CheckpointConfig",
    "CheckpointError",
    "Saver",
    "has_pointer",
    "load",
    "named_tensors",
    "newest",
    "point",
    "problems_of",
    "purge",
    "read_meta",
    "resolve",
    "save",
    "set_aside",
]
