"""The shared form of a trained model: a folder of JSON, safetensors and parquet, none of it executed.

    config.json                what the model is, and size and SHA-256 of the other files
    model.safetensors          float32 weights by name, encoder.* and loss.*
    item_vectors.safetensors   item_vectors [num_items, dim], the table's rows by index: float32; or int8, to
                               be multiplied by item_scales, float32 [num_items]
    items.parquet              item_id (int64 or string, distinct) | index 0 .. num_items - 1, by index
    README.md                  for people; not read, and free to be changed
    items.faiss                may be there: an index of the items as they are scored (hstu_rec.item_index)
    program.pt2                may be there: the encoder for torch alone (hstu_rec.program); not read
    program_cpu.pt2            may be there: the same compiled for the CPU; not read

config.json holds

    format_version  1
    num_items       rows of item_vectors and items.parquet
    item_map_hash   SHA-256 of the own ids in index order (hstu_rec.data.own_ids.hash_items)
    encoder         EncoderConfig; what a later version adds and an older bundle lacks has its default
    scoring         Scoring
    vectors         float32 (also when left out) or int8
    files           {name: {"size": bytes, "sha256": hex}}, of the names above and no other
    about           name, description, license, data, metrics, versions: told, not used

A bundle may come from anyone. Only the names above are opened, as regular files inside the folder, and
everything is checked against config.json and against the model that it describes before it is used. What is
wrong raises BundleError. The hashes find damage; they do not tell who made a bundle. Native code of FAISS and
torch reads items.faiss and the programs, none of it made for files of strangers: `read_bundle` does not open
them, `read_index` opens the one, and nothing here the others.
"""

import json
import reprlib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hstu_rec import distributed
from hstu_rec.data.own_ids import IdIndex, hash_items, typed_ids
from hstu_rec.distributed import Precision
from hstu_rec.durable import digest_of
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.item_index import ItemIndex
from hstu_rec.loss import LossConfig, SampledSoftmax
from hstu_rec.model import NextItemModel
from hstu_rec.quantised import Int8Rows, ItemRows

FORMAT_VERSION = 1
CONFIG, WEIGHTS, VECTORS, ITEMS = (
    "config.json",
    "model.safetensors",
    "item_vectors.safetensors",
    "items.parquet",
)
CARD = "README.md"
INDEX, PROGRAM, PACKAGE = "items.faiss", "program.pt2", "program_cpu.pt2"
ITEM_VECTORS, ITEM_SCALES = "item_vectors", "item_scales"
VectorKind = Literal["float32", "int8"]
READ = (WEIGHTS, VECTORS, ITEMS)
MAX_CONFIG_BYTES = 2**24
# Of a whole number in config.json: what JSON of other makers keeps.
MAX_INT = 2**53

T = TypeVar("T")


class BundleError(ValueError):
    """A folder is no bundle that this version reads, or not what its config.json tells."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How queries and items are scored."""

    similarity: Literal["cosine", "dot"] = "cosine"
    """As loss.similarity."""
    temperature: float = 0.05
    """As loss.temperature."""
    use_seen_bias: bool = False
    """As loss.use_seen_bias; the bias is a weight of the model."""
    precision: Precision = "float32"
    """As train.precision: of the encoder's products."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        return self.loss().problems()

    def loss(self) -> LossConfig:
        """The loss of such scores."""
        return LossConfig(
            similarity=self.similarity,
            temperature=self.temperature,
            use_seen_bias=self.use_seen_bias,
        )


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """What config.json holds, checked."""

    num_items: int
    item_map_hash: str
    encoder: EncoderConfig
    scoring: Scoring
    files: dict[str, dict[str, Any]]
    about: dict[str, Any]
    vectors: VectorKind = "float32"


class Rows(nn.Module):
    """A table of all rows in one process, in place of an ItemTable."""

    def __init__(self, rows: ItemRows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [R, D] of int64 ids [R]."""
        return self.rows.index_select(0, ids)


def model_of(encoder: EncoderConfig, scoring: Scoring, rows: ItemRows) -> NextItemModel:
    """The model over `rows` [N, D], its weights without values, on the meta device. Raises ValueError for a
    configuration that describes none."""
    try:
        with torch.device("meta"):
            dense = HSTUEncoder(encoder), SampledSoftmax(scoring.loss())
    except (RuntimeError, TypeError, OverflowError) as error:  # numbers that no tensor has
        raise ValueError(f"encoder: {str(error).splitlines()[0]}") from error
    return NextItemModel(Rows(rows), *dense, distributed.product_dtype(scoring.precision))


