"""Settings: from what a config says of a parameter to its value at one tensor.

A setting is one value; a gradient, a list of values spread evenly over the layers of a slice; or rules, a list of
{filter, value} of which the first counts whose filter stands in the name of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from glue.merge.mergekit.nouns import Loc, Settings

Kind = Literal["number", "whole", "truth", "word"]
KINDS = {"number": "a number", "whole": "a whole number", "truth": "true or false", "word": "a word"}
_TRUTHS = {"yes": True, "on": True, "true": True, "y": True, "t": True, "1": True,
           "no": False, "off": False, "false": False, "n": False, "f": False, "0": False}


def converted(value: Any, kind: Kind) -> Any:
    """One value of a kind, also where YAML 1.1 spells it otherwise: "0.5" is a number, `yes` is true.

    Raises ValueError where it is none.
    """
    if kind == "truth":
        truth = _TRUTHS.get(str(value).lower()) if isinstance(value, str | bool) or value in (0, 1) else None
        truth = bool(value) if isinstance(value, int | float) and value in (0, 1) else truth
        if truth is None:
            raise ValueError(f"{value!r} is not true or false")
        return truth
    if kind == "word":
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not a word")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is not a number")
    try:
        number = float(value)
        whole = int(number) if math.isfinite(number) else None
    except (ValueError, OverflowError):
        raise ValueError(f"'{value}' is not a number") from None
    if kind == "number":
        return number
    if whole is None or whole != number:
        raise ValueError(f"{value} is not a whole number")
    return whole


def evaluated(setting: Any, kind: Kind, tensor: str, t: float) -> Any:
    """The value of a setting at one tensor, or None where no rule of it fits.

    t  from 0 at the first layer of a slice to 1 at its last
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return converted(setting, kind)
    if any(isinstance(item, dict) for item in setting):
        for rule in setting:
            wanted = rule.get("filter")
            if wanted is None or wanted == "*" or (tensor and wanted in tensor):
                return evaluated(rule["value"], kind, tensor, t)
        return None
    return _along([converted(item, kind) for item in setting], kind, t) if setting else None


def _along(values: list[Any], kind: Kind, t: float) -> Any:
    """A gradient at t: numbers lie on straight lines between those given, other values hold until the next begins."""
    if kind in ("truth", "word"):
        return values[int(t * (len(values) - 1))]
    place = t * (len(values) - 1)
    first = int(place)
    second = min(len(values) - 1, first + 1)
    value = (1 - (place - first)) * values[first] + (place - first) * values[second]
    low, high = sorted((values[first], values[second]))
    return converted(min(max(value, low), high), kind)  # a share between 1 and 1 is not to be rounded above 1


def found(word: str, kind: Kind, scopes: Iterable[Settings], tensor: str, t: float) -> Any:
    """The value of a parameter at one tensor: of the first scope that has one for it, or None."""
    for scope in scopes:
        if word in scope and (value := evaluated(scope[word], kind, tensor, t)) is not None:
            return value
    return None


def ends(setting: Any) -> Iterator[tuple[Loc, Any]]:
    """Every single value of a setting, with the path to it."""
    if isinstance(setting, dict):
        yield from (((*("value",), *loc), value) for loc, value in ends(setting.get("value")))
    elif isinstance(setting, list):
        yield from (((k, *loc), value) for k, item in enumerate(setting) for loc, value in ends(item))
    else:
        yield (), setting


def malformed(setting: Any, nested: bool = False) -> Iterator[tuple[Loc, str]]:
    """What is wrong with the form of a setting, with the path to it; values are not looked at."""
    if setting is None:
        yield (), "has no value"
    elif isinstance(setting, dict):
        if nested:
            yield (), "has rules inside of a rule; the value of a rule is one value or a list of them"
            return
        yield from (((word,), f"has a rule with the unknown word '{word}'; a rule has 'filter' and 'value'")
                    for word in setting if word not in ("filter", "value"))
        if not isinstance(setting.get("filter"), str | None):
            yield ("filter",), "has a filter that is not text; quote it"
        if "value" not in setting:
            yield (), "has a rule without 'value'"
        else:
            yield from ((("value", *loc), what) for loc, what in malformed(setting["value"], nested=True))
    elif isinstance(setting, list):
        rules = sum(isinstance(item, dict) for item in setting)
        if rules and (nested or rules < len(setting)):
            yield (), "mixes rules and values; write a list of values, or a list of  {filter: ..., value: ...}"
            return
        for k, item in enumerate(setting):
            if isinstance(item, list):
                yield (k,), "has a list inside of a list"
            else:
                yield from (((k, *loc), what) for loc, what in malformed(item, nested))
