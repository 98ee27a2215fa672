"""What values settings may have: by their type, in words, and by the limits that their sections set.

    at_least(config, 1, "dim", "num_layers")  -->  ["dim must be at least 1; got 0"]
    as_typed(int, 1e6)                        -->  1000000

NaN is within no limit, and infinity within none.
"""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text, in quotes"}


def at_least(section: Any, least: float, *names: str) -> list[str]:
    """A sentence for each of these settings that is below `least` or infinite; null is left alone."""
    values = {name: getattr(section, name) for name in names}
    return [
        f"{name} must be {_finite(value)}at least {least}; got {value}"
        for name, value in values.items()
        if value is not None and not least <= value < math.inf
    ]


def above(section: Any, bound: float, *names: str) -> list[str]:
    """A sentence for each of these settings that is not above `bound`, or infinite."""
    values = {name: getattr(section, name) for name in names}
    return [
        f"{name} must be {_finite(value)}above {bound}; got {value}"
        for name, value in values.items()
        if not bound < value < math.inf
    ]


def _finite(value: float) -> str:
    return "finite and " if value == math.inf else ""


def within(section: Any, interval: str, *names: str) -> list[str]:
    """A sentence for each of these settings outside an interval as one writes it, such as '[0, 1)'."""
    low, high = map(float, interval[1:-1].split(","))
    return [
        f"{name} must be in {interval}; got {value}"
        for name, value in ((name, getattr(section, name)) for name in names)
        if not low <= value <= high
        or (value == low and interval[0] == "(")
        or (value == high and interval[-1] == ")")
    ]


def without_effect(section: Any, why: str, *names: str) -> list[str]:
    """A sentence for each of these settings that is not its default; `why` goes on after "has no effect"."""
    defaults = {one.name: one.default for one in fields(section)}
    return [
        f"{name} has no effect {why}; leave it out, or at {shown(defaults[name])}"
        for name in names
        if getattr(section, name) != defaults[name]
    ]


def hints_of(schema: type) -> dict[str, Any]:
    """Dotted key and type of all leaves."""
    found = {}
    for name, hint in get_type_hints(schema).items():
        if is_dataclass(hint):
            found |= {f"{name}.{key}": one for key, one in hints_of(cast(type, hint)).items()}
        else:
            found[name] = hint
    return found


def members_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union, else the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def choices_of(hint: Any) -> list[Any]:
    """All values of the Literals in `hint`."""
    return [v for one in members_of(hint) if get_origin(one) is Literal for v in get_args(one)]


def as_typed(hint: Any, value: Any) -> Any:
    """`value` as OmegaConf takes it for `hint`: whole numbers may be written as 1e6.

    Raises ValueError, with a reason or none, for what would be converted without a word (text of 1.10
    to '1.1', or 5 to true) and for numbers that are infinite, NaN or of more than 64 bits.
    """
    members = set(members_of(hint))
    if isinstance(value, list):
        of = next((get_args(one)[0] for one in members if get_origin(one) in (list, tuple)), Any)
        return value if of is str else [as_typed(of, one) for one in value]
    if members & {str, bool} and type(value) in {bool, int, float} - members:
        raise ValueError
    is_text = isinstance(value, str) and value.lower().strip().lstrip("+-") in (
        "inf",
        "infinity",
        "nan",
    )
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    if is_infinite or (is_text and float in members and str not in members):
        raise ValueError("which is not finite")
    if int in members and float not in members and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("which has more than 64 bits")
    return value


def described(hint: Any) -> str:
    """`hint` in words."""
    if get_origin(hint) is Literal:
        return f"one of {listed(get_args(hint))}"
    if len(members_of(hint)) > 1:
        return " or ".join(map(described, members_of(hint)))
    if get_origin(hint) in (list, tuple):
        # Texts in a list need no quotes but where they hold a comma.
        of = {str: "a text"}.get(get_args(hint)[0]) or described(get_args(hint)[0])
        return f"a list in brackets, [...], each {of}"
    return "null" if hint is type(None) else _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def listed(values: Iterable[Any]) -> str:
    """`values` as one writes them, with commas."""
    return ", ".join(map(shown, values))


def shown(value: Any) -> str:
    """`value` as one writes it in an override."""
    if isinstance(value, list | tuple):
        return f"[{listed(value)}]"
    is_word = value is None or isinstance(value, bool)
    return {None: "null", True: "true", False: "false"}[value] if is_word else str(value)


def unknown_key(key: str, keys: list[str]) -> str:
    """What is wrong with `key`, and the right one if it can be guessed."""
    inside = [one for one in keys if one.startswith(f"{key}.")]
    if inside:
        return f"'{key}' is a section; set its keys: {', '.join(inside)}"
    same_name = [one for one in keys if one.split(".")[-1] == key]
    hint = f"; did you mean {' or '.join(same_name)}?" if same_name else did_you_mean(key, keys)
    return f"unknown key '{key}'{hint}"


def did_you_mean(given: str, allowed: list[str]) -> str:
    """'; did you mean ...?' with the nearest of `allowed`, if one is near."""
    near = difflib.get_close_matches(given, allowed, 1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def assignments(values: Mapping[str, Any]) -> list[str]:
    """Settings as one writes them, `key=value` each, for hstu_rec.config.load."""
    return [
        f"{key}={value if isinstance(value, str | Path) else json.dumps(value, default=_plain_number)}"
        for key, value in values.items()
    ]


def _plain_number(value: Any) -> Any:
    """Of a number of numpy's or torch's. Raises ValueError for what is none."""
    if not hasattr(value, "item"):
        raise ValueError(f"a setting is a number, a text, true or false, or a list; got {value!r}")
    return value.item()
