"""A trained run in the shared form (hstu_rec.bundle): its best checkpoint, without a process group or a GPU.

    RUN/checkpoints/best  --verify--> dense weights          --> model.safetensors
                          --blocks--> rows of the item table --> item_vectors.safetensors
    RUN/items.parquet, result.json, config.yaml              --> items.parquet, README.md, config.json

Nothing larger than a block of rows is held, but where int8 vectors or an index are measured. The folder is
written under another name and then renamed.
"""

import json
import os
import shutil
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from torch import Tensor

from hstu_rec import bundle, checkpoint, tracking
from hstu_rec.approximate import int8_loss, measured_index, rows_of
from hstu_rec.asked import Asked
from hstu_rec.bundle import BundleConfig, Scoring, VectorKind, model_of
from hstu_rec.checkpoint.saved_rows import SavedRows
from hstu_rec.config import RunConfig, load
from hstu_rec.data.item_map import ITEM_MAP, item_map_hash
from hstu_rec.data.own_ids import IdIndex, typed_ids
from hstu_rec.durable import digest_of, make_folder, sync
from hstu_rec.item_table import ROWS_NAME
from hstu_rec.program import write_programs
from hstu_rec.quantised import Int8Rows
from hstu_rec.report import listing, metric_table
from hstu_rec.run_folder import settings_file
from hstu_rec.serving import ServingModel
from hstu_rec.settings import at_least, within, without_effect
from hstu_rec.versions import versions

BLOCK_ROWS = 2**16


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What a bundle says of itself beside what the run tells."""

    name: str = ""
    """Name of the model; that of the run when empty."""
    description: str = ""
    """A text for the README.md."""
    license: str = ""
    """Licence of the weights, for the README.md."""
    vectors: VectorKind = "float32"
    """Of the item vectors; int8 takes a quarter, with a scale a row. What Recall@10 loses is told."""
    index: Literal["none", "exact", "ivf"] = "none"
    """A FAISS index of the items: exact compares all, ivf those of the cells next to a query. Its recall@10
    against exact scores is told."""
    index_recall: float = 0.95
    """Of ivf: as few cells are searched, a power of two, as give this recall@10."""
    program: Literal["none", "torch", "compiled"] = "none"
    """The encoder and the item vectors as a program of torch.export, which needs no hstu_rec; compiled: also
    by AOTInductor for the CPU, with g++."""
    data: str = ""
    """Dataset folder whose test users int8 and the index are measured on; the run's when empty."""
    max_users: int = 10_000
    """Users that they are measured on, evenly drawn, at most."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "max_users") + within(self, "(0, 1]", "index_recall")
        if self.index != "ivf":
            found += without_effect(self, f"with index={self.index}", "index_recall")
        if self.vectors == "float32" and self.index == "none":
            found += without_effect(self, "without int8 or an index", "data", "max_users")
        return found


@dataclass(frozen=True)
class TrainedRun:
    """What a bundle is made of."""

    folder: Path
    config: RunConfig
    scoring: Scoring
    weights: dict[str, Tensor]
    """Dense, by name."""
    rows: SavedRows
    item_map_hash: str
    result: dict[str, Any]

    def vectors(self) -> Iterator[Tensor]:
        """float32 [BLOCK_ROWS, D] rows by index, the last fewer. Raises ValueError for NaN or infinity."""
        for begin in range(0, len(self.rows), BLOCK_ROWS):
            end = min(begin + BLOCK_ROWS, len(self.rows))
            block = self.rows.take(np.arange(begin, end))
            if not block.isfinite().all():
                raise ValueError(
                    f"{self.folder}: rows {begin}..{end - 1} of the item table hold NaN or infinity; train "
                    "again with lower rates"
                )
            yield block

    def bundle_config(self, about: ExportConfig) -> BundleConfig:
        """What config.json holds, but for the files."""
        protocol = dict(self.result["protocol"])
        data = protocol.pop("data", {}) | {"split": protocol.pop("split", None)}
        data.pop("format_version", None)  # of the dataset folder
        return BundleConfig(
            num_items=len(self.rows),
            item_map_hash=self.item_map_hash,
            # A kernel is the choice of a machine.
            encoder=replace(self.config.encoder, attention_kernel="auto"),
            scoring=self.scoring,
            files={},
            vectors=about.vectors,
            about={
                "name": about.name or self.config.name,
                "description": about.description,
                "license": about.license,
                "data": data,
                "metrics": {"protocol": protocol}
                | {split: self.result[split] for split in ("valid", "test")},
                "versions": {"trained": self.result["versions"], "exported": versions()},
            },
        )


def open_run(folder: Path) -> TrainedRun:
    """A finished run's best checkpoint, verified. Raises ValueError, or FileNotFoundError for what is no
    finished run with a catalogue of its own."""
    written = settings_file(folder)
    needed = (written.name, "result.json", ITEM_MAP, "checkpoints")
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise FileNotFoundError(
            f"{folder} cannot be exported: {', '.join(missing)} missing; give the folder of a run that is "
            f"through, as apps/train.py leaves it (one on data.path=synthetic has no {ITEM_MAP})"
        )
    config = load(RunConfig, [str(written)])
    path = checkpoint.resolve(folder / "checkpoints", "best")
    if problems := checkpoint.problems_of(path):
        raise ValueError(f"{path} is damaged: {'; '.join(problems)}")
    found = item_map_hash(folder / ITEM_MAP)
    if checkpoint.read_meta(path).get("items") not in (None, found):
        raise ValueError(
            f"{folder / ITEM_MAP} does not hold the items that {path} was trained on; give a run folder as "
            "it was written"
        )
    rows = SavedRows(path, f"model/{ROWS_NAME}")
    shape = (pq.read_metadata(folder / ITEM_MAP).num_rows, config.encoder.dim)
    if (rows.shape, rows.dtype) != (shape, torch.float32):
        raise ValueError(
            f"{path}: the item table is {rows.dtype} {list(rows.shape)}, {folder}/config.yaml and "
            f"{ITEM_MAP} tell of torch.float32 {list(shape)}; give a run folder as it was written"
        )
    loss = config.loss
    scoring = Scoring(
        similarity=loss.similarity,
        temperature=loss.temperature,
        use_seen_bias=loss.use_seen_bias,
        precision=config.train.precision,
    )
    model = model_of(config.encoder, scoring, torch.empty(0))
    weights = {name: torch.empty(one.shape) for name, one in model.state_dict().items()}
    load_dense(path, weights)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return TrainedRun(folder, config, scoring, weights, rows, found, result)


def load_dense(path: Path, weights: dict[str, Tensor]) -> None:
    """Fills a model's dense `weights`, by name, from a verified checkpoint, without a process group."""
    wanted = {f"model/{name}" for name in weights}
    with warnings.catch_warnings():
        # DCP tells that there is no process group.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        checkpoint.load(path, {"model": weights}, lambda name: name not in wanted, is_verified=True)


