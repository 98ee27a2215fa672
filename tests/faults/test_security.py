"""What users share is read and never executed, and no path in it leads out of its folder."""

import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hstu_rec import checkpoint, load_bundle
from hstu_rec.bundle import CONFIG, ITEMS, READ, VECTORS, WEIGHTS, BundleError
from hstu_rec.checkpoint import CheckpointError
from hstu_rec.export import open_run
from hstu_rec.trainer import evaluate_run
from hstu_rec.warm_start import former_run
from tests.shared_models import changed, refreshed

GOLDEN = Path(__file__).parent.parent / "golden" / "bundle_v1"
EVENTS = {"user_id": ["a"], "item_id": ["item 0001"], "timestamp": [10**9]}


@pytest.fixture
def shared(tmp_path):
    """A bundle as someone sent it."""
    return shutil.copytree(GOLDEN, tmp_path / "shared")


class Canary:
    """Whoever unpickles one makes its file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path):
    return Canary(tmp_path / "executed")


def pickles(canary: Canary, path: Path) -> dict[str, bytes]:
    """The same in the forms in which models are often shared."""
    torch.save({"encoder": canary}, path)
    archive = path.read_bytes()
    path.unlink()
    numbers = np.empty(1, dtype=object)
    numbers[0] = canary
    np.save(path.with_suffix(".npy"), numbers, allow_pickle=True)
    return {
        "pickle": pickle.dumps(canary),
        "pickle of protocol 0": pickle.dumps(canary, protocol=0),
        "torch.save": archive,
        "numpy": path.with_suffix(".npy").read_bytes(),
    }


def test_the_canary_sings(canary, tmp_path):
    for name, content in pickles(canary, tmp_path / "file").items():
        (tmp_path / "file").write_bytes(content)
        if name == "torch.save":
            torch.load(tmp_path / "file", weights_only=False)
        elif name == "numpy":
            np.load(tmp_path / "file", allow_pickle=True)
        else:
            pickle.loads(content)
        canary.path.rmdir()


@pytest.mark.fault("R26")
@pytest.mark.parametrize("name", [*READ, CONFIG])
def test_a_pickle_in_place_of_a_file_is_refused_and_not_unpickled(shared, canary, tmp_path, name):
    for content in pickles(canary, tmp_path / "file").values():
        (shared / name).write_bytes(content)
        if name != CONFIG:
            refreshed(shared)
        with pytest.raises(BundleError, match=name):
            load_bundle(shared)
        assert not canary.path.exists()


@pytest.mark.fault("R26")
def test_further_files_are_not_opened(shared, canary, tmp_path):
    content = pickles(canary, tmp_path / "file")["pickle"]
    code = f"import os; os.mkdir({str(canary.path)!r})\n"
    for name in ("model.pkl", "pytorch_model.bin", "data.pt", ".metadata", "optimizer.npy"):
        (shared / name).write_bytes(content)
    for name in ("__init__.py", "modeling.py", "conftest.py", "sitecustomize.py"):
        (shared / name).write_text(code)
    assert load_bundle(shared).recommend(EVENTS, 3).num_rows == 3
    assert not canary.path.exists()


@pytest.mark.fault("R26")
def test_a_type_of_arrow_that_is_a_pickle_stays_one(shared, canary):
    table = pq.read_table(shared / ITEMS)
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(canary),
    }
    fields = [table.schema.field(name).with_metadata(metadata) for name in ("item_id", "index")]
    pq.write_table(table.cast(pa.schema(fields)), shared / ITEMS)
    refreshed(shared)
    try:
        load_bundle(shared)
    except BundleError as error:
        assert ITEMS in str(error)
    assert not canary.path.exists()


@pytest.mark.fault("R26")
@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        (
            "encoder",
            {"attention": "__import__('os').mkdir('executed')"},
            "attention must be one of",
        ),
        ("encoder", {"norm": "!!python/object/apply:os.mkdir [executed]"}, "norm must be one of"),
        ("encoder", {"dim": "${oc.env:HOME}"}, "dim must be a whole number; got '..oc.env:HOME.'"),
        (
            "encoder",
            {"__class__": "os.system"},
            "encoder has '__class__', which this version does not",
        ),
        ("encoder", {"dropout": True}, "dropout must be a number; got True"),
        ("encoder", {"use_gate": 1}, "use_gate must be true or false; got 1"),
        ("encoder", {"num_heads": 0}, "num_heads must be at least 1; got 0"),
        ("scoring", {"similarity": ["cosine"]}, "similarity must be one of cosine, dot"),
        ("scoring", {"temperature": 0}, "temperature must be above 0"),
        ("scoring", {"precision": "pickle"}, "precision must be one of float32"),
    ],
)
def test_settings_are_numbers_and_words_that_are_known(shared, section, values, told):
    config = json.loads((shared / CONFIG).read_text())
    changed(shared, **{section: config[section] | values})
    with pytest.raises(BundleError, match=f"{CONFIG}: .*{told}"):
        load_bundle(shared)


def edited(values: dict) -> dict:
    """config.json of the golden bundle with other values in the section encoder."""
    config = json.loads((GOLDEN / CONFIG).read_text())
    return config | {"encoder": config["encoder"] | values}


@pytest.mark.fault("R26")
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is no JSON"),
        ("[" * 10**5, "is no JSON"),
        ('{"format_version": NaN}', "NaN is no number of JSON"),
        ("[1]", "holds no object"),
        (b"\xff\xfe", "is no JSON"),
        ('{"format_version": 1}', "num_items must be a whole number; got None"),
        (" " * (2**24 + 1), "too many"),
        (json.dumps(edited({"num_layers": 10**9})), "1000000000 layers, .* holds 10 tensors"),
        (json.dumps(edited({"ffn_dim": 2**52})), "lacks encoder.layers.0.ffn"),
        (
            json.dumps(edited({"num_heads": 2**50, "value_dim": 2**50, "attention_dim": 1})),
            "encoder: ",
        ),
        (json.dumps(edited({"num_heads": 2**40, "dim": 2**50})), "item_vectors is F32"),
        (json.dumps(edited({"max_history_len": 2**50})), "bias is F32"),
        (json.dumps(edited({"dim": 2**60})), "dim must be a whole number"),
    ],
)
def test_odd_settings_are_told_at_once(shared, content, told):
    as_bytes = content if isinstance(content, bytes) else content.encode()
    (shared / CONFIG).write_bytes(as_bytes)
    with pytest.raises(BundleError, match=told):
        load_bundle(shared)


ESCAPES = ["../secret", "/etc/passwd", "a\0b", "model.safetensors/../x", "..", ".", "", "x.pkl"]


@pytest.mark.fault("R27")
@pytest.mark.parametrize("name", ESCAPES)
def test_a_file_of_another_name_is_refused(shared, name):
    files = json.loads((shared / CONFIG).read_text())["files"]
    (shared.parent / "secret").write_text("secret")
    changed(shared, files={**files, name: files[WEIGHTS]})
    with pytest.raises(BundleError, match=r"files names .*, which no bundle holds"):
        load_bundle(shared)
    del files[WEIGHTS]
    changed(shared, files={**files, name: {"size": 6, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match=f"files lacks {WEIGHTS}"):
        load_bundle(shared)


@pytest.mark.fault("R27")
@pytest.mark.parametrize("name", [*READ, CONFIG])
def test_a_link_that_leaves_the_folder_is_refused(shared, name):
    outside = (shared / name).rename(shared.parent / name)
    for target in (outside, Path("..") / name):
        (shared / name).symlink_to(target)
        with pytest.raises(BundleError, match=f"{name} is a link to .*, outside the bundle"):
            load_bundle(shared)
        (shared / name).unlink()
    (shared / "folder").symlink_to(shared.parent)
    (shared / name).symlink_to(Path("folder") / name)
    with pytest.raises(BundleError, match="outside the bundle"):
        load_bundle(shared)
    (shared / name).unlink()
    outside.rename(shared / name)
    (shared.parent / "link").symlink_to(shared)  # the folder itself may be one
    load_bundle(shared.parent / "link")


@pytest.mark.fault("R27")
@pytest.mark.parametrize("name", [*READ, CONFIG])
def test_what_is_no_regular_file_is_refused_without_a_wait(shared, name):
    path = shared / name
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        load_bundle(shared)
    path.symlink_to(path.name)
    with pytest.raises(BundleError, match=f"{name} is missing"):
        load_bundle(shared)
    for target, told in (("/dev/zero", "outside the bundle"), ("/dev/stdin", "outside the bundle")):
        path.unlink()
        path.symlink_to(target)
        with pytest.raises(BundleError, match=told):
            load_bundle(shared)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match=f"{name} is no regular file"):
        load_bundle(shared)
    path.unlink()
    path.mkdir()
    with pytest.raises(BundleError, match=f"{name} is no regular file"):
        load_bundle(shared)


@pytest.mark.fault("R27")
@pytest.mark.parametrize("name", ["nowhere", "a\0b", "config.json"])
def test_what_is_no_folder_is_no_bundle(shared, name):
    with pytest.raises(BundleError, match="there is no bundle"):
        load_bundle(shared / name)


def with_header(path: Path, change) -> None:
    """A safetensors file with another header."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def entry(**values):
    """Changes the first tensor's entry."""
    return lambda header: {name: one | values for name, one in header.items()}


