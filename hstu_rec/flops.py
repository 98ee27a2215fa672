"""Floating-point operations of training, and the share of the device's speed that they reach (MFU).

Counted are the products that the formulas have, whatever a kernel repeats or pads: projections and loss three
times forward, attention over the pairs that are seen 3.5 times.
"""

import time

import numpy as np
import torch

from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.loss import LossConfig

PEAK_SIZE = 8192
PEAK_REPEATS = 10


def encoder_flops(config: EncoderConfig, lengths: np.ndarray) -> np.ndarray:
    """float64 [B]: forward and backward of histories of `lengths` [B]."""
    heads = config.num_heads
    attention = config.attention_dim or config.dim // heads
    value = config.value_dim or config.dim // heads
    projected = heads * (2 * attention + value * (2 if config.use_gate else 1))
    weights = config.dim * (projected + heads * value + 2 * config.ffn_dim)
    reach = np.minimum(lengths, config.window) if config.window else lengths
    # The first `reach` queries see 1, 2, .. keys, the others `reach` each.
    pairs = reach * (reach + 1) / 2 + (lengths - reach) * reach
    return config.num_layers * (
        3 * 2 * weights * lengths + 3.5 * 2 * heads * (attention + value) * pairs
    )


def loss_flops(
    config: LossConfig, dim: int, num_positions: np.ndarray, num_items: int
) -> np.ndarray:
    """float64 [B]: scores of positions [B] and candidates and their gradients; 0 for in_batch, whose
    candidates vary."""
    counts = {"all": num_items, "in_batch": 0}
    return 3.0 * 2 * dim * counts.get(config.negatives, config.num_negatives) * num_positions


def history_flops(
    encoder: EncoderConfig, loss: LossConfig, num_items: int, lengths: np.ndarray
) -> np.ndarray:
    """float64 [B]: those of a training step that are of each history."""
    of_loss = loss_flops(loss, encoder.dim, lengths, num_items)
    return encoder_flops(encoder, lengths) + of_loss


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that a product of two square matrices of `dtype` reaches on a CUDA device."""
    left, right = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    torch.cuda.synchronize(device)
    began_at = time.perf_counter()
    for _ in range(PEAK_REPEATS):
        torch.mm(left, right)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)  # these matrices are no part of training's memory
    return PEAK_REPEATS * 2 * PEAK_SIZE**3 / (time.perf_counter() - began_at)
