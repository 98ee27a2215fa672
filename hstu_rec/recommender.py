"""Recommender: a table of events in, recommendations in the same ids out.

fit(events)  --> RUN/data, a dataset folder  --> RUN, as apps/train.py leaves it  --> ServingModel
recommend, similar_items, evaluate                                                <-- ServingModel
save(folder), load(folder)                   a bundle (hstu_rec.bundle)
"""

import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from hstu_rec import distributed, hosts
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.histories import OnUnknown, rows_of
from hstu_rec.data.own_ids import IdIndex, typed_ids
from hstu_rec.data.tables import (
    Columns,
    TableKind,
    arrow_of,
    as_kind,
    kind_of_table,
    names_of,
    opened,
)
from hstu_rec.export import ExportConfig, export, serve_run
from hstu_rec.prepared import events_of, prepare_in, read_events
from hstu_rec.serving import ServingModel, load_bundle
from hstu_rec.settings import assignments
from hstu_rec.signals import INTERRUPTED_CODE, Stopped
from hstu_rec.trainer import train

T = TypeVar("T")

# Of catalogues up to this size every item is a negative at every step.
MAX_EXACT_ITEMS = 100_000
# What else the recipe of small catalogues (configs/small.yaml) sets, and that of others.
ALWAYS = {
    "encoder.final_norm": "layer",
    "encoder.use_time_bias": False,
    "encoder.calendar": "month",
    "loss.temperature": 0.08,
    "loss.use_seen_bias": True,
    "train.eval_every_epochs": 3,
    "train.select": "seen_masked/ndcg@10",
    "eval.with_baselines": False,
    "name": "recommender",
}
EXACT = {"loss.negatives": "all", "table.init": "co_occurrence"}
SAMPLED = {"loss.negatives": "mixed", "loss.num_negatives": 8192}
# What `fit` itself sets.
OWN = {"data.path", "train.run_dir", "train.resume"}


