"""Recommendations to all users of a dataset or of event files, by any number of processes.

    users 0 .. 4095 --> OUT/part-00000.parquet   process 0 of 2     user_id | rank | item_id | score
    users 4096 ..   --> OUT/part-00001.parquet   process 1
    ...                 OUT/_recommendations.json what they are of; when all is there, how much

A part appears whole. Started again, what is there is left as it is, if it is of the same model, histories and
settings.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hstu_rec import checkpoint, distributed, hosts, tracking
from hstu_rec.asked import Asked, Until
from hstu_rec.bundle import CONFIG
from hstu_rec.checkpoint.folder import MANIFEST
from hstu_rec.data.prepare import PrepareConfig, prepare
from hstu_rec.data.sources import SUFFIXES
from hstu_rec.durable import digest_of, write_file
from hstu_rec.export import serve_run
from hstu_rec.serving import ServingModel, load_bundle
from hstu_rec.settings import at_least
from hstu_rec.tracking import BAR_AFTER_S

DESCRIPTION = "_recommendations.json"  # by which readers of a folder of parquet pass it over
HISTORIES = ".histories"  # while it works on event files
# What a folder of another job's recommendations is of.
OTHERS = {"model": "another model", "histories": "other histories", "settings": "other settings"}


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """What is recommended, and to whom."""

    k: int = 10
    """Items of a user, at most."""
    filter_seen: bool = True
    """Leaves out items of the user's history."""
    until: Until = "end"
    """Histories of a prepared dataset: whole, or before the validation or the test target, of the users who
    have one, as evaluation takes them."""
    at: int = 0
    """Unix seconds for which is recommended, with until=end, by models that use it; no earlier than any
    event."""
    user_column: str = "user_id"
    """Of event files: column of user ids."""
    item_column: str = "item_id"
    """Of event files: column of item ids, those that the model was trained on."""
    time_column: str = "timestamp"
    """Of event files: column of times."""
    part_users: int = 4096
    """Users of a part file."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "k", "part_users") + at_least(self, 0, "at")
        if self.at and self.until != "end":
            found.append(
                f"at has no effect with until={self.until}, which takes the target's time; leave one out"
            )
        return found


def recommend_all(
    model: Path, source: Path, output: Path, config: RecommendConfig
) -> dict[str, Any]:
    """Recommends with `model` (a run or a bundle) to the users of `source` (a prepared dataset, or event
    files) into the folder `output`; returns what its _recommendations.json holds. Collective.

    Raises ValueError on all ranks for what cannot be read, and where `output` holds recommendations of
    another model, other histories or settings.
    """
    began = time.monotonic()
    if output.suffix.lower() in SUFFIXES:
        raise ValueError(
            f"OUT is a folder of parquet files; got {output}, the name of a file; give for example "
            f"{output.with_suffix('')}"
        )
    is_dataset = (source / "stats.json").is_file()
    cleared = nullcontext() if is_dataset else _histories_removed(output)
    with distributed.process_group("cpu"), cleared:
        served: list[ServingModel] = []
        hosts.together(lambda: served.append(_model_of(model)))
        if not is_dataset:
            hosts.on_main(lambda: _prepared(source, output / HISTORIES, config))
        asked: list[Asked] = []
        data = source if is_dataset else output / HISTORIES
        hosts.together(lambda: asked.append(_asked(served[0], data, config, source)))
        about = {
            "model": _identity(model),
            "histories": asked[0].dataset.identity,
            "settings": asdict(config),
        }
        hosts.on_main(lambda: _begin(output, about))
        counts = hosts.together(lambda: _write_parts(served[0], asked[0], output, config))
        users, rows, made = (sum(one[place] for one in counts) for place in range(3))
        done = {"users": users, "rows": rows, "users_without": len(asked[0].users) - users}
        done |= {"seconds": round(time.monotonic() - began, 2), "users_made": made}
        hosts.on_main(lambda: _describe(output, about | {"done": done}))
        return about | {"done": done}


def _model_of(folder: Path) -> ServingModel:
    with distributed.alone():
        return serve_run(folder) if (folder / "config.yaml").is_file() else load_bundle(folder)


def _identity(folder: Path) -> str:
    """What changes with the model's weights or items."""
    if (folder / "config.yaml").is_file():
        with distributed.alone():
            best = checkpoint.resolve(folder / "checkpoints", "best")
        return digest_of(best / MANIFEST)["sha256"]
    return digest_of(folder / CONFIG)["sha256"]