def read_bundle(path: str | Path) -> tuple[BundleConfig, NextItemModel, IdIndex]:
    """A bundle's model, in evaluation mode, and the own ids of its items.

    The item vectors are mapped into memory, not copied. Every file is read once to be checked. Raises
    BundleError with the file and what is wrong with it.
    """
    folder = Path(path)
    config = read_config(folder)
    for name in READ:
        _check_digest(_file(folder, name), config.files[name])
    vectors = _item_rows(folder / VECTORS, config)
    num_weights = len(_shapes(folder / WEIGHTS))
    if config.encoder.num_layers > num_weights:
        raise BundleError(
            f"{folder / CONFIG} tells of {config.encoder.num_layers} layers, {folder / WEIGHTS} holds "
            f"{num_weights} tensors; {_ADVICE}"
        )
    try:
        model = model_of(config.encoder, config.scoring, vectors)
    except ValueError as error:
        raise BundleError(f"{folder / CONFIG}: {error}; {_ADVICE}") from error
    wanted = {name: ("F32", [*weight.shape]) for name, weight in model.state_dict().items()}
    weights = _tensors(folder / WEIGHTS, wanted)
    if bad := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise BundleError(f"{folder / WEIGHTS}: {bad[0]} holds NaN or infinity; {_ADVICE}")
    model.load_state_dict(weights, assign=True)
    index = _item_index(folder / ITEMS, config)
    return config, model.eval().requires_grad_(False), index


def read_index(path: str | Path, config: BundleConfig) -> ItemIndex:
    """The FAISS index of a bundle, its digest checked; the module says whose to read.
    Raises BundleError."""
    folder = Path(path)
    if INDEX not in config.files:
        raise BundleError(
            f"{folder} holds no index of its items; load it without use_index, or export the run again with "
            "index=ivf"
        )
    _check_digest(file := _file(folder, INDEX), config.files[INDEX])
    try:
        return ItemIndex.read(file, config.num_items, config.encoder.dim)
    except ValueError as error:
        raise BundleError(f"{file}: {error}; {_ADVICE}") from error


_ADVICE = "the bundle is damaged or no bundle of hstu_rec: get it again, or export the run again"


def read_config(folder: Path) -> BundleConfig:
    """What config.json of a bundle holds. Raises BundleError."""
    if not folder.is_dir():
        raise BundleError(f"there is no bundle {folder}; give a folder that apps/export.py wrote")
    path = _file(folder, CONFIG)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise BundleError(f"{path} has {path.stat().st_size} bytes, too many; {_ADVICE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is no JSON ({error}); {_ADVICE}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} holds no object of settings; {_ADVICE}")
    _check_version(path, content)
    problems: list[str] = []
    # What older bundles lack.
    defaults = {one.name: one.default for one in fields(BundleConfig) if one.default is not MISSING}
    values = {
        name: _checked(kind, content.get(name, defaults.get(name)), name, problems)
        for name, kind in get_type_hints(BundleConfig).items()
        if name != "files"
    }
    files = content.get("files")
    problems += _file_problems(files)
    if not problems and values["num_items"] < 1:
        problems.append(f"num_items must be at least 1; got {values['num_items']}")
    if problems:
        raise BundleError(f"{path}: {'; '.join(problems[:5])}; {_ADVICE}")
    return BundleConfig(**values, files=files)  # pyright: ignore[reportArgumentType]


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _check_version(path: Path, content: dict[str, Any]) -> None:
    version = content.get("format_version")
    if version == FORMAT_VERSION and type(version) is int:
        return
    if type(version) is not int:
        raise BundleError(
            f"{path} has format_version {reprlib.repr(version)}, where a whole number is wanted; {_ADVICE}"
        )
    age, advice = ("newer", "update hstu_rec") if version > FORMAT_VERSION else ("older", "")
    about = content.get("about")
    made_with = about.get("versions") if isinstance(about, dict) else None
    told = f", made with {reprlib.repr(made_with)}" if made_with else ""
    raise BundleError(
        f"{path} has format_version {version}, {age} than the {FORMAT_VERSION} that is read here{told}; "
        f"{advice or 'read it with the version that made it'}, or export the run again with this one: "
        "python apps/export.py RUN_FOLDER OUT"
    )


def _checked(kind: Any, value: Any, place: str, problems: list[str]) -> Any:
    """`value` as a `kind`: a number, text, object or section; what is wrong is added to `problems`."""
    if not hasattr(kind, "__dataclass_fields__"):
        if not _fits(kind, value):
            problems.append(f"{place} must be {_described(kind)}; got {reprlib.repr(value)}")
        return value
    if not isinstance(value, dict):
        problems.append(f"{place} must be an object; got {reprlib.repr(value)}")
        return None
    hints, before = get_type_hints(kind), len(problems)
    for name in value.keys() - hints.keys():
        problems.append(f"{place} has {reprlib.repr(name)}, which this version does not know")
    for name in value.keys() & hints.keys():
        _checked(hints[name], value[name], f"{place}.{name}", problems)
    if len(problems) > before:
        return None
    section = kind(**value)
    problems += [f"{place}.{sentence}" for sentence in section.problems()]
    return section


