"""Recommends to all users of a prepared dataset or of event files, into a folder of parquet parts.

    python apps/recommend.py MODEL HISTORIES OUT [key=value ...]

MODEL is a run folder or one that apps/export.py wrote; HISTORIES a dataset folder, or a file, folder or glob
of events. It runs on CPU, with one process or several (torchrun, torchx), and goes on where it was stopped.
`help` lists the keys.
"""

from pathlib import Path

from hstu_rec import distributed
from hstu_rec.config import help_text, load, run_app
from hstu_rec.recommending import RecommendConfig, recommend_all


def main(arguments: list[str]) -> None:
    if {"help", "--help", "-h"} & set(arguments):
        print(f"{__doc__}\n{help_text(RecommendConfig)}")
        return
    paths, options = arguments[:3], arguments[3:]
    if len(paths) < 3 or any("=" in path for path in paths):
        given = " ".join(arguments) or "nothing"
        raise ValueError(f"give MODEL, HISTORIES and OUT, then key=value options; got {given}")
    model, histories, output = map(Path, paths)
    done = recommend_all(model, histories, output, load(RecommendConfig, options))["done"]
    if distributed.launched_rank() == 0:
        verb = "wrote   " if done["users_made"] else "found   "
        speed = f"{done['users_made'] / max(done['seconds'], 1e-3):,.0f} users/s"
        told = speed if done["users_made"] else "everything was there already"
        print(
            f"{verb} {output}: {done['rows']:,} rows of {done['users']:,} users; {done['users_without']:,} "
            f"users without a known item\ntook     {done['seconds']:.1f} s ({told})",
            flush=True,
        )


if __name__ == "__main__":
    run_app(main)