def _prepared(source: Path, folder: Path, config: RecommendConfig) -> None:
    """Makes a dataset folder of event files, of users of one event too."""
    if config.until != "end":
        raise ValueError(
            f"until={config.until} is of a prepared dataset; {source} is none (it has no stats.json)"
        )
    names = {
        f"{role}_column": getattr(config, f"{role}_column") for role in ("user", "item", "time")
    }
    prepare(PrepareConfig(**names, split="none", min_user_events=1, overwrite=True), source, folder)


@contextmanager
def _histories_removed(output: Path) -> Iterator[None]:
    """Removes at the end what was made of event files, and an output that holds nothing else."""
    was_there = output.exists()
    try:
        yield
    finally:
        if distributed.is_main():
            # A folder of that name without statistics is someone's own, which was refused.
            if (output / HISTORIES / "stats.json").is_file():
                shutil.rmtree(output / HISTORIES)
            if not was_there and output.is_dir() and not any(output.iterdir()):
                output.rmdir()


def _asked(model: ServingModel, data: Path, config: RecommendConfig, source: Path) -> Asked:
    asked = Asked.of(data, model.items, config.until, source)
    if model.uses_query_time and config.until == "end" and not config.at:
        raise ValueError(
            "this model uses the query time (encoder.query_time 'next'): give at, the unix seconds for "
            "which is recommended"
        )
    if config.at and not model.uses_query_time:
        raise ValueError("at has no effect on this model (encoder.query_time 'own'); leave it out")
    if config.at and config.at < (last := int(asked.dataset.facts["last_timestamp"])):
        raise ValueError(f"at={config.at} is before the last event, at {last}; give a later time")
    return asked


def _begin(output: Path, about: dict[str, Any]) -> None:
    """Makes the folder. Raises ValueError where another job's parts would lie beside these."""
    path = output / DESCRIPTION
    if path.is_file():
        former = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in about if former.get(name) != about[name]]:
            raise ValueError(
                f"{output} holds recommendations of {' and '.join(OTHERS[name] for name in changed)}; remove "
                "it, or give another folder"
            )
        return
    if output.exists() and any(one.name != HISTORIES for one in output.iterdir()):
        raise ValueError(f"{output} holds other files; give a folder that is empty or not there")
    output.mkdir(parents=True, exist_ok=True)
    _describe(output, about)


def _describe(output: Path, about: dict[str, Any]) -> None:
    write_file(output / DESCRIPTION, (json.dumps(about, indent=2) + "\n").encode())


def _write_parts(
    model: ServingModel, asked: Asked, output: Path, config: RecommendConfig
) -> tuple[int, int, int]:
    """(users with rows, rows, users of parts that were not there) of this rank's parts."""
    users = rows = made = 0
    size, num_users = config.part_users, len(asked.users)
    mine = range(distributed.rank() * size, num_users, distributed.world_size() * size)
    total = sum(min(size, num_users - begin) for begin in mine)
    is_shown = distributed.is_main()
    with tracking.bar(total, "recommending", "user", is_shown=is_shown, after_s=BAR_AFTER_S) as bar:
        for begin in mine:
            path = output / f"part-{begin // size:05d}.parquet"
            part = slice(begin, min(begin + size, num_users))
            if not path.exists():
                histories, times = asked.histories(part, config.at)
                table = model.recommend_to(histories, times, config.k, config.filter_seen)
                _write(path, table, len(histories.user_ids))
                made += part.stop - part.start
            metadata = pq.read_metadata(path)
            users += int(metadata.metadata[b"users"])
            rows += metadata.num_rows
            bar.update(part.stop - part.start)
    return users, rows, made


def _write(path: Path, table: pa.Table, num_users: int) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({"users": str(num_users)}), sink, compression="zstd"
    )
    write_file(path, sink.getvalue())  # type: ignore[arg-type]