def _fits(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is int:
        return type(value) is int and abs(value) <= MAX_INT
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e308
    return type(value) is (get_origin(kind) or kind)


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, "an object")


def _file_problems(files: Any) -> list[str]:
    """What is wrong with the names, sizes and hashes of config.json."""
    if not isinstance(files, dict):
        return ["files must be an object"]
    allowed = {*READ, CARD, INDEX, PROGRAM, PACKAGE}
    found = [
        f"files names {reprlib.repr(name)}, which no bundle holds (it holds {', '.join(sorted(allowed))})"
        for name in files.keys() - allowed
    ]
    found += [f"files lacks {name}" for name in READ if name not in files]
    for name in files.keys() & allowed:
        entry = files[name]
        is_entry = isinstance(entry, dict) and entry.keys() == {"size", "sha256"}
        if not (is_entry and _fits(int, entry["size"]) and _fits(str, entry["sha256"])):
            found.append(f"files.{name} must hold size and sha256")
    return found


def _file(folder: Path, name: str) -> Path:
    """The file of that name, which is one of the known. Raises BundleError for what is none, or elsewhere."""
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise BundleError(f"{path} is missing; {_ADVICE}") from error
    if not real.is_relative_to(folder.resolve()):
        raise BundleError(f"{path} is a link to {real}, outside the bundle; copy the file itself")
    if not real.is_file():
        raise BundleError(f"{path} is no regular file; {_ADVICE}")
    return path


def _check_digest(path: Path, wanted: dict[str, Any]) -> None:
    size = path.stat().st_size
    if size != wanted["size"]:
        raise BundleError(f"{path} has {size} bytes instead of {wanted['size']}; {_ADVICE}")
    if digest_of(path)["sha256"] != wanted["sha256"]:
        raise BundleError(
            f"{path} has changed since it was exported (its SHA-256 differs); {_ADVICE}"
        )


def _shapes(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Data type and shape of the tensors of a file, by name."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BundleError(f"{path} is no whole safetensors file ({error}); {_ADVICE}") from error


def _item_rows(path: Path, config: BundleConfig) -> ItemRows:
    """The item vectors, mapped."""
    size = [config.num_items, config.encoder.dim]
    if config.vectors == "float32":
        return _tensors(path, {ITEM_VECTORS: ("F32", size)})[ITEM_VECTORS]
    wanted = {ITEM_VECTORS: ("I8", size), ITEM_SCALES: ("F32", size[:1])}
    found = _tensors(path, wanted)
    return Int8Rows(found[ITEM_VECTORS], found[ITEM_SCALES])


def _tensors(path: Path, wanted: dict[str, tuple[str, list[int]]]) -> dict[str, Tensor]:
    """The tensors of a file, mapped, which must be those of `wanted` data types and shapes by name."""
    found = _shapes(path)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise BundleError(f"{path} lacks {name}; {_ADVICE}")
        if name not in wanted:
            raise BundleError(
                f"{path} holds {reprlib.repr(name)}, which the model of {CONFIG} has not; {_ADVICE}"
            )
        if found[name] != wanted[name]:
            (kind, shape), (right, size) = found[name], wanted[name]
            raise BundleError(
                f"{path}: {name} is {kind} {shape}, the model of {CONFIG} has {right} {size}; {_ADVICE}"
            )
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in wanted}


def _item_index(path: Path, config: BundleConfig) -> IdIndex:
    """The own ids of the items, in the order of the rows."""
    try:
        with pq.ParquetFile(path) as file:
            num_rows, names = file.metadata.num_rows, file.schema_arrow.names
            if num_rows != config.num_items:
                raise ValueError(f"it has {num_rows} rows, {CONFIG} tells of {config.num_items}")
            if missing := {"item_id", "index"} - {*names}:
                raise ValueError(f"it lacks the column {sorted(missing)[0]}")
            table = file.read(columns=["item_id", "index"])
        places = table.column("index")
        if not pa.types.is_integer(places.type) or places.null_count:
            raise ValueError("index holds no whole numbers, or nulls")
        if not np.array_equal(places.to_numpy(), np.arange(num_rows)):
            raise ValueError(f"index is not 0, 1, .. {num_rows - 1}")
        index = IdIndex(typed_ids(table.column("item_id")))
        found = hash_items([index.ids])
        if found != config.item_map_hash:
            raise ValueError(
                f"its ids have the hash {found[:12]}..., those that the model was trained on "
                f"{config.item_map_hash[:12]}...: rows would be taken for other items"
            )
    except (ValueError, OSError, pa.ArrowException) as error:
        raise BundleError(f"{path}: {error}; {_ADVICE}") from error
    return index
