"""Random bits as functions of what they are for, so that any of them are made alone, anywhere, any time."""

import hashlib

import numpy as np

# SplitMix64 (Steele, Lea and Flood, 2014): the step of its counter, and its finaliser.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FINALISER = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))


def mixed(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """uint64 of the broadcast shape: the random bits of stream keys[i] at numbers[i] (int64, from 0)."""
    bits = np.multiply(numbers, GOLDEN, dtype=np.uint64, casting="unsafe")
    bits = bits + (keys + GOLDEN)
    shifted = np.empty_like(bits)
    for shift, factor in FINALISER:
        np.right_shift(bits, np.uint64(shift), out=shifted)
        bits ^= shifted
        bits *= factor
    np.right_shift(bits, np.uint64(31), out=shifted)
    bits ^= shifted
    return bits


def uniform(bits: np.ndarray) -> np.ndarray:
    """float64 in (0, 1), both ends out, of the upper 52 of the random `bits`."""
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52


def stream(seed: int, use: str) -> np.ndarray:
    """uint64 [1]: a key of a stream of its own for each seed (0 .. 2**63 - 1) and use."""
    number = int.from_bytes(hashlib.sha256(use.encode()).digest()[:8], "little")
    return mixed(np.array([number], dtype=np.uint64), np.array([seed]))
