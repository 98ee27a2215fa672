"""RunConfig: sections owned by the modules they configure, read from YAML files and key=value overrides.

    defaults  <-  configs/beauty.yaml (differences only)  <-  optim.lr=1e-3

All problems are told at once.
"""

import ast
import difflib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hstu_rec.data.stream import DataConfig
from hstu_rec.distributed import DeviceChoice
from hstu_rec.encoder import EncoderConfig
from hstu_rec.evaluator import EvalConfig
from hstu_rec.item_table import TableConfig
from hstu_rec.loss import LossConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW on the dense parameters; the item table has its own optimizer (table.*)."""

    lr: float = 1e-3
    """Learning rate of the dense parameters; the table's rate follows the same schedule."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    clip_norm: float = 1.0
    """Largest norm of the dense gradient; 0 for no clipping."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the rates from the end of warm-up to the last step of train.max_epochs."""
    final_lr_fraction: float = 0.0
    """Rate at the last step, as a fraction of lr."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = []
        if not self.lr > 0:
            found.append(f"lr must be above 0; got {self.lr}")
        for name in ("weight_decay", "clip_norm", "warmup_steps"):
            if getattr(self, name) < 0:
                found.append(f"{name} must be at least 0; got {getattr(self, name)}")
        for name in ("beta1", "beta2", "final_lr_fraction"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name} must be in [0, 1); got {getattr(self, name)}")
        return found


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long a run trains and what it keeps."""

    max_epochs: int = 60
    """Epochs, at most."""
    eval_every_epochs: int = 2
    """Epochs between validations."""
    patience: int = 5
    """Validations without a better result before training stops; 0 trains all epochs."""
    select: str = "seen_allowed/ndcg@10"
    """Validation metric that chooses the model."""
    seed: int = 1
    """Seed of weights, batches, negatives and dropout."""
    device: DeviceChoice = "auto"
    """auto takes CUDA when present."""
    resume: str = "none"
    """none, auto (newest complete checkpoint of train.run_dir), or a checkpoint folder."""
    run_dir: str = ""
    """Folder of the run; runs/<time>-<name> when empty."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, besides the best."""
    log_every_steps: int = 50
    """Steps between rows of metrics.jsonl."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = [
            f"{name} must be at least 1; got {getattr(self, name)}"
            for name in ("max_epochs", "eval_every_epochs", "keep_checkpoints", "log_every_steps")
            if getattr(self, name) < 1
        ]
        if self.patience < 0:
            found.append(f"patience must be at least 0; got {self.patience}")
        if self.resume == "auto" and not self.run_dir:
            found.append("resume 'auto' needs train.run_dir, the folder of the run to go on with")
        return found


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on."""

    name: str = "demo"
    """Name of the run, the end of its folder's name."""
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    table: TableConfig = field(default_factory=TableConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def problems(self) -> list[str]:
        """Problems between sections."""
        allowed = [
            f"{part}/{metric}"
            for part in ("seen_allowed", "seen_masked")
            for metric in [*(f"{m}@{k}" for m in ("recall", "ndcg") for k in self.eval.ks), "mrr"]
        ]
        if self.train.select in allowed:
            return []
        near = difflib.get_close_matches(self.train.select, allowed, 1)
        return [
            f"train.select must be one of {', '.join(allowed)}; got '{self.train.select}'"
            + (f"; did you mean '{near[0]}'?" if near else "")
        ]


def load(schema: type[T], arguments: Sequence[str]) -> T:
    """A `schema` from YAML paths and key=value overrides, the later ones winning.

    Raises ValueError with every problem, FileNotFoundError for a YAML file that is not there.
    """
    config = OmegaConf.structured(schema)
    _unfreeze(config)
    problems: list[str] = []
    for source, key, value in _settings(arguments):
        try:
            if key not in _keys(schema):
                raise KeyError(key)
            OmegaConf.update(config, key, value)
        except KeyError:
            near = difflib.get_close_matches(key, _keys(schema), 1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"{source}: unknown key '{key}'{hint}")
        except OmegaConfBaseException as error:
            problems.append(f"{source}: {key}: {str(error.msg).splitlines()[0]}")
    if not problems:
        loaded = OmegaConf.to_object(config)
        problems = list(_value_problems(loaded, ""))
        if not problems:
            return cast(T, loaded)
    raise ValueError("the configuration has problems:\n  " + "\n  ".join(problems))


def save(config: Any, path: Path) -> None:
    """Writes every value of `config` as YAML that `load` reads back equal."""
    path.write_text(to_yaml(config))


def to_yaml(config: Any) -> str:
    """Every value of `config` as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def help_text(schema: type) -> str:
    """Every key of `schema` with its default and doc."""
    defaults = schema()
    return "\n".join(
        f"  {key}={value}\n      {doc}" for key, value, doc in _documented(defaults, "")
    )


def run_app(main: Callable[[list[str]], None]) -> None:
    """Runs an app's `main(arguments)`: a user's mistake is a sentence and exit code 2."""
    try:
        main([a for a in sys.argv[1:] if a != "--"])
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _unfreeze(node: DictConfig) -> None:
    """Lets settings be written: OmegaConf marks every frozen dataclass as read-only by itself."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        if isinstance(node[name], DictConfig):
            _unfreeze(node[name])


def _settings(arguments: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """(where it stands, dotted key, value) of every setting, in order."""
    for argument in arguments:
        if argument == "--":
            continue
        if "=" in argument:
            key, text = argument.split("=", 1)
            value = OmegaConf.create(f"value: {text}" if text else "value: ''")["value"]
            yield f"'{argument}'", key, value
            continue
        if not Path(argument).is_file():
            raise FileNotFoundError(
                f"'{argument}' is neither a key=value setting nor a YAML file that exists"
            )
        content = OmegaConf.load(argument)
        if not isinstance(content, DictConfig):
            raise ValueError(f"{argument} holds no mapping of settings")
        for key, value in _flat(OmegaConf.to_container(content), ""):
            yield argument, key, value


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _flat(value, f"{prefix}{name}.")
    else:
        yield prefix[:-1], node


def _keys(schema: type) -> list[str]:
    """Dotted keys of all leaves."""
    hints = get_type_hints(schema)
    found = []
    for one in fields(cast(Any, schema)):
        kind = hints[one.name]
        found += [f"{one.name}.{k}" for k in _keys(kind)] if is_dataclass(kind) else [one.name]
    return found


def _value_problems(section: Any, prefix: str) -> Iterator[str]:
    for one in fields(section):
        value = getattr(section, one.name)
        if is_dataclass(value):
            yield from _value_problems(value, f"{prefix}{one.name}.")
    if hasattr(section, "problems"):
        yield from (prefix + sentence for sentence in section.problems())


def _documented(section: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """(key, value, doc) of every leaf; the doc is the string below the field."""
    body = cast(ast.ClassDef, ast.parse(inspect.getsource(type(section))).body[0]).body
    docs = {}
    for above, below in itertools.pairwise(body):
        if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr):
            docs[ast.unparse(above.target)] = ast.literal_eval(below.value)
    for one in fields(section):
        value = getattr(section, one.name)
        if is_dataclass(value):
            yield from _documented(value, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, value, " ".join(docs.get(one.name, "").split())
