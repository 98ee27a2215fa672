"""RunConfig: sections owned by the modules they configure, read from YAML files and key=value overrides.

    defaults  <-  configs/beauty.yaml (differences only)  <-  optim.lr=1e-3

A YAML file may begin with `base: OTHER.yaml`, a file beside it whose settings come before its own.
All problems are told at once.
"""

import ast
import inspect
import io
import itertools
import os.path
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hstu_rec import failures
from hstu_rec.data.stream import DataConfig
from hstu_rec.data.synthetic import SYNTHETIC
from hstu_rec.distributed import Precision
from hstu_rec.durable import write_file
from hstu_rec.evaluator import EvalConfig
from hstu_rec.item_table import TableConfig
from hstu_rec.loss import LossConfig
from hstu_rec.run_config import AnyRunConfig, AnyTrainConfig
from hstu_rec.settings import (
    as_typed,
    choices_of,
    described,
    did_you_mean,
    hints_of,
    listed,
    members_of,
    shown,
    unknown_key,
)

T = TypeVar("T")
BASE_KEY = "base"
# A configuration is a page of text: YAML beyond this is refused before a parser meets it, which
# recurses in C and would end the process.
MAX_YAML_BYTES, MAX_YAML_DEPTH = 2**20, 32
MAX_PROBLEMS = 20
# Results are given by these parts, each with these metrics.
PARTS = ("seen_masked", "seen_allowed")
SELECTED = re.compile(rf"({'|'.join(PARTS)})/(mrr|(recall|ndcg)@([1-9][0-9]*))")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(AnyTrainConfig):
    """How long a run trains and what it keeps."""

    max_epochs: int = 60
    eval_every_epochs: int = 2
    patience: int = 5
    select: str = "seen_allowed/ndcg@10"
    """Validation metric that chooses the model."""
    precision: Precision = "float32"
    """Of the dense part's products: float32, tf32 (on CUDA) or bfloat16 (the encoder and, on
    Hopper, the fused loss; tf32 for the rest).
    Parameters, item rows and evaluation's scores are float32."""
    cuda_graphs: bool = False
    """Replays the dense part of a step as a CUDA graph, for small models, which wait for the host; one
    process. A graph is captured for each size of batch: the first steps are slow."""
    compile: bool = False
    """torch.compile of the layers but for attention, for wide models; the first step takes a minute."""
    recompute: bool = False
    """Keeps a layer's input alone and makes the rest again in backward: less memory, a longer step."""
    warm_start: str = ""
    """Run whose best checkpoint, or `RUN/checkpoints/step_<number>`, that this run begins as, with another
    catalogue: items of the same own id keep their rows; for the others see table.new_rows."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = super().problems()
        if self.warm_start:
            found += self._warm_start_problems()
        for name in ("compile", "recompute"):
            if self.cuda_graphs and getattr(self, name):
                found.append(
                    f"cuda_graphs is for small models, {name} for large ones; set one of them to false"
                )
        return found

    def _warm_start_problems(self) -> Iterator[str]:
        own = Path(self.run_dir) if self.run_dir else None
        if own is not None and Path(self.warm_start).is_relative_to(own):
            yield (
                f"warm_start must be another run than train.run_dir; got {self.warm_start} and "
                f"{self.run_dir}"
            )
        is_own = own is not None and Path(self.resume).is_relative_to(own)
        if self.resume not in ("none", "auto") and not is_own:
            yield (
                f"warm_start {self.warm_start} and resume {self.resume} are two beginnings; give one of them"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig(AnyRunConfig):
    """Everything a run depends on."""

    name: str = "demo"
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def validation(self) -> EvalConfig:
        """How validations measure: as `eval`, and at the cut-off of train.select."""
        found = SELECTED.fullmatch(self.train.select)
        assert found is not None  # or `problems` would have told
        chosen = [int(found[4])] if found[4] else []
        return replace(self.eval, ks=sorted({*self.eval.ks, *chosen}))

    def problems(self) -> list[str]:
        """Problems between sections."""
        found = super().problems()
        if not SELECTED.fullmatch(self.train.select):
            metrics = [f"{part}/{one}" for part in PARTS for one in ("recall@10", "ndcg@10", "mrr")]
            near = did_you_mean(self.train.select, metrics)
            found.append(
                "train.select must be seen_masked or seen_allowed, and mrr, recall@k or ndcg@k, such as "
                f"{', '.join(metrics)}; got '{self.train.select}'{near}"
            )
        if self.train.warm_start and self.data.path == SYNTHETIC:
            found.append(f"train.warm_start needs items with own ids, not data.path={SYNTHETIC}")
        if self.table.new_rows != TableConfig().new_rows and not self.train.warm_start:
            found.append("table.new_rows has no effect without train.warm_start; set one of them")
        if 0 < self.data.batch_events < self.encoder.max_history_len:
            found.append(
                "data.batch_events must hold the longest history, encoder.max_history_len = "
                f"{self.encoder.max_history_len}; got {self.data.batch_events}"
            )
        return found


def load(schema: type[T], arguments: Sequence[str]) -> T:
    """A `schema` (every field has a default) from YAML paths and key=value overrides, the later winning.

    An override of a text field is taken as it stands; all others are read as YAML (1e-3 is a number).
    Raises ValueError with every problem, FileNotFoundError for a YAML file that is not there.
    """
    config = OmegaConf.structured(schema)
    _unfreeze(config)
    hints = hints_of(schema)
    problems: list[str] = []
    for source, key, value in _settings(arguments, hints, problems):
        if key not in hints:
            problems.append(f"{source}: {unknown_key(key, list(hints))}")
            continue
        if "${" in str(value) or value == "???" or (isinstance(value, list) and "???" in value):
            # OmegaConf would read other keys and the environment, secrets included, into the report.
            problems.append(
                f"{source}: {key} must be a plain value, no ${{reference}} or ???; got {shown(value)}"
            )
            continue
        try:
            OmegaConf.update(config, key, as_typed(hints[key], value))
        except (OmegaConfBaseException, ValueError) as error:
            near = did_you_mean(str(value), [str(one) for one in choices_of(hints[key])])
            why = f", {error}" if str(error).startswith("which") else ""
            problems.append(
                f"{source}: {key} must be {described(hints[key])}; got {shown(value)}{why}{near}"
            )
    loaded = OmegaConf.to_object(config)
    problems += _value_problems(loaded, "")
    if problems:
        left = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        told = "\n  ".join(problems[:MAX_PROBLEMS] + left)
        raise ValueError(f"the configuration has problems:\n  {told}")
    return cast(T, loaded)


def save(config: Any, path: Path) -> None:
    """Writes every value of `config`, in one move, as YAML that `load` reads back equal."""
    write_file(path, to_yaml(config).encode())


def to_yaml(config: Any) -> str:
    """Every value of `config` as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(config)))