@pytest.mark.fault("R27")
@pytest.mark.parametrize("name", [WEIGHTS, VECTORS])
def test_headers_that_lie_and_torn_files_are_told(shared, name):
    whole = (GOLDEN / name).read_bytes()
    rows = {"item_vectors": {"dtype": "F32", "shape": [12, 4], "data_offsets": [0, 192]}}
    cases = [
        whole[:0],
        whole[:7],
        whole[:100],
        whole[:-1],
        whole + b"x",
        struct.pack("<Q", 2**63) + whole[8:],
        struct.pack("<Q", 2**30) + whole[8:],
        struct.pack("<Q", 0) + whole[8:],
        b"\0" * 1000,
    ]
    changes = [
        entry(data_offsets=[0, 2**60]),
        entry(data_offsets=[-8, 8]),
        entry(data_offsets=[8, 0]),
        entry(shape=[2**62, 4]),
        entry(shape=[-1]),
        entry(shape=[2**32, 2**32]),
        entry(dtype="F64"),
        entry(dtype="I32"),
        entry(dtype="object"),
        lambda header: {"other": next(iter(header.values()))},
        lambda header: header | rows | {"twice": rows["item_vectors"]},
        lambda header: {},
        lambda header: [1],
    ]
    for case in [*cases, *changes]:
        (shared / name).write_bytes(case if isinstance(case, bytes) else whole)
        if callable(case):
            with_header(shared / name, case)
        refreshed(shared)
        with pytest.raises(BundleError, match=f"{name}"):
            load_bundle(shared)
    (shared / name).write_bytes(whole[:-4] + struct.pack("<f", np.nan))
    refreshed(shared)
    with pytest.raises((BundleError, FloatingPointError), match="NaN"):
        load_bundle(shared)


