"""Candidates after a cached history, beside each with a copy of the history of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from hstu_rec import distributed
from hstu_rec.benchmarks.timing import median_s
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.settings import at_least

# Copies that are encoded together, to bound memory; more at once take as long each.
COPIES = 1000


@dataclass(frozen=True, kw_only=True)
class CandidateTimes:
    """What is timed."""

    num_candidates: list[int] = field(default_factory=lambda: [1000, 10_000])
    """Candidates of the user."""
    history_len: int = 200
    """Events of the user."""
    dim: int = 64
    """Width D of items and tokens."""
    num_layers: int = 2
    """Layers."""
    num_heads: int = 2
    """Heads."""
    repeats: int = 5
    """Times that each is run, after three to warm up; the median is shown."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "history_len", "dim", "num_layers", "num_heads", "repeats")
        if not self.num_candidates or min(self.num_candidates) < 1:
            found.append(f"num_candidates must be at least 1; got {self.num_candidates}")
        return found


def candidate_times(config: CandidateTimes, device: torch.device) -> Iterator[str]:
    """A line for each number of candidates. Raises AssertionError where the two differ."""
    distributed.use_precision("float32")
    torch.manual_seed(0)
    shape = EncoderConfig(
        dim=config.dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        max_history_len=config.history_len,
    )
    encoder = HSTUEncoder(shape).to(device).eval()
    events = torch.randn(config.history_len, config.dim, device=device)
    times = torch.randint(0, 10**7, (config.history_len,), device=device).sort().values
    at = torch.tensor([10**7], device=device)
    yield f"a history of {config.history_len} events; float32; ms of all candidates"
    for count in config.num_candidates:
        candidates = torch.randn(count, config.dim, device=device)
        arguments = encoder, events, times, candidates, at
        with torch.no_grad():
            found, expected = _cached(*arguments), _uncached(*arguments)
            difference = float((found - expected).abs().max() / expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            cached, uncached = (
                median_s(partial(one, *arguments), config.repeats, device)
                for one in (_cached, _uncached)
            )
        yield (
            f"  {count:7,d} candidates  cached {cached * 1e3:9.1f} ms  uncached {uncached * 1e3:9.1f} ms  "
            f"x {uncached / cached:.1f}  largest difference {difference:.1e} of the largest number"
        )


def _cached(
    encoder: HSTUEncoder, events: Tensor, times: Tensor, candidates: Tensor, at: Tensor
) -> Tensor:
    """[C, D], the history's encoding included."""
    offsets = torch.tensor([0, len(events)], device=events.device)
    history = encoder.encode_history(events, offsets, times)
    counts = torch.tensor([len(candidates)], device=events.device)
    return encoder.encode_candidates(candidates, counts, history, at)


def _uncached(
    encoder: HSTUEncoder, events: Tensor, times: Tensor, candidates: Tensor, at: Tensor
) -> Tensor:
    """[C, D]: every candidate is the last event of a user of its own."""
    size, found = len(events) + 1, []
    for part in candidates.split(COPIES):
        rows = torch.cat([events.expand(len(part), -1, -1), part[:, None]], dim=1).flatten(0, 1)
        when = torch.cat([times, at]).repeat(len(part))
        offsets = torch.arange(0, len(rows) + 1, size, device=rows.device)
        one = torch.ones(len(part), dtype=torch.int64, device=rows.device)
        found.append(encoder(rows, offsets, when, num_targets=one)[offsets[1:] - 1])
    return torch.cat(found)
