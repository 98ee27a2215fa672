"""Bytes that a rank holds in training, by part: sums over what the modules keep, no measurement.

    always   rows and their optimizer's state, dense parameters with gradient and both moments, inputs
    then     the largest of three moments: the loss of forward, backward of the last layer, backward of the
             lookup. Layers keep what their backward needs until it is done.

Compiled layers are counted as if they were not; CUDA graphs as one. `apps/benchmark.py memory` measures.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from hstu_rec.config import RunConfig
from hstu_rec.distributed import product_dtype
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.encoder_config import EncoderConfig, chosen_kernel
from hstu_rec.item_table import TableConfig
from hstu_rec.loss import SampledSoftmax
from hstu_rec.ops.grouped import MAX_KEPT_ENTRIES, length_groups
from hstu_rec.softmax import CHUNK_LOGITS, TILE_LOGITS, fuses

FLOAT, INT = 4, 8
# Numbers that an optimizer keeps beside a row of D.
STATE_NUMBERS = {"sgd": (0, 0), "rowwise_adagrad": (1, 0), "adagrad": (0, 1), "adam": (0, 2)}
# Copies of AdamW's parameters: themselves, gradient, two moments.
DENSE_COPIES = 4
# Inputs that are held at a time: of this step, sent ahead and, on CPU, made ahead.
INPUTS_HELD = {"cpu": 3, "cuda": 2}
# Ids on their way and back: bucketed, permuted, received, with their lengths.
ID_COPIES = 6
# What a slot of the cache and an item beside it take: place, time of use; index of the table.
CACHE_SLOT_BYTES, CACHE_ITEM_BYTES = 16, 4
# The programs of hstu_rec.ops.triton_softmax, of bfloat16.
FUSED_BLOCK, FUSED_STEP, FUSED_PROGRAMS, FUSED_MIN_STEPS = 128, 32, 512, 4


@dataclass(frozen=True)
class StepSizes:
    """One rank's part of a step."""

    lengths: np.ndarray
    """int64 [B]: events of its histories."""
    num_positions: int
    """Events of all ranks."""
    num_negatives: int
    """Candidates that it scores: all, or its part of them."""
    num_asked: int
    """Distinct items whose rows it reads."""
    num_served: int
    """Rows that all ranks read of it."""
    num_ranks: int = 1
    is_divided: bool = False
    """Whether it scores the queries of all ranks, against its part of the candidates."""

    @property
    def num_events(self) -> int:
        """Events, each with a target."""
        return int(self.lengths.sum())


def row_bytes(config: TableConfig, dim: int) -> tuple[int, int]:
    """Bytes of a row and of its optimizer's state."""
    once, of_each = STATE_NUMBERS[config.optimizer]
    return FLOAT * dim, FLOAT * (once + of_each * dim)


def table_bytes(config: TableConfig, dim: int, num_rows: int) -> tuple[int, int, int]:
    """(rows on the device, their optimizer's state there, both on the host) of a rank's rows."""
    row, state = row_bytes(config, dim)
    if config.kernel == "fused":
        return num_rows * row, num_rows * state, 0
    cached = 0
    if config.kernel == "uvm_caching":
        num_slots = int(num_rows * config.cache_load_factor)
        cached = num_slots * (row + CACHE_SLOT_BYTES) + num_rows * CACHE_ITEM_BYTES
    return cached, 0, num_rows * (row + state)


def num_dense(config: RunConfig) -> int:
    """Trained numbers of the encoder and the loss."""
    with torch.device("meta"):
        parts = HSTUEncoder(config.encoder), SampledSoftmax(config.loss)
    return sum(one.numel() for part in parts for one in part.parameters())


def dense_bytes(config: RunConfig, num_ranks: int) -> int:
    """Bytes of the dense parameters with their gradients and AdamW's moments; of several ranks also with the
    buckets that gradients are summed in."""
    return FLOAT * num_dense(config) * (DENSE_COPIES + (num_ranks > 1))


def copy_bytes(config: RunConfig, num_rows: int) -> int:
    """Bytes of the copy that a checkpoint is written from: rows with state, dense weights with moments."""
    if not config.checkpoint.in_background:
        return 0
    return num_rows * sum(row_bytes(config.table, config.encoder.dim)) + 3 * FLOAT * num_dense(
        config
    )


@dataclass(frozen=True)
class _Layer:
    """Bytes of a layer, of all events."""

    kept: float  # for backward, its input among them
    input: float  # of that
    highest: float  # what is kept of it and passes, when backward holds most