@pytest.mark.fault("R27")
def test_damage_anywhere_is_a_sentence(shared, tries):
    """Bytes changed at random, with hashes that fit: refused, or another model of the same shape."""
    draw = random.Random(5)
    expected = load_bundle(shared).recommend(EVENTS, 3).schema
    for _ in range(300):
        name = draw.choice(READ)
        content = bytearray((GOLDEN / name).read_bytes())
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (shared / name).write_bytes(content)
        refreshed(shared)
        try:
            tries.count(load_bundle(shared).recommend(EVENTS, 3).schema == expected)
        except (BundleError, FloatingPointError):
            tries.count(True)
        shutil.copy(GOLDEN / name, shared)


@pytest.mark.fault("R27")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda ids, index: (ids[:1] * 2 + ids[2:], index), "1 ids are in more rows than one"),
        (lambda ids, index: ([None, *ids[1:]], index), "1 ids are null"),
        (lambda ids, index: (["", *ids[1:]], index), "the id of row 0 is empty"),
        (lambda ids, index: ([*range(12)], index), "its ids have the hash"),
        (
            lambda ids, index: ([*map(float, range(12))], index),
            "must be integers or strings; got double",
        ),
        (lambda ids, index: (ids[1:], index[:-1]), "it has 11 rows, config.json tells of 12"),
        (lambda ids, index: (ids, index[::-1]), "index is not 0, 1, .. 11"),
        (lambda ids, index: (ids, [0] * 12), "index is not 0, 1, .. 11"),
        (lambda ids, index: (ids, [None, *index[1:]]), "index holds no whole numbers, or nulls"),
        (lambda ids, index: (ids, [str(one) for one in index]), "index holds no whole numbers"),
    ],
)
def test_an_item_map_that_is_none_is_told(shared, change, told):
    table = pq.read_table(shared / ITEMS).to_pydict()
    ids, index = change(table["item_id"], table["index"])
    pq.write_table(pa.table({"item_id": ids, "index": index}), shared / ITEMS)
    refreshed(shared)
    with pytest.raises(BundleError, match=f"{ITEMS}: .*{told}"):
        load_bundle(shared)
    pq.write_table(pa.table({"item_id": ids}), shared / ITEMS)
    refreshed(shared)
    with pytest.raises(BundleError, match=f"{ITEMS}: it (lacks the column index|has 11 rows)"):
        load_bundle(shared)


def shared_run(folder: Path, config: str) -> Path:
    """A run folder as someone sent it, with files that are there, and such a config.yaml."""
    step = folder / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    for name in ("result.json", "items.parquet", "checkpoints/best"):
        (folder / name).touch()
    return step


@pytest.mark.fault("R26", "R28")
@pytest.mark.parametrize("reader", ["evaluate", "export", "warm start"])
@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [{path}]",
        "!!python/object/new:os.mkdir [{path}]",
        "!!python/name:os.mkdir {path}",
        "${{oc.env:HOME}}",
        "__import__('os').mkdir('{path}')",
    ],
)
def test_settings_of_a_shared_run_are_read_and_not_executed(tmp_path, canary, reader, value):
    folder = tmp_path / "run"
    text = value.format(path=canary.path)
    shared_run(folder, f"encoder:\n  dim: {text}\n")
    readers = {
        "evaluate": lambda: evaluate_run(folder, []),
        "export": lambda: open_run(folder),
        "warm start": lambda: former_run(str(folder)),
    }
    with pytest.raises(ValueError, match=r"config.yaml"):
        readers[reader]()
    assert not canary.path.exists()


@pytest.mark.fault("R27")
@pytest.mark.parametrize(
    "named", ["../../x", "/etc", "step_00000001/../../x", "step_00000001\n../x", ".", "", "a\0b"]
)
def test_a_pointer_names_a_step_folder_beside_it_and_nothing_else(tmp_path, named):
    step = shared_run(tmp_path / "run", "name: x\n")
    (tmp_path / "x").mkdir()
    (step.parent / "best").write_text(named)
    with pytest.raises(CheckpointError, match="which is no step folder"):
        checkpoint.resolve(step.parent, "best")
    (step.parent / "best").write_text("step_00000001\n")
    assert checkpoint.resolve(step.parent, "best") == step
