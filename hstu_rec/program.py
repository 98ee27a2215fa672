"""The model's queries as one function of plain tensors, for torch.export: no jagged layout, no package.

    item_ids [B, L]    7 2 9 0      lengths [B]  3    timestamps [B, L], at [B]  -->  queries float32 [B, D]
                       4 0 0 0                   1

The same weights as the encoder's, with attention over dense [B, H, L, L]; padding is at the end and not
looked at. Ids are rows of the item table, which is part of the program. torch runs what it loads of such a
file: it is for files whose maker is trusted, and nothing of hstu_rec opens one.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package
from torch.export import Dim, ExportedProgram, export, save

from hstu_rec.encoder import HSTUEncoder
from hstu_rec.layer import HSTULayer
from hstu_rec.model import NextItemModel
from hstu_rec.ops import time_bucket
from hstu_rec.quantised import Int8Rows, ItemRows


class ItemTokens(nn.Module):
    """Rows of the table, float32 or int8, as buffers."""

    def __init__(self, rows: ItemRows) -> None:
        super().__init__()
        is_small = isinstance(rows, Int8Rows)
        self.register_buffer("values", rows.values if is_small else rows)
        self.register_buffer("scales", rows.scales if is_small else None)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [n, D] rows of int64 ids [n]."""
        # A compiled program would count negative ids from the end.
        ids = torch.where(ids < 0, self.get_buffer("values").shape[0], ids)
        rows = self.get_buffer("values").index_select(0, ids)
        if self.scales is None:
            return rows
        return rows.float() * self.get_buffer("scales").index_select(0, ids)[:, None]


class QueryProgram(nn.Module):
    """The queries of padded histories."""

    def __init__(self, model: NextItemModel, rows: ItemRows) -> None:
        super().__init__()
        self.items, self.encoder, self.loss = ItemTokens(rows), model.encoder, model.loss
        self.dtype = model.dtype
        self.register_buffer("places", torch.arange(model.encoder.config.max_history_len))

    def forward(self, item_ids: Tensor, lengths: Tensor, timestamps: Tensor, at: Tensor) -> Tensor:
        """float32 [B, D], one query a user, as it is scored.

        Args:
            item_ids: int64 [B, L], rows of items, the newest `max_history_len`, oldest first, then padding of
                any item. lengths: int64 [B], from 1 to L. timestamps: int64 [B, L], s. at: int64 [B], s for
                which is recommended; without effect unless the model uses the query time.
        """
        last, steps = lengths[:, None] - 1, torch.arange(item_ids.shape[1])
        # Looked up, so that a history that is too long is an error of a compiled program too.
        places = self.get_buffer("places").index_select(0, steps)
        x = self.items(item_ids.flatten()).unflatten(0, item_ids.shape)
        # Of the next event; no slice, whose length 0 would be a case of its own.
        following = (steps + 1).clamp(max=item_ids.shape[1] - 1)
        now = timestamps.index_select(1, following).scatter(1, last, at[:, None])
        is_half = self.dtype != torch.float32
        with torch.autocast("cpu", self.dtype, enabled=is_half):
            encoded = encoded_padded(self.encoder, x, places, timestamps, now).float()
        place = last[:, :, None].expand(-1, -1, encoded.shape[2])
        return self.loss.query_vectors(encoded.gather(1, place)[:, 0])


def encoded_padded(
    encoder: HSTUEncoder, x: Tensor, steps: Tensor, timestamps: Tensor, next_timestamps: Tensor
) -> Tensor:
    """What `encoder`, in evaluation mode, gives for padded histories [B, L, D], oldest event first; what
    stands at padding means nothing.

    steps: int64 [L], 0, 1, ..; timestamps, next_timestamps: int64 [B, L], s.
    """
    config = encoder.config
    if encoder.position_embedding is not None:
        x = x + encoder.position_embedding.index_select(0, steps)
    for calendar, times in (
        (encoder.calendar, timestamps),
        (encoder.next_calendar, next_timestamps),
    ):
        if calendar is not None:
            x = x + calendar(times.flatten()).unflatten(0, times.shape)
    distance = steps[:, None] - steps
    is_seen = distance >= 0
    if config.window:
        is_seen = is_seen & (distance < config.window)
    # The events after a query are hidden from it, and with them padding from every event.
    buckets = None
    if config.use_time_bias:
        now = next_timestamps if config.query_time == "next" else timestamps
        buckets = time_bucket(now[:, :, None] - timestamps[:, None, :])
    for layer in encoder.layers:
        assert isinstance(layer, HSTULayer)
        x = _layer(layer, x, distance, is_seen, buckets)
    return encoder.final_norm(x)


def _layer(
    layer: HSTULayer, x: Tensor, distance: Tensor, is_seen: Tensor, buckets: Tensor | None
) -> Tensor:
    """One layer on [B, L, D]; distance int64 and is_seen bool [L, L], buckets int64 [B, L, L]."""
    *heads, gate = layer.heads(x)
    q, k, v = (one.transpose(1, 2) for one in heads)
    scores = q @ k.transpose(2, 3)
    if layer.kind == "softmax":
        scores = scores * layer.scale
    if layer.position_bias is not None:
        table = layer.position_bias
        scores = scores + table[:, distance.clamp(0, table.shape[1] - 1)]
    if layer.time_bias is not None and buckets is not None:
        scores = scores + layer.time_bias[:, buckets].transpose(0, 1)
    if layer.kind == "silu":
        weights = nn.functional.silu(scores).masked_fill(~is_seen, 0) * layer.scale
    else:
        weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
    attended = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    return layer.after(x, attended, *gate)


def exported_program(model: NextItemModel, rows: ItemRows) -> ExportedProgram:
    """The program of a model in evaluation mode: any number of users from 1 on, histories from 1 to
    max_history_len long. It raises for ids, lengths and histories beyond."""
    longest = model.encoder.config.max_history_len
    num_users, length = 3, min(3, longest)
    users = Dim("users", min=1)
    of_events = {0: users, 1: Dim("length", min=1, max=longest)} if longest > 1 else {0: users}
    example = (
        torch.zeros(num_users, length, dtype=torch.int64),
        torch.ones(num_users, dtype=torch.int64),
        torch.zeros(num_users, length, dtype=torch.int64),
        torch.zeros(num_users, dtype=torch.int64),
    )
    shapes = (of_events, {0: users}, of_events, {0: users})
    with torch.no_grad():
        return export(QueryProgram(model, rows).eval(), example, dynamic_shapes=shapes)


def write_programs(model: NextItemModel, rows: ItemRows, path: Path, compiled: Path | None) -> None:
    """Writes `path`, for torch.export.load, and where it is given `compiled`, for this kind of CPU and
    torch._inductor.aoti_load_package. Raises ValueError without a C++ compiler."""
    if compiled is not None and shutil.which("g++") is None:
        raise ValueError(
            "program=compiled is compiled by g++, and there is none; install it, or give program=torch"
        )
    program = exported_program(model, rows)
    save(program, path)
    if compiled is not None:
        aoti_compile_and_package(program, package_path=str(compiled))
