"""A catalogue's items without an array of them: popularity, its ranks and successors in closed form.

rank of a draw    floor(x) - 1, where x in [1, N + 1) has a density in proportion to x ** -zipf_exponent
item of a rank    (stride * rank + offset) mod N
successor         (item + step) mod N
"""

import math
from dataclasses import dataclass

import numpy as np

from hstu_rec.data.hashes import mixed, stream, uniform


@dataclass(frozen=True)
class PowerLaw:
    """A density in proportion to x ** -exponent on [low, high)."""

    low: float
    high: float
    exponent: float

    def at(self, shares: np.ndarray) -> np.ndarray:
        """float64: the x below which `shares` in (0, 1) of the mass lie."""
        rest, span = 1 - self.exponent, math.log(self.high / self.low)
        if rest == 0:
            return self.low * np.exp(span * shares)
        return self.low * np.exp(np.log1p(shares * math.expm1(rest * span)) / rest)

    def below(self, x: np.ndarray) -> np.ndarray:
        """float64: the share of the mass below `x`."""
        rest, span = 1 - self.exponent, math.log(self.high / self.low)
        log = np.log(x / self.low)
        return log / span if rest == 0 else np.expm1(rest * log) / math.expm1(rest * span)


class ZipfCatalogue:
    """The items: popularity and successors. Ranks and items are int64 in 0 .. N - 1; rank 0 is drawn most."""

    def __init__(self, num_items: int, zipf_exponent: float, seed: int) -> None:
        self.num_items = size = num_items
        self._law = PowerLaw(1, size + 1, zipf_exponent)
        drawn = mixed(stream(seed, "catalogue"), np.arange(3)).tolist()
        # Far from 0 and N: neighbours in popularity, or by the rule, are far apart among the items.
        self._stride, self._step = (
            _coprime(size // 4 + d % (size // 2 + 1), size) for d in drawn[:2]
        )
        self._offset = drawn[2] % size
        self._inverse = pow(self._stride, -1, size)

    def draw(self, bits: np.ndarray) -> np.ndarray:
        """Ranks by popularity, a function of random bits (uint64)."""
        ranks = self._law.at(uniform(bits)).astype(np.int64) - 1
        return np.minimum(ranks, self.num_items - 1)  # x may be rounded to N + 1

    def popularity(self, ranks: np.ndarray) -> np.ndarray:
        """float64: probability that a draw has the rank; they sum to 1."""
        return self._law.below(ranks + 2.0) - self._law.below(ranks + 1.0)

    def items(self, ranks: np.ndarray) -> np.ndarray:
        """The items of the ranks."""
        return (ranks * self._stride + self._offset) % self.num_items

    def ranks(self, items: np.ndarray) -> np.ndarray:
        """The ranks of the items."""
        return (items - self._offset) % self.num_items * self._inverse % self.num_items

    def successors(self, items: np.ndarray, steps: np.ndarray | int = 1) -> np.ndarray:
        """The items that the rule leads to after so many steps (below 2**31; negative ones lead back)."""
        return (items + steps * np.int64(self._step)) % self.num_items


def _coprime(near: int, size: int) -> int:
    """The least number from `near` on that has no divisor in common with `size`."""
    return next(n for n in range(near, near + size + 1) if math.gcd(n, size) == 1) % size
