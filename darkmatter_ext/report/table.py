"""The table of a result, and how numbers are formatted in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Headline numbers as text; the first column names each row."""

    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]


def shown(value: object, form: str) -> str:
    """A formatted value; a number that could not be computed is shown as an en dash."""
    return "–" if isinstance(value, float) and math.isnan(value) else form.format(value)


def with_interval(numbers: Mapping[str, float], name: str, form: str) -> str:
    """A number with its confidence interval, from `name`, `name/low` and `name/high`."""
    low, high = (shown(numbers.get(f"{name}/{end}", math.nan), form) for end in ("low", "high"))
    value = shown(numbers[name], form)
    return value if low == high == "–" else f"{value} ({low} to {high})"
