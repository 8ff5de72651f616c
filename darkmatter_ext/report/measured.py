"""The result of a measurement: what every experiment on one has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from darkmatter_ext.measurement.many_saes import Measured
from darkmatter_ext.report.result import Result, provenance
from darkmatter_ext.runtime.progress import Stages

if TYPE_CHECKING:
    import numpy as np


def measured_result(
    experiment: str,
    found: Measured,
    stages: Stages,
    numbers: Mapping[str, float],
    *,
    series: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """The result of an experiment on a measurement: its numbers beside token counts, SAEs, notes and provenance."""
    groups = found.config["interval_groups"]
    intervals = (
        f"Intervals: 95 %, leaving out one of {groups} groups of held-out contexts at a time; maps stay as fitted."
    )
    return Result(
        experiment=experiment,
        config=found.config,
        numbers=found.numbers | dict(numbers),
        series={"saes": found.saes, **(series or {})},
        arrays=dict(arrays or {}),
        notes=[*found.notes, *notes, *([intervals] if groups > 1 else [])],
        seconds=stages.seconds,
        provenance=provenance(found.config["device"]) | found.provenance,
    )
