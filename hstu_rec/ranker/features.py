"""What events carry beside item and time, as vectors that are added to the rows of items; and the tasks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Of the first embeddings and weights, as the encoder's.
INIT_STD = 0.02
# A few numbers far from all others would drown what else is known.
MAX_DEVIATIONS = 10.0
# Categories of a column of numbers are 0, 1, .. up to its largest: more want a table of their own.
MAX_CATEGORIES = 2**16
TASK = re.compile(r"\s*([^<>=!]+?)\s*(>=|<=|==|>|<)\s*(.+?)\s*")


@dataclass(frozen=True)
class Feature:
    """A column, one value an event."""

    name: str
    num_categories: int = 0
    """Values are whole numbers below this, each with a vector; 0 for a number, which scales one vector."""
    center: float = 0.0
    scale: float = 1.0
    """Of a number, what it is lessened by and then divided by; MAX_DEVIATIONS at most is left."""
    has_missing: bool = False
    """Events may have none, which is NaN and has a vector of its own."""


class EventFeatures(nn.Module):
    """[n, D] to add to rows of items: the sum of a vector a feature."""

    def __init__(self, features: list[Feature], dim: int) -> None:
        super().__init__()
        self.features = features
        self.vectors = nn.ParameterList(
            nn.Parameter(torch.randn((one.num_categories or 1) + one.has_missing, dim) * INIT_STD)
            for one in features
        )

    def forward(self, values: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Of values [n] by name, of any number type; [n, D] as `like`.

        Raises ValueError for a feature that is missing, of another length, no category, or no number.
        """
        total = torch.zeros_like(like)
        for feature, vectors in zip(self.features, self.vectors, strict=True):
            if feature.name not in values:
                raise ValueError(
                    f"feature '{feature.name}' is missing; got {', '.join(values) or 'none'}"
                )
            given = values[feature.name]
            if given.shape != like.shape[:1]:
                raise ValueError(
                    f"feature '{feature.name}' must be [{len(like)}], a value an event; got "
                    f"{[*given.shape]}"
                )
            is_missing = given.isnan() & feature.has_missing
            known = torch.where(is_missing, 0, given)
            if feature.num_categories:
                own = vectors[self._categories(feature, known)]
            else:
                if not known.isfinite().all():
                    raise ValueError(
                        f"feature '{feature.name}' must be numbers; got NaN or infinity"
                    )
                number = (known.to(like.dtype) - feature.center) / feature.scale
                own = number.clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)[:, None] * vectors[:1]
            total = total + torch.where(is_missing[:, None], vectors[-1], own)
        return total

    def _categories(self, feature: Feature, given: Tensor) -> Tensor:
        count = feature.num_categories
        is_one = (given >= 0) & (given < count) & (given == given.floor())
        if not is_one.all():
            bad = given[~is_one]
            raise ValueError(
                f"feature '{feature.name}' has the categories 0..{count - 1}; got {len(bad)} other values, "
                f"for example {bad[:5].tolist()}"
            )
        return given.long()


def features_of(names: list[str], categories: list[str], facts: dict[str, Any]) -> list[Feature]:
    """The columns of those names of a prepared dataset, whose stats.json tells `facts` of each.

    categories: columns of numbers whose values are categories. Raises ValueError for what the dataset lacks,
    and for categories that are none.
    """
    found = []
    for name in names:
        if name not in facts:
            raise ValueError(
                f"the dataset has no feature '{name}' (it has {', '.join(facts) or 'none'}); prepare it with "
                f"'feature_columns=[{name}]'"
            )
        one = facts[name]
        has_missing = one.get("num_missing", 0) > 0
        if "values" in one:
            found.append(Feature(name, len(one["values"]), has_missing=has_missing))
        elif name in categories:
            if one["min"] < 0 or one["max"] >= MAX_CATEGORIES or not one["is_whole"]:
                kind = "" if one["is_whole"] else ", with fractions"
                raise ValueError(
                    f"ranker.categories: '{name}' is from {one['min']:g} to {one['max']:g}{kind}; categories "
                    f"are whole numbers from 0 to {MAX_CATEGORIES - 1}"
                )
            found.append(Feature(name, int(one["max"]) + 1, has_missing=has_missing))
        else:
            scale = one["deviation"] or 1.0
            found.append(Feature(name, 0, one["mean"], scale, has_missing))
    if unknown := [name for name in categories if name not in names]:
        raise ValueError(
            f"ranker.categories {', '.join(unknown)} is none of the columns that are used: "
            f"{', '.join(names) or 'none'}"
        )
    return found


@dataclass(frozen=True)
class Task:
    """What is predicted: whether a column is so."""

    text: str
    column: str
    sign: str
    value: str

    @classmethod
    def of(cls, text: str) -> "Task":
        """Raises ValueError for a text of another form than 'rating>=4' or 'action==like'."""
        match = TASK.fullmatch(text)
        if match is None:
            raise ValueError(f"tasks must be like rating>=4 or action==like; got '{text}'")
        return cls(text, match[1], match[2], match[3])

    def limit(self, facts: dict[str, Any]) -> float:
        """The number that the column is compared with. Raises ValueError for what it never is."""
        values = facts.get(self.column, {}).get("values")
        if values is None:
            try:
                return float(self.value)
            except ValueError:
                raise ValueError(
                    f"task '{self.text}': '{self.column}' holds numbers; compare it with one"
                ) from None
        if self.sign != "==" or self.value not in values:
            raise ValueError(
                f"task '{self.text}': '{self.column}' holds texts; compare it by == with one of "
                f"{', '.join(values[:10])}"
            )
        return float(values.index(self.value))

    def labels(self, values: Tensor, limit: float) -> Tensor:
        """float32 [n] of 0 and 1, NaN where the column has no value."""
        limit = float(torch.tensor(limit, dtype=values.dtype))  # 0.1 as the column holds it
        compared = {
            ">=": values >= limit,
            "<=": values <= limit,
            ">": values > limit,
            "<": values < limit,
            "==": values == limit,
        }
        return torch.where(values.isnan(), torch.nan, compared[self.sign].float())