def step_bytes(config: RunConfig, sizes: StepSizes, device_type: str) -> dict[str, float]:
    """Bytes of a step at its highest: {"inputs", "rows", "activations", "loss"}, parts of one moment.

    rows: those looked up and their gradients, and what travels. activations: what layers keep. loss: queries,
    candidates, logits and their gradients.
    """
    is_cuda = device_type == "cuda"
    half = product_dtype(config.train.precision) == torch.bfloat16
    events, dim = sizes.num_events, config.encoder.dim
    vectors = FLOAT * dim * events  # of a float32 [T, D]
    uses = 2 * events + sizes.num_negatives
    gathered = FLOAT * dim * uses
    asked, served = FLOAT * dim * sizes.num_asked, FLOAT * dim * sizes.num_served
    kernel = chosen_kernel(config.encoder, is_cuda, product_dtype(config.train.precision))
    layer = _layer(config.encoder, sizes, half, is_cuda, kernel == "grouped")
    first = vectors * _dropout_copies(config.encoder, is_cuda)
    num_layers = config.encoder.num_layers
    layers = [layer.kept] * num_layers
    if config.train.recompute:
        layers = [layer.input] * (num_layers - 1) + [layer.kept]
    kept = first + sum(layers) + vectors * (config.encoder.final_norm != "none")
    forward = kept if not config.train.recompute else first + num_layers * layer.input
    loss_kept, loss_passing = _loss(config, sizes, half, is_cuda)
    inputs = INPUTS_HELD[device_type] * _input_bytes(config, sizes, kernel == "grouped")
    # Rows as they came and in the order they were asked for; of several ranks also as they were sent.
    rows = 2 * asked + served * (sizes.num_ranks > 1)
    ids = ID_COPIES * INT * (sizes.num_asked + sizes.num_served)
    in_loss = {
        "rows": rows + gathered, "activations": forward, "loss": loss_kept + loss_passing
    }  # fmt: skip
    in_layers = {
        # Gradients of targets and candidates wait for that of the histories.
        "rows": rows + gathered - vectors, "activations": kept - layer.kept + layer.highest, "loss": 0.0
    }  # fmt: skip
    in_lookup = {"rows": rows + 2 * gathered + 2 * asked + served, "activations": 0.0, "loss": 0.0}
    highest = max((in_loss, in_layers, in_lookup), key=lambda parts: sum(parts.values()))
    return {"inputs": inputs + ids, **highest}


def _dropout_copies(config: EncoderConfig, is_cuda: bool) -> float:
    """Of float32 tokens kept for dropout: its output, and its mask of bytes or, on CPU, of factors."""
    return 0.0 if not config.dropout else 1 + (0.25 if is_cuda else 1)