def leaves(config: Any) -> dict[str, Any]:
    """Dotted key and value, of what YAML has itself, of every setting of `config`."""
    return dict(_flat(_plain(config), "", {}))


def help_text(schema: type, allowed: str = ".*") -> str:
    """Every key of `schema` that matches the pattern `allowed`, with its default, its choices or else its
    type in words, and its doc."""
    lines, hints = [], hints_of(schema)
    for key, value, doc in _documented(schema(), ""):
        if re.fullmatch(allowed, key):
            choices = choices_of(hints[key])
            # In a shell text needs no quotes.
            kind = listed(choices) or described(hints[key]).replace("text, in quotes", "text")
            lines.append(f"  {key}={shown(value)}  ({kind})")
            lines += [f"      {doc}"] if doc else []
    return "\n".join(lines)


def differences(config: Any) -> str:
    """The settings of `config` that are not the defaults, as one writes them, with spaces between."""
    defaults = leaves(type(config)())
    changed = {key: value for key, value in leaves(config).items() if value != defaults[key]}
    return " ".join(f"{key}={shown(value)}" for key, value in changed.items())


def run_app(main: Callable[[list[str]], None]) -> None:
    """Runs an app's `main(arguments)`; see failures for how it ends when it fails."""
    failures.show_crashes()
    try:
        main([a for a in sys.argv[1:] if a != "--"])
    except Exception as error:
        failures.end(error)
        raise
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)


