"""The shape of the package, held: imports point down, few readers of the environment, small functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hstu_rec"

# Highest first; a module imports only from layers below its own. benchmarks, ranker, data and ops are
# packages of modules that may import each other without a cycle. Lazy names of hstu_rec/__init__.py are no
# imports.
LAYERS = [
    {"benchmarks", "recommender", "ranker"},
    {"trainer", "quality"},
    {"running"},
    {"starts", "results"},
    {"training"},
    {"recommending", "web"},
    {"runs", "warm_start", "planning", "resuming", "export", "answers"},
    {"approximate"},
    {"learner"},
    {"any_learner"},
    {"pipeline"},
    {"graphs", "memory", "optimizers", "prepared"},
    {"config", "comparison", "run_folder"},
    {"report", "baselines", "top_lists", "run_config"},
    {"evaluator", "serving", "asked", "program"},
    {"bundle"},
    {"model", "hstu", "co_occurrence", "flops", "negatives"},
    {"encoder", "loss", "item_table", "seen"},
    {"layer"},
    {"encoder_config"},
    {"ranking", "metrics", "item_index"},
    {"softmax", "scores"},
    {"quantised"},
    {"failures"},
    {"data", "ops"},
    {"checkpoint", "tracking", "guards", "lock", "drawing"},
    {"hosts", "portions", "trackers"},
    {"distributed", "versions", "settings", "transfer", "durable"},
    {"meeting", "signals"},
]
TORCHREC_USERS = {"item_table.py"}
ENVIRONMENT_READERS = {"distributed.py"}

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 7
# The front doors of an operator, and of the whole, take what they are given one by one, by name.
MANY_ARGUMENTS = {"ops", "recommender"}

SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "apps").glob("*.py"), *(ROOT / ".torchx").glob("*.py")])
SCRIPTS += sorted([*(ROOT / "requirements").glob("*.py"), *(ROOT / "docs").glob("*.py")])
ALL = SOURCES + SCRIPTS


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each_file(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name_of)


def part_of(path: Path) -> str:
    """The layer member a source belongs to: its module, or its folder."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of everything that `path` imports, also inside functions and for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_parts(path: Path) -> set[str]:
    """The members of LAYERS that `path` imports."""
    names = [name.split(".") for name in imported_modules(path)]
    return {parts[1] for parts in names if parts[0] == "hstu_rec" and len(parts) > 1}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def layer_of(part: str) -> int:
    found = [index for index, members in enumerate(LAYERS) if part in members]
    assert len(found) == 1, f"'{part}' has no place in LAYERS"
    return found[0]


@each_file([path for path in SOURCES if path != PACKAGE / "__init__.py"])
def test_imports_point_strictly_down(path: Path) -> None:
    own = part_of(path)
    above = {
        part for part in imported_parts(path) if part != own and not layer_of(part) > layer_of(own)
    }
    assert not above, f"{name_of(path)} imports {above}, which is not below it"


@pytest.mark.parametrize("package", ["benchmarks", "data", "ops", "ranker"])
def test_the_modules_of_a_package_import_each_other_without_a_cycle(package: str) -> None:
    sources = {path.stem: path for path in (PACKAGE / package).glob("*.py")}
    waiting: dict[str, set[str]] = {}
    for name, path in sources.items():
        parts = [one.split(".") for one in imported_modules(path)]
        inside = {one[2] for one in parts if one[:2] == ["hstu_rec", package] and len(one) > 2}
        waiting[name] = {one if one in sources else "__init__" for one in inside}
    while free := [name for name, wanted in waiting.items() if not wanted & set(waiting)]:
        for name in free:
            del waiting[name]
    assert not waiting, f"hstu_rec/{package} has a cycle among {sorted(waiting)}"


@each_file(ALL)
def test_torchrec_is_imported_in_few_places(path: Path) -> None:
    users = {name.split(".")[0] for name in imported_modules(path)} & {"torchrec", "fbgemm_gpu"}
    if users:
        assert path.relative_to(PACKAGE).as_posix() in TORCHREC_USERS


