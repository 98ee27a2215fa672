"""Times of the softmax loss alone: this package's, and plain torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from hstu_rec import distributed
from hstu_rec.benchmarks.timing import median_s, peak_gib
from hstu_rec.loss import LossConfig, SampledSoftmax
from hstu_rec.settings import at_least
from hstu_rec.softmax import Negatives

TEMPERATURE = 0.05
CASES = {
    "cuda": ("16384x128-2048", "4096x128-1000000"),
    "cpu": ("2048x64-2048", "256x64-100000"),
}


@dataclass(frozen=True)
class Case:
    """Queries of a width and the candidates that they share."""

    num_queries: int
    width: int
    num_candidates: int

    @classmethod
    def of(cls, text: str) -> "Case":
        """Raises ValueError for a text of another form than 16384x128-2048."""
        queries, candidates = text.split("-")
        num_queries, width = queries.split("x")
        case = cls(int(num_queries), int(width), int(candidates))
        if min(case.num_queries, case.width, case.num_candidates) < 1:
            raise ValueError(text)
        return case


@dataclass(frozen=True, kw_only=True)
class LossTimes:
    """What is timed."""

    cases: list[str] = field(default_factory=list)
    """Queries x width - candidates, negatives that all queries share or a whole catalogue, like
    16384x128-2048; a few of either when empty."""
    precision: Literal["float32", "tf32", "bfloat16"] = "bfloat16"
    """Of the products on CUDA, as train.precision."""
    repeats: int = 20
    """Times that each is run, after three to warm up; the median is shown."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "repeats")
        for case in self.cases:
            try:
                Case.of(case)
            except ValueError:
                found.append(f"cases must be like 16384x128-2048; got '{case}'")
        return found


def loss_times(config: LossTimes, device: torch.device) -> Iterator[str]:
    """Lines of a table, the forms of a case one after another: forward and backward."""
    distributed.use_precision(config.precision)
    precision = config.precision if device.type == "cuda" else "float32"
    dtype = distributed.product_dtype(precision)
    yield f"{precision}; forward + backward; memory beyond the inputs; times the first form"
    for text in config.cases or CASES[device.type]:
        case, first = Case.of(text), math.nan
        yield text
        fused = partial(own_loss, dtype=dtype)
        for name, form in (("own", fused), ("plain", partial(plain_loss, dtype=dtype))):
            torch.manual_seed(0)
            sizes = (case.num_queries, case.num_queries, case.num_candidates)
            leaves = [torch.randn(n, case.width, device=device).requires_grad_() for n in sizes]
            ids = torch.randint(0, case.num_candidates, sizes[:1], device=device)
            work = partial(_gradients, form, leaves, ids)
            try:
                gib = peak_gib(work, device)
                seconds = median_s(work, config.repeats, device)
            except torch.OutOfMemoryError:
                yield f"  {name:8s} out of memory"
                continue
            first = seconds if math.isnan(first) else first
            memory = "" if math.isnan(gib) else f"  {gib:6.2f} GiB"
            yield f"  {name:8s} {seconds * 1e3:9.2f} ms{memory}  x {seconds / first:.2f}"


def _gradients(
    form: Callable[..., Tensor], leaves: list[Tensor], ids: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(form(*leaves, ids), leaves)


def own_loss(
    encoded: Tensor,
    targets: Tensor,
    rows: Tensor,
    ids: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """This package's loss of queries and targets [P, D], int64 ids [P], against rows [R, D]: a scalar."""
    loss = SampledSoftmax(LossConfig(temperature=TEMPERATURE))
    candidates = torch.arange(len(rows), device=rows.device)
    return loss(encoded, targets, ids, rows, Negatives(candidates), dtype)


def plain_loss(
    encoded: Tensor,
    targets: Tensor,
    rows: Tensor,
    ids: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same with all logits held, in `dtype`."""
    encoded, targets, rows = (functional.normalize(x, dim=-1) for x in (encoded, targets, rows))
    logits = encoded.to(dtype) @ rows.to(dtype).T / TEMPERATURE
    own = (encoded * targets).sum(-1, keepdim=True) / TEMPERATURE
    is_target = torch.arange(len(rows), device=rows.device) == ids[:, None]
    logits = torch.cat([own, logits.masked_fill(is_target, -torch.inf)], dim=1)
    return functional.cross_entropy(logits, torch.zeros_like(ids), reduction="sum")