class Recommender:
    """Sequential recommendations from a table of events.

        model = Recommender().fit(events)            # user_id | item_id | timestamp
        model.recommend(events, k=10)                # user_id | rank | item_id | score

    Its defaults are the recipe that the figures of small catalogues in docs/measured.md are of; up to
    100,000 items every item is a negative, beyond that 8192 that are drawn. In a job of several processes
    (torchrun, torchx) every process calls the same, `fit` shards the table over them, and afterwards each
    holds the whole model.

    Args:
        dim: width of item vectors and encoder. num_layers, num_heads: of the encoder.
        max_history_len: newest events of a user that the encoder looks at.
        dropout: share of what the encoder drops while it learns.
        num_negatives: items drawn as negatives at a step; None for all of a small catalogue.
        lr: learning rate of the encoder. batch_users: users of a step, over all processes.
        max_epochs: epochs, at most. patience: validations (every 3 epochs) without a better NDCG@10 before
            it ends; 0 for none.
        seed: of weights, batches, negatives and dropout.
        device: "cpu", "cuda", or "auto", which takes CUDA when it is there.
        settings: any other setting of hstu_rec.RunConfig by its dotted key, such as
            {"encoder.use_time_bias": True}; these come last. `python apps/train.py help` lists them.

    Raises ValueError for values that no model has.
    """

    def __init__(
        self,
        *,
        dim: int = 128,
        num_layers: int = 2,
        num_heads: int = 2,
        max_history_len: int = 50,
        dropout: float = 0.5,
        num_negatives: int | None = None,
        lr: float = 1e-3,
        batch_users: int = 256,
        max_epochs: int = 60,
        patience: int = 4,
        seed: int = 1,
        device: str = "auto",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._given = {
            "encoder.dim": dim,
            "encoder.ffn_dim": 4 * dim,
            "encoder.num_layers": num_layers,
            "encoder.num_heads": num_heads,
            "encoder.max_history_len": max_history_len,
            "encoder.dropout": dropout,
            "optim.lr": lr,
            "data.batch_users": batch_users,
            "train.max_epochs": max_epochs,
            "train.patience": patience,
            "train.seed": seed,
            "train.device": device,
        }
        if num_negatives is not None:
            self._given |= SAMPLED | {"loss.num_negatives": num_negatives}
        self._settings = dict(settings or {})
        if own := OWN & self._settings.keys():
            raise ValueError(f"settings: {', '.join(sorted(own))} are of fit(events, folder=...)")
        self._config()
        self.columns = Columns()
        self._model: ServingModel | None = None
        self._dataset: Dataset | None = None
        self._users: IdIndex | None = None
        self._result: dict[str, Any] | None = None
        # A run or a bundle.
        self._source: Path | None = None
        self._removed: Callable[[], Any] | None = None
        self._kind: TableKind = "arrow"

    def fit(
        self,
        events: Any,
        *,
        user_column: str = "user_id",
        item_column: str = "item_id",
        time_column: str = "timestamp",
        folder: str | Path | None = None,
        prepare_settings: Mapping[str, Any] | None = None,
    ) -> "Recommender":
        """Learns from `events` and returns itself. Collective.

        Each user's last event is kept for the test, and the one before it for validation, which ends
        training and chooses the model; `result` holds what it reached. Users of fewer than 3 events are not
        tested on, and known like all others.

        Args:
            events: a DataFrame of pandas or polars, an Arrow table, columns by name, or a path, folder or
                glob of files (parquet, csv, json lines). Ids are integers or strings. In a job of several
                processes those of process 0 count.
            user_column, item_column, time_column: what the columns are called, here and in answers.
            folder: to keep the events as prepared (`data`), and the run, its report and checkpoints (`run`).
                A fit that was stopped goes on when it is called again with the same. Without it everything
                is removed with this object; several hosts need one that all of them see.
            prepare_settings: other settings of `apps/prepare.py`, such as {"min_item_events": 5} or
                {"time_unit": "ms"}.

        Raises ValueError with what is wrong with the table or the settings, where, and what to do.
        """
        columns = _columns(user_column, item_column, time_column)
        with distributed.process_group(self._config().train.device), ExitStack() as made:
            root = hosts.on_main(
                lambda: Path(made.enter_context(_temporary()) if folder is None else folder)
            )
            data, run = root / "data", root / "run"
            hosts.on_main(lambda: prepare_in(root, events, columns, prepare_settings or {}))
            result = self._trained(self._config(data, run), folder)
            hosts.together(lambda: self._take(_served(run), columns, Dataset(data)))
            self._result, self._source, self._kind = result, run, kind_of_table(events)
            # A folder that nobody named lives as long as the model that it is of.
            if self._removed is not None:
                self._removed()
            self._removed = weakref.finalize(self, made.pop_all().close)
        return self

    def _trained(self, config: RunConfig, folder: str | Path | None) -> dict[str, Any]:
        """What train(config) gives; what it says in words of the apps is said in those of `fit`."""
        try:
            result = train(config)
        except Stopped as stopped:
            kept = f"call it again with folder={str(folder)!r} to go on from there"
            told = f"fit was stopped; {kept if folder else 'nothing is kept without folder='}"
            if stopped.exit_code == INTERRUPTED_CODE:
                raise KeyboardInterrupt(told) from stopped
            stopped.args = (told,)
            raise
        except ValueError as error:
            named = sorted(set(re.findall(r"\btrain\.\w+(?==)", str(error))) - OWN)
            if named:
                settings = ", ".join(f"{one!r}: ..." for one in named)
                error.args = (f"{error} (here: Recommender(settings={{{settings}}}))",)
            raise
        if not folder and distributed.is_main():
            print("it is removed with the model; fit(folder=...) keeps it", flush=True)
        return result

    @property
    def result(self) -> dict[str, Any]:
        """What result.json of the run holds. Raises ValueError before `fit`."""
        return self._fitted(self._result)

    def recommend(
        self,
        histories: Any,
        k: int = 10,
        *,
        filter_seen: bool = True,
        candidates: Sequence[Any] | pa.Array | None = None,
        on_unknown: OnUnknown = "warn",
        at: int | Mapping[Any, int] | None = None,
    ) -> Any:
        """The k best items of every user: user id | rank (from 1) | item id | score, best first, as a table
        of the kind that was given.

        Args:
            histories: a table of the columns of `fit`, of any users, those that training never saw included;
                files as for `fit`, whose users are answered in the order of their ids; or a list or array of
                ids of users of `fit`, whose events of then are their histories.
            k: rows of a user; fewer where fewer items are left.
            filter_seen: leaves out items of the user's history.
            candidates: ids of the items that may be recommended; all when None.
            on_unknown: what becomes of unknown items and users: left out with a warning (warn) or without
                (ignore), or ValueError (raise).
            at: unix seconds for which is recommended, for models with encoder.query_time "next" alone.
        """
        answer = self.model.recommend(
            self._events_of(histories, on_unknown),
            k,
            filter_seen=filter_seen,
            candidates=candidates,
            on_unknown=on_unknown,
            at=at,
        )
        names = [self.columns.user, "rank", self.columns.item, "score"]
        return as_kind(answer.rename_columns(names), self._kind_for(histories))

    def similar_items(
        self, item_ids: Sequence[Any] | pa.Array, k: int = 10, *, on_unknown: OnUnknown = "warn"
    ) -> Any:
        """The k items whose vectors have the highest cosine with those of each of `item_ids`: item id | rank
        | `similar_<item id>` | score."""
        answer = self.model.similar_items(item_ids, k, on_unknown=on_unknown)
        names = [self.columns.item, "rank", f"similar_{self.columns.item}", "score"]
        return as_kind(answer.rename_columns(names), self._kind)

    def evaluate(
        self,
        events: Any = None,
        ks: Sequence[int] = (1, 5, 10, 20, 50),
        *,
        on_unknown: OnUnknown = "warn",
    ) -> dict[str, Any]:
        """{"num_users", "seen_masked": {"recall@10", ...}, "seen_allowed"}: how well the last event of every
        user of `events` (a table or path, as for `recommend`) is told from those before it. Without events
        what was measured on the test events when the model was trained, at the cut-offs of then, without
        `num_users`.
        """
        if events is None:
            test = self.model.config.about["metrics"]["test"]
            return {name: test[name] for name in ("seen_masked", "seen_allowed")}
        return self.model.evaluate(self._events_of(events, on_unknown), ks, on_unknown=on_unknown)

    def save(self, folder: str | Path, *, name: str = "", description: str = "") -> None:
        """Writes the model as a folder to share, which holds no user: JSON, safetensors, parquet and a card
        (hstu_rec.bundle). In a job of several processes process 0 writes. Collective. A model that was loaded
        is written as it was.

        Raises ValueError when `folder` is there already.
        """
        about = ExportConfig(name=name, description=description)
        source = self._fitted(self._source)
        with distributed.process_group("cpu"):
            columns = asdict(self.columns)
            hosts.on_main(lambda: _save(source, Path(folder), about, columns))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        user_column: str | None = None,
        item_column: str | None = None,
        time_column: str | None = None,
    ) -> "Recommender":
        """The model that `save`, or apps/export.py, wrote, on CPU and ready to recommend to any history.
        The columns are those of histories to come, by default what `save` kept of them, or user_id, item_id
        and timestamp. Nothing of the folder is executed. It is not gone on with: its `fit` would begin anew,
        with the defaults.

        Raises ValueError (BundleError) with the file and what is wrong with it.
        """
        loaded = cls()
        model, given = load_bundle(folder), (user_column, item_column, time_column)
        kept = model.config.about.get("columns")
        kept = kept if isinstance(kept, dict) else {}
        names = [
            one or kept.get(role, default)
            for one, (role, default) in zip(given, asdict(Columns()).items(), strict=True)
        ]
        loaded._take(model, _columns(*names), None)
        loaded._source = Path(folder)
        return loaded

    @property
    def model(self) -> ServingModel:
        """What recommends, on CPU. Raises ValueError before `fit`."""
        return self._fitted(self._model)

    def _fitted(self, value: T | None) -> T:
        if value is None:
            raise ValueError("there is no model yet; call fit(events), or Recommender.load(folder)")
        return value

    def _take(self, model: ServingModel, columns: Columns, dataset: Dataset | None) -> None:
        self._model, self.columns, self._dataset = model, columns, dataset
        self._users = None

    def _config(self, data: Path | None = None, run: Path | None = None) -> RunConfig:
        settings = ALWAYS | self._given
        is_new = (
            run is not None and not run.exists() and "train.resume_changed" not in self._settings
        )
        resume = "none" if is_new else "auto"
        settings |= {"train.run_dir": run or "run", "train.resume": resume}
        if data is not None:
            if "loss.negatives" not in settings:
                is_small = Dataset(data).num_items <= MAX_EXACT_ITEMS
                settings |= EXACT if is_small else SAMPLED
            settings |= {"data.path": data}
        settings |= self._settings
        return load(RunConfig, assignments(settings))

    def _kind_for(self, histories: Any) -> TableKind:
        return kind_of_table(histories) if _is_table(histories) else self._kind

    def _events_of(self, histories: Any, on_unknown: OnUnknown) -> pa.Table:
        """user_id | item_id | timestamp of a table, of files, or of users of `fit`."""
        names = [self.columns.user, self.columns.item, self.columns.time]
        if isinstance(histories, str | Path):
            return read_events(histories, self.columns)
        if _is_table(histories):
            histories = opened(histories)
            self.columns.check(names_of(histories))
            return self.columns.standard(arrow_of(histories, names))
        return self._events_of_users(histories, on_unknown)

    def _events_of_users(self, user_ids: Any, on_unknown: OnUnknown) -> pa.Table:
        if self._dataset is None:
            raise ValueError(
                f"histories must be a table with the columns {self.columns.user}, {self.columns.item} and "
                f"{self.columns.time}, or a path; a model that was loaded knows no users"
            )
        if self._users is None:
            self._users = IdIndex(typed_ids(self._dataset.user_ids))
        users = rows_of(user_ids, self._users, "user ids", on_unknown, "users")
        _, first = np.unique(users, return_index=True)
        users = users[np.sort(first)]
        return events_of(self._dataset, users)


def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hstu_rec-")


def _columns(user: str, item: str, time: str) -> Columns:
    columns = Columns(user=user, item=item, time=time)
    if problems := columns.problems():
        raise ValueError("; ".join(problems))
    return columns


def _is_table(value: Any) -> bool:
    """Whether it has columns, and is no list of ids."""
    return isinstance(value, Mapping) or hasattr(type(value), "columns")


def _served(run: Path) -> ServingModel:
    with distributed.alone():
        return serve_run(run)


def _save(source: Path, folder: Path, about: ExportConfig, columns: dict[str, str]) -> None:
    """A run as a bundle, or a bundle again; by one process of a group."""
    if (source / "config.yaml").is_file():
        with distributed.alone():
            export(source, folder, about, {"columns": columns})
        return
    if about.name or about.description:
        raise ValueError(
            "a model that was loaded is saved as it is, with its name and description; leave them out"
        )
    if folder.exists():
        raise ValueError(f"{folder} is there already; remove it, or give another folder")
    shutil.copytree(source, folder)