def _unfreeze(node: DictConfig) -> None:
    """Lets settings be written: OmegaConf marks every frozen dataclass as read-only by itself."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        if not OmegaConf.is_missing(node, name) and isinstance(node[name], DictConfig):
            _unfreeze(node[name])


def _settings(
    arguments: Sequence[str], hints: dict[str, Any], problems: list[str]
) -> Iterator[tuple[str, str, Any]]:
    """(where it stands, dotted key, value) of every setting, in order; what is no YAML is a problem."""
    for argument in arguments:
        setting = argument.removeprefix("--")
        if not setting:
            continue
        is_file = os.path.isfile(argument)  # False too for a text that can be no path
        if not is_file and "=" not in setting:
            raise FileNotFoundError(
                f"'{argument[:200]}' is neither a key=value setting nor a YAML file that exists"
            )
        try:
            if is_file:
                for source, content in _with_bases(Path(argument)):
                    for key, value in _flat(content, "", hints):
                        yield str(source), key, value
            else:
                key, text = setting.split("=", 1)
                yield f"'{argument}'", key, _parsed(text, hints.get(key))
        except yaml.YAMLError as error:
            told = " ".join(str(error).split())
            problems.append(
                f"{argument[:200]}: {told}; give plain YAML, indented by spaces, a key once"
            )
        except UnicodeDecodeError as error:
            problems.append(f"{argument}: it is not UTF-8 text ({error}); write it as UTF-8")
        except (OmegaConfBaseException, ValueError, OSError) as error:
            problems.append(f"{argument[:200]}: {' '.join(str(error).split())}")


def _with_bases(path: Path) -> list[tuple[Path, dict[Any, Any]]]:
    """The settings of a YAML file, after those of the files it is based on."""
    found: list[tuple[Path, dict[Any, Any]]] = []
    # Resolved, because ../ in a base gives one file many names.
    while path.resolve() not in [one.resolve() for one, _ in found]:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ValueError(f"{path.name} is larger than 1 MiB, too large for a configuration")
        content = _yaml(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, DictConfig):
            raise ValueError("it holds no mapping of settings")
        settings = cast(dict[Any, Any], OmegaConf.to_container(content))
        base = settings.pop(BASE_KEY, None)
        found.append((path, settings))
        if base is None:
            return found[::-1]
        path = path.parent / str(base)
        if not path.is_file():
            raise ValueError(f"its base {path} does not exist; give a file beside it")
    raise ValueError(f"it is based on itself, by way of {path}")


def _parsed(text: str, hint: Any) -> Any:
    """The value of an override: the text itself where text is wanted, else what YAML reads in it."""
    kinds = {type(one) for one in choices_of(hint)} or set(members_of(hint))
    if kinds & {str, Path} and not (text == "null" and type(None) in members_of(hint)):
        return text
    return OmegaConf.to_container(_yaml(f"value: {text}"))["value"]  # pyright: ignore


def _yaml(text: str) -> Any:
    """What OmegaConf makes of `text`, read by a safe loader. Raises ValueError for deep nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_YAML_DEPTH} levels")
    return OmegaConf.load(io.StringIO(text))


def _flat(node: Any, prefix: str, hints: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the leaves; a section without content sets nothing."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _flat(value, f"{prefix}{name}.", hints)
    elif node is not None or not any(key.startswith(prefix) for key in hints):
        yield prefix[:-1], node


def _plain(value: Any) -> Any:
    """`value` of dicts, lists and what YAML has itself."""
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _value_problems(section: Any, prefix: str) -> Iterator[str]:
    """The sentences of `section` and the sections in it."""
    for one in fields(section):
        value = getattr(section, one.name)
        if is_dataclass(value):
            yield from _value_problems(value, f"{prefix}{one.name}.")
    if hasattr(section, "problems"):
        yield from (prefix + sentence for sentence in section.problems())


def _documented(section: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """(key, value, doc) of every leaf; the doc is the string below the field."""
    docs = {}
    for kind in reversed([one for one in type(section).__mro__ if is_dataclass(one)]):
        source = textwrap.dedent(inspect.getsource(kind))
        body = cast(ast.ClassDef, ast.parse(source).body[0]).body
        for line, after in itertools.pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr):
                docs[ast.unparse(line.target)] = ast.literal_eval(after.value)
    for one in fields(section):
        value = getattr(section, one.name)
        if is_dataclass(value):
            yield from _documented(value, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, value, " ".join(docs.get(one.name, "").split())