def own_ids(folder: Path) -> IdIndex:
    """The items of a run folder, by row of its table."""
    items = pq.read_table(folder / ITEM_MAP, columns=["item_id"]).column("item_id")
    return IdIndex(typed_ids(items))


def serve_run(folder: Path) -> ServingModel:
    """The model of a finished run, in memory, without a bundle between; raises as `open_run`."""
    run = open_run(folder)
    model = model_of(run.config.encoder, run.scoring, torch.cat([*run.vectors()]))
    model.load_state_dict(run.weights, assign=True)
    model.eval().requires_grad_(False)
    return ServingModel(run.bundle_config(ExportConfig()), model, own_ids(folder))


def export(
    folder: Path, output: Path, about: ExportConfig, told: Mapping[str, Any] | None = None
) -> BundleConfig:
    """Writes the bundle `output` of the run in `folder`: whole, or not at all.

    told: what config.json's `about` holds besides.
    Raises ValueError when `output` is there already, and as `open_run`.
    """
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} is there already; remove it, or give another folder")
    run = open_run(folder)
    config = run.bundle_config(about)
    partial = output.with_name(output.name + ".tmp")
    if partial.exists():  # of an export that was stopped
        shutil.rmtree(partial)
    make_folder(partial, f"OUT {output}")
    try:
        # Not save_file, whose files none but the owner may read.
        (partial / bundle.WEIGHTS).write_bytes(save(run.weights))
        _write_vectors(partial / bundle.VECTORS, run, about.vectors)
        shutil.copyfile(folder / ITEM_MAP, partial / bundle.ITEMS)
        further = dict(told or {}) | _write_further(partial, run, about)
        config = replace(config, about=config.about | further)
        (partial / bundle.CARD).write_text(_card(config, run.result), encoding="utf-8")
        files = {path.name: digest_of(path) for path in sorted(partial.iterdir())}
        config = replace(config, files=files)
        content = {"format_version": bundle.FORMAT_VERSION, **asdict(config)}
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        (partial / bundle.CONFIG).write_text(text, encoding="utf-8")
        sync(partial)
        os.rename(partial, output)
        sync(output.absolute().parent, is_deep=False)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return config