@each_file(ALL)
def test_the_environment_is_read_in_one_module(path: Path) -> None:
    reads = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"))
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and "env" in ast.unparse(node))
    ]
    if reads:
        assert path.name in ENVIRONMENT_READERS, f"{name_of(path)} reads it in lines {reads}"


@each_file([*ALL, *sorted((ROOT / "tests").rglob("*.py"))])
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


@each_file([*ALL, *sorted((ROOT / "tests").rglob("*.py"))])
def test_functions_are_short(path: Path) -> None:
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in functions(path)
        if node.end_lineno is not None and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert not long


@each_file(ALL)
def test_functions_take_few_arguments(path: Path) -> None:
    many = {}
    for node in functions(path):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [one.arg for one in given if one.arg not in ("self", "cls", "ctx")]
        if len(names) > MAX_ARGUMENTS:
            many[node.name] = len(names)
    if path.is_relative_to(PACKAGE) and part_of(path) in MANY_ARGUMENTS:
        many = {}
    assert not many


# Modules that run what they read, and functions of others that do. dist.all_gather_object pickles too, but
# what the processes of one run send each other; nothing of it comes from a file.
UNSAFE_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
}
UNSAFE_CALLS = {"eval", "exec", "__import__", "yaml.load", "yaml.load_all", "yaml.unsafe_load"}
UNSAFE_CALLS |= {
    "yaml.full_load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
}
# DCP's own reader unpickles its `.metadata`.
UNSAFE_ENDS = {"read_pickle", "unsafe_load", "unsafe_load_all", "FileSystemReader"}
SAFE_VALUES = {"weights_only": "True", "allow_pickle": "False"}


def unsafe_parts(source: str) -> Iterator[str]:
    """What in a source may run code of what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            is_unsafe = bool(UNSAFE_MODULES & {name.split(".")[0] for name in names})
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {one.arg: ast.unparse(one.value) for one in node.keywords}
            is_unsafe = called in UNSAFE_CALLS or called.split(".")[-1] in UNSAFE_ENDS
            is_unsafe |= any(given.get(name, safe) != safe for name, safe in SAFE_VALUES.items())
            # Where numpy's default is the safe one; its third argument is allow_pickle.
            is_unsafe |= called == "torch.load" and "weights_only" not in given
            is_unsafe |= called in ("np.load", "numpy.load") and len(node.args) > 2
        else:
            continue
        if is_unsafe:
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.fault("R26")
@each_file(ALL)
def test_nothing_is_unpickled_or_executed(path: Path) -> None:
    assert not [*unsafe_parts(path.read_text())]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "from torch.utils import data, dill",
        "import pickle as numbers",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, None, True)",
        "yaml.load(text, Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "x = exec(text)",
        "frame = pandas.read_pickle(path)",
        "reader = filesystem.FileSystemReader(path)",
    ],
)
def test_what_would_execute_a_file_is_found(source: str) -> None:
    assert [*unsafe_parts(source)]


def test_what_is_safe_is_let_through() -> None:
    safe = ["model.eval()", "np.load(path)", "np.load(path, mmap_mode='r')", "json.load(file)"]
    assert not [*unsafe_parts("\n".join([*safe, "torch.load(path, weights_only=True)"]))]


@each_file(ALL)
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: except without a class"
            assert not all(isinstance(one, ast.Pass) for one in node.body), f"line {node.lineno}"


@each_file([path for path in SOURCES if path.stat().st_size])
def test_everything_public_is_typed_and_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, f"{node.name} has no return type"
            untyped = [one.arg for one in node.args.args if one.annotation is None]
            assert not untyped, f"{node.name}: {untyped} have no type"


def test_every_script_of_apps_is_small() -> None:
    for path in (ROOT / "apps").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60
