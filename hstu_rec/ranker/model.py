"""RankingModel: a lookup, a history encoder, a head a task.

An event is two tokens, what was shown and what came of it, so that every event is an example of what was
known before it (arXiv 2402.17152, section 2.2); a candidate is what is shown next:

    item + context | item + context + outcome | item + context | ... | candidate + context
    |-> logits of event 0                     |-> of event 1         |-> of the candidate
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from hstu_rec.encoder import EncodedHistory, HSTUEncoder, check_candidates
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.item_table import SentIds
from hstu_rec.layer import Dropout
from hstu_rec.ranker.features import EventFeatures, Feature, Task
from hstu_rec.settings import at_least
from hstu_rec.transfer import on_device


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """What is predicted, from what."""

    tasks: list[str] = field(default_factory=lambda: ["rating>=4"])
    """What is predicted, each a comparison of a column: rating>=4, action==like. A column of a task is an
    outcome."""
    outcomes: list[str] = field(default_factory=list)
    """Further columns that are known after an event alone, such as the time spent."""
    context: list[str] = field(default_factory=list)
    """Columns that are known when a candidate is scored, such as the device or the price."""
    categories: list[str] = field(default_factory=list)
    """Which of these columns of numbers hold categories 0, 1, ..; texts always do."""
    history: Literal["hstu", "pooled"] = "hstu"
    """The encoder of encoder.*, or for comparison the mean of the events' vectors."""
    head_dim: int = 64
    """Width of the layer before the tasks' logits."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "head_dim")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            found.append(f"tasks must be at least one, and differ; got {self.tasks}")
        columns = []
        for text in self.tasks:
            try:
                columns.append(Task.of(text).column)
            except ValueError as error:
                found.append(str(error))
        if known := {*columns, *self.outcomes} & {*self.context}:
            found.append(
                f"context must be known before an event; got {', '.join(sorted(known))}, of a task or of "
                "outcomes"
            )
        return found

    def outcome_columns(self) -> list[str]:
        """Columns of the tasks and further outcomes, each once."""
        return [*dict.fromkeys([*(Task.of(text).column for text in self.tasks), *self.outcomes])]


@dataclass(frozen=True)
class RankBatch:
    """Parts of B users' histories, T events; one rank's part of a batch."""

    item_ids: Tensor
    """int64 [T]."""
    timestamps: Tensor
    """int64 [T] s."""
    offsets: Tensor
    """int64 [B+1]."""
    context: Mapping[str, Tensor]
    """float32 [T] by column."""
    outcomes: Mapping[str, Tensor]
    """float32 [T] by column."""

    def to(self, device: torch.device) -> "RankBatch":
        """The batch on `device`."""
        moved = on_device(self, device, but={"context", "outcomes"})
        columns = (
            {name: values.to(device) for name, values in given.items()}
            for given in (self.context, self.outcomes)
        )
        return RankBatch(moved.item_ids, moved.timestamps, moved.offsets, *columns)


@dataclass(frozen=True)
class CachedHistory:
    """What the candidates of B users need of their histories; `RankingModel.encode_history` makes it."""

    encoded: EncodedHistory | None
    """With ranker.history hstu."""
    pooled: Tensor | None
    """[B, D] with pooled."""

    @property
    def num_users(self) -> int:
        """B."""
        if self.encoded is not None:
            return len(self.encoded.offsets) - 1
        assert self.pooled is not None
        return len(self.pooled)


class PooledHistory(nn.Module):
    """The mean of what came of a user's earlier events beside what is shown: a history without order."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3 * dim)
        self.mix = nn.Sequential(nn.Linear(3 * dim, 2 * dim), nn.SiLU(), Dropout(dropout))
        self.output = nn.Linear(2 * dim, dim)

    def pool(self, after: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Of events' vectors [T, D] the mean of those before each, and [B, D] of all of each user."""
        lengths = offsets.diff()
        sums = after.double().cumsum(0)  # whose differences keep the precision of float32
        total = torch.cat([sums.new_zeros(1, after.shape[1]), sums])
        begin = torch.repeat_interleave(offsets[:-1], lengths, output_size=len(after))
        place = torch.arange(len(after), device=after.device)
        before = (total[place] - total[begin]) / (place - begin).clamp(min=1)[:, None]
        whole = (total[offsets[1:]] - total[offsets[:-1]]) / lengths.clamp(min=1)[:, None]
        return before.to(after), whole.to(after)

    def forward(self, shown: Tensor, pooled: Tensor) -> Tensor:
        """[n, D] of what is shown and the history before it, [n, D] each."""
        both = torch.cat([shown, pooled, shown * pooled], dim=1)
        return shown + self.output(self.mix(self.norm(both)))


class RankingModel(nn.Module):
    """Logits of tasks for events and for candidates.

    `table` maps distinct sorted int64 ids [R] to rows [R, D]: an ItemTable, or anything of that form.
    """

    def __init__(
        self,
        table: nn.Module,
        history: HSTUEncoder | PooledHistory,
        context: EventFeatures,
        outcomes: EventFeatures,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.table, self.history, self.head = table, history, head
        self.context, self.outcomes = context, outcomes

    def forward(self, batch: RankBatch, sent: SentIds | None = None) -> Tensor:
        """Logits [T, K] of every event, by what was known when it was shown.

        Collective where the table is. sent: the batch's distinct ids on their way. Raises ValueError as
        HSTUEncoder and EventFeatures do; an event is two tokens of encoder.max_history_len.
        """
        shown, after = self._events(batch, sent)
        if isinstance(self.history, PooledHistory):
            before, _ = self.history.pool(after, batch.offsets)
            return self.head(self.history(shown, before))
        encoded = self.history(*_tokens(shown, after, batch))
        return self.head(encoded[::2])

    @torch.no_grad()
    def encode_history(self, batch: RankBatch) -> CachedHistory:
        """What any number of candidates of the users need of these events.

        An event is two tokens, and a candidate one more: histories have fewer events than half of
        encoder.max_history_len. Raises ValueError for longer ones, and in training mode.
        """
        self._check_mode("encode_history")
        if isinstance(self.history, HSTUEncoder):
            most = self.history.config.max_history_len // 2 - 1
            longest = int(batch.offsets.diff().max()) if len(batch.offsets) > 1 else 0
            if longest > most:
                raise ValueError(
                    f"a history has {longest} events; candidates come after {most} at most, two tokens each "
                    f"of encoder.max_history_len {self.history.config.max_history_len}; keep the newest"
                )
        shown, after = self._events(batch, None)
        if isinstance(self.history, PooledHistory):
            return CachedHistory(None, self.history.pool(after, batch.offsets)[1])
        return CachedHistory(self.history.encode_history(*_tokens(shown, after, batch)), None)

    @torch.no_grad()
    def score_candidates(
        self,
        item_ids: Tensor,
        num_candidates: Tensor,
        history: CachedHistory,
        at: Tensor,
        context: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Probabilities [C, K] of the tasks for candidates, as `forward` gives for an event of that time.

        item_ids: int64 [C], those of user 0 first; num_candidates: int64 [B]; at: int64 [B] in s, the times
        of the requests; context: [C] by column. Raises ValueError as HSTUEncoder.encode_candidates and
        EventFeatures do.
        """
        self._check_mode("score_candidates")
        check_candidates(num_candidates, at, history.num_users, len(item_ids))
        rows = _looked_up(self.table, item_ids)
        shown = rows + self.context(context or {}, rows)
        if history.encoded is None:
            assert isinstance(self.history, PooledHistory) and history.pooled is not None
            pooled = history.pooled.repeat_interleave(num_candidates, dim=0, output_size=len(shown))
            return self.head(self.history(shown, pooled)).sigmoid()
        assert isinstance(self.history, HSTUEncoder)
        encoded = self.history.encode_candidates(shown, num_candidates, history.encoded, at)
        return self.head(encoded).sigmoid()

    def _check_mode(self, name: str) -> None:
        if self.training:
            raise ValueError(f"{name} is for serving: call eval() first")

    def _events(self, batch: RankBatch, sent: SentIds | None) -> tuple[Tensor, Tensor]:
        """[T, D] of what was shown, and of the same with what came of it."""
        if sent is None:
            rows = _looked_up(self.table, batch.item_ids)
        else:
            _, places = torch.unique(batch.item_ids, return_inverse=True)
            rows = sent.rows().index_select(0, places)
        shown = rows + self.context(batch.context, rows)
        return shown, shown + self.outcomes(batch.outcomes, shown)


def _looked_up(table: nn.Module, ids: Tensor) -> Tensor:
    unique, places = torch.unique(ids, return_inverse=True)
    return table(unique).index_select(0, places)


def _tokens(shown: Tensor, after: Tensor, batch: RankBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Two tokens an event [2 T, D], their offsets [B+1] and times [2 T]."""
    tokens = torch.stack([shown, after], dim=1).flatten(0, 1)
    return tokens, batch.offsets * 2, batch.timestamps.repeat_interleave(2)


def head_of(dim: int, head_dim: int, num_tasks: int, dropout: float) -> nn.Module:
    """A layer that the tasks share, and a logit each."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, head_dim),
        nn.SiLU(),
        Dropout(dropout),
        nn.Linear(head_dim, num_tasks),
    )


def ranking_model(
    table: nn.Module, ranker: RankerConfig, encoder: EncoderConfig, features: Sequence[Feature]
) -> RankingModel:
    """The model of these settings; `features` are those of context and outcomes."""
    by_name = {one.name: one for one in features}
    is_hstu = ranker.history == "hstu"
    history = HSTUEncoder(encoder) if is_hstu else PooledHistory(encoder.dim, encoder.dropout)
    context, outcomes = (
        EventFeatures([by_name[name] for name in names], encoder.dim)
        for names in (ranker.context, ranker.outcome_columns())
    )
    head = head_of(encoder.dim, ranker.head_dim, len(ranker.tasks), encoder.dropout)
    return RankingModel(table, history, context, outcomes, head)
