"""Scores of queries and items, the same in evaluation and in serving.

The score of a pair is the float64 sum of the products of its float32 entries, in one order whatever is beside
it; a product in float32 is near it, and how near is known.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# torch's sums on CUDA may add in another order where rows are fewer than this.
LEAST_ROWS = 64


@dataclass(frozen=True)
class ItemShard:
    """A rank's rows of the catalogue; it may own none."""

    rows: Tensor  # [n, D]
    first_id: int
    num_items: int  # of the whole catalogue
    scored: Callable[[Tensor], Tensor] = torch.clone
    """Of float32 rows what is scored; of each alone."""

    def vectors(self, part: slice | Tensor) -> Tensor:
        """float32 [k, D] of some rows, as they are scored."""
        return self.score(self.rows[part])

    def score(self, rows: Tensor) -> Tensor:
        """float32 [k, D]: what is scored of rows of the table, of one row the same among any others."""
        rows = rows.float()
        missing = max(LEAST_ROWS - len(rows), 0)
        return self.scored(nn.functional.pad(rows, (0, 0, 0, missing)))[: len(rows)]


def exact_scores(left: Tensor, right: Tensor) -> Tensor:
    """float64 [n] dot products of float32 [n, D] pairs, summed in one order whatever n."""
    products = left.double() * right.double()
    while products.shape[-1] > 1:
        half = (products.shape[-1] + 1) // 2
        rest = products[:, half:]
        products = products[:, :half] + nn.functional.pad(rest, (0, half - rest.shape[-1]))
    return products.sum(-1)


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices in float32: TF32, bfloat16 or autocast would break the bound."""
    mkldnn: Any = torch.backends.mkldnn  # `matmul` is missing from its annotations
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def certain_bounds(exact: Tensor, reach: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """float64 [Q] low and high: a score below low, or above high, is so exactly too.

    No score is further than `rounding` times reach [Q], the product of the query's norm and the largest of
    the items, from the exact one, plus what underflows; where products may overflow nothing is certain.
    """
    limits = torch.finfo(torch.float32)
    # Also of the bounds as float32.
    margin = rounding * (reach + limits.tiny / limits.eps) + limits.eps * exact.abs()
    margin[reach > limits.max / 2] = torch.inf
    return exact - margin, exact + margin


def row_norms(vectors: Tensor) -> Tensor:
    """float64 [n] of float32 [n, D]."""
    return torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