def _write_further(folder: Path, run: TrainedRun, about: ExportConfig) -> dict[str, Any]:
    """Writes what the options ask for beside the model, and measures it."""
    if about.vectors == "float32" and about.index == about.program == "none":
        return {}
    exact = serve_run(run.folder)
    if about.program != "none":
        compiled = folder / bundle.PACKAGE if about.program == "compiled" else None
        rows = rows_of(exact) if about.vectors == "float32" else Int8Rows.of(rows_of(exact))
        write_programs(exact.model, rows, folder / bundle.PROGRAM, compiled)
    if about.vectors == "float32" and about.index == "none":
        return {}
    data = Path(about.data or run.config.data.path)
    if not (data / "stats.json").is_file():
        raise ValueError(
            f"int8 vectors and an index are measured on users, and {data} is no dataset folder; give "
            "data=FOLDER"
        )
    users = Asked.of(data, exact.items, "test").evenly(about.max_users)
    found: dict[str, Any] = {}
    if about.vectors == "int8":
        found["int8"] = int8_loss(exact, users)
    if about.index != "none":
        index, found["index"] = measured_index(exact, users, about.index, about.index_recall)
        index.write(folder / bundle.INDEX)
    return found


def _write_vectors(path: Path, run: TrainedRun, kind: VectorKind) -> None:
    """A safetensors file, which is: the header's length, uint64; the header, JSON; the numbers, little-endian
    (the library itself writes tensors that are in memory)."""
    num_items, dim = run.rows.shape
    scales_end = 0 if kind == "float32" else 4 * num_items
    width = dim * (4 if kind == "float32" else 1)
    name = "F32" if kind == "float32" else "I8"
    header: dict[str, Any] = {
        bundle.ITEM_VECTORS: {
            "dtype": name,
            "shape": [num_items, dim],
            "data_offsets": [scales_end, scales_end + num_items * width],
        }
    }
    if kind == "int8":
        offsets = [0, scales_end]
        header[bundle.ITEM_SCALES] = {"dtype": "F32", "shape": [num_items], "data_offsets": offsets}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        begin, first = file.write(struct.pack("<Q", len(head)) + head), 0
        with tracking.bar(num_items, "item vectors", "row", after_s=tracking.BAR_AFTER_S) as bar:
            for block in run.vectors():
                values = block
                if kind == "int8":
                    rows = Int8Rows.of(block)
                    file.seek(begin + 4 * first)
                    file.write(rows.scales.numpy().astype("<f4", copy=False).data)
                    values = rows.values
                file.seek(begin + scales_end + width * first)
                number = "<f4" if kind == "float32" else "i1"
                file.write(values.numpy().astype(number, copy=False).data)
                first += len(block)
                bar.update(len(block))


def _card(config: BundleConfig, result: dict[str, Any]) -> str:
    """README.md."""
    about, encoder = config.about, config.encoder
    at = ", at=now" if encoder.query_time == "next" else ""
    usage = (
        "```python\nfrom hstu_rec import load_bundle\n\n"
        "# one row an event: own ids, unix seconds\n"
        'events = {"user_id": [...], "item_id": [...], "timestamp": [...]}\n'
        f'load_bundle("FOLDER").recommend(events, k=10{at})\n```'
    )
    model = {
        "items": config.num_items,
        "attention": encoder.attention,
        "width, layers, heads": f"{encoder.dim}, {encoder.num_layers}, {encoder.num_heads}",
        "events of a history": encoder.max_history_len,
        "similarity": config.scoring.similarity,
        "item vectors": config.vectors,
        "uses the time of the request": encoder.query_time == "next",
        **({"licence": about["license"]} if about["license"] else {}),
    }
    sections = {
        f"# {about['name']}": "A sequential recommender of hstu_rec: an HSTU encoder and the vectors of "
        f"{config.num_items:,} items.\n\n{about['description']}".strip(),
        "## Use": usage,
        "## Model": listing(model, "part"),
        "## Data": listing(about["data"], "statistic"),
        "## Metrics": f"```text\n{metric_table(result)}\n```",
        **{
            f"## {head}": listing(about[name], "measured")
            for name, head in (("int8", "Vectors in int8"), ("index", "Index of the items"))
            if name in about
        },
        "## Versions": listing(about["versions"], "package"),
    }
    return "\n\n".join(f"{head}\n\n{body}" for head, body in sections.items()) + "\n"