def _layer(
    config: EncoderConfig, sizes: StepSizes, half: bool, is_cuda: bool, is_grouped: bool
) -> _Layer:
    """What a layer keeps; the names are those of HSTULayer."""
    events, heads, dim = sizes.num_events, config.num_heads, config.dim
    a, v = (width or dim // heads for width in (config.attention_dim, config.value_dim))
    short = FLOAT // 2 if half else FLOAT  # bytes of a product's number
    values, widths = heads * v, heads * (2 * a + v * (2 if config.use_gate else 1))
    has_norm, has_dropout = config.norm != "none", config.dropout > 0
    # A mask of bytes on CUDA, on CPU of factors.
    mask = has_dropout * (1 if is_cuda else FLOAT)
    wide = FLOAT if is_cuda and has_norm else short  # autocast has norms in float32, on CUDA
    # Grouped attention copies queries, keys and values; the gate is a view that keeps all four.
    is_held = config.use_gate or not is_grouped
    projection = short * (dim * (has_norm or half) + widths * (is_held + config.use_gate))
    if config.use_gate:
        # Norm's input and output; what is dropped, as the output layer reads it.
        after = values * (has_norm * 2 * wide + mask + short + (not has_norm) * short)
    else:
        after = values * short + dim * mask * (1 if is_cuda else short / FLOAT)
    after += FLOAT * dim  # the sum: the next layer's input
    ffn = config.ffn_dim
    if ffn:
        after += short * dim + ffn * short * 2 + FLOAT * dim
        after += (ffn + dim) * mask * (1 if is_cuda else short / FLOAT)
    attention, passing = _attention(config, sizes, short, is_grouped)
    before = events * projection
    # In backward, the gradient of the sum goes on to the layer below. With it come those of what is dropped;
    # those of attention's output and the gate, and what attention makes; and then, once attention keeps
    # nothing, those of q, k, v and the gate, apart and side by side.
    in_output = attention + events * (after + 2 * wide * values)
    in_attention = attention + events * (wide + short) * values + passing
    in_projection = events * 2 * short * widths
    return _Layer(
        kept=before + attention + events * after,
        input=FLOAT * events * dim,
        highest=before + FLOAT * events * dim + max(in_output, in_attention, in_projection),
    )


def _attention(
    config: EncoderConfig, sizes: StepSizes, short: int, is_grouped: bool
) -> tuple[float, float]:
    """(bytes kept, bytes that pass in backward) of attention itself."""
    heads = config.num_heads
    a, v = (width or config.dim // heads for width in (config.attention_dim, config.value_dim))
    if not is_grouped:
        # Queries, keys and values are views of the projection; softmax keeps its output.
        is_softmax = config.attention == "softmax"
        kept = heads * (short * v + FLOAT) * is_softmax
        # Gradients, those of queries summed in float32.
        return sizes.num_events * kept, sizes.num_events * heads * (short * (2 * a + v) + FLOAT * a)
    shapes = _group_shapes(sizes.lengths)
    rows = heads * sum(users * length for users, length in shapes)
    room, kept, largest = MAX_KEPT_ENTRIES, 0, 0
    for users, length in shapes:
        entries = heads * users * length**2
        largest = max(largest, entries)
        if entries <= room:
            room -= entries
            kept += entries
    dense = rows * (2 * a + v) * short
    passing = dense + rows * v * short + (4 if largest > kept else 2) * largest * short
    return dense + 2 * kept * short, passing


def _group_shapes(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(users, events of the longest) of each group of grouped attention."""
    groups = length_groups(lengths.tolist())
    return [(len(users), int(lengths[users[0]])) for users in groups]


def _input_bytes(config: RunConfig, sizes: StepSizes, is_grouped: bool) -> float:
    """Bytes of a batch, its lookup and its layout."""
    events, users = sizes.num_events, len(sizes.lengths)
    size = INT * (4 * events + users) + INT * (2 * events + 2 * sizes.num_negatives)
    size += INT * sizes.num_asked
    if not is_grouped:
        return size + (FLOAT * 2 * events) * config.encoder.use_time_bias
    shapes = _group_shapes(sizes.lengths)
    entries = sum(count * length**2 for count, length in shapes)
    rows = sum(count * length for count, length in shapes)
    size += INT * config.encoder.num_heads * (rows + events)
    return size + entries * (1 + INT * config.encoder.use_time_bias)


def _loss(config: RunConfig, sizes: StepSizes, half: bool, is_cuda: bool) -> tuple[float, float]:
    """(bytes kept, bytes that come and go) of the loss in forward."""
    dim, events, candidates = config.encoder.dim, sizes.num_events, sizes.num_negatives
    vector = FLOAT * dim
    units = config.loss.similarity == "cosine"
    # Unit vectors of queries, targets and candidates; queries by temperature; gradients of all three.
    kept = vector * (events * (2 * units + 1 + 1) + candidates * (units + 1))
    is_divided = sizes.is_divided
    scored = sizes.num_positions if is_divided else events
    passing = (
        vector * scored * (1 + 2 * is_divided)
    )  # queries of base 2; those gathered, and gradients
    if fuses(is_cuda, torch.float32, dim, config.loss.use_seen_bias):
        parts = _fused_parts(scored, candidates)
        passing += vector * scored * (parts + (parts > 1))
        passing += dim * (scored + candidates) * 2 * half
        return kept, passing
    device = "cuda" if is_cuda else "cpu"
    chunk = min(scored * candidates, CHUNK_LOGITS[device])
    passing += FLOAT * chunk + vector * min(scored, chunk // max(candidates, 1))
    if config.loss.use_seen_bias:
        passing += FLOAT * min(chunk, TILE_LOGITS[device])
    return kept, passing


def _fused_parts(num_queries: int, num_candidates: int) -> int:
    """Sums that a query has before they are added up."""
    blocks = max(math.ceil(num_queries / FUSED_BLOCK), 1)
    steps = math.ceil(num_candidates / FUSED_STEP)
    return max(min(math.ceil(FUSED_PROGRAMS / blocks), steps // FUSED_MIN_STEPS), 1)
