"""The result of an experiment on measured SAEs: what all of them report besides their own numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from darkmatter_ext.measurement.exploration import Exploration
from darkmatter_ext.measurement.notes import few_tokens_note, token_notes
from darkmatter_ext.measurement.run import Inputs, Measurement
from darkmatter_ext.measurement.run_checks import measured_samples
from darkmatter_ext.measurement.site_saes import signs_of
from darkmatter_ext.measurement.tokens import FIT
from darkmatter_ext.report.result import Result, provenance
from darkmatter_ext.runtime.progress import Stages

if TYPE_CHECKING:
    import numpy as np


def measured_result(
    experiment: str,
    found: Measurement,
    stages: Stages,
    numbers: Mapping[str, float],
    *,
    series: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
    notes: Sequence[str] = (),
    exploration: Exploration | None = None,
) -> Result:
    """The result of a measurement: its numbers with token counts, SAEs, notes, provenance and what the page explores."""
    groups = found.config["interval_groups"]
    intervals = (
        f"Intervals: 95 %, leaving out one of {groups} groups of held-out contexts at a time; maps stay as fitted."
    )
    return Result(
        experiment=experiment,
        config=found.config,
        numbers=found.numbers | dict(numbers),
        series={"saes": found.saes, **(series or {}), **_about(exploration)},
        arrays={**(arrays or {}), **({} if exploration is None else exploration.arrays)},
        notes=[*found.notes, *notes, *([intervals] if groups > 1 else [])],
        seconds=stages.seconds,
        provenance=provenance(found.config["device"]) | found.provenance,
    )


def _about(exploration: Exploration | None) -> dict[str, Any]:
    return {} if exploration is None else {"explored": exploration.about}


def stored_result(
    experiment: str,
    inputs: Inputs,
    stages: Stages,
    numbers: Mapping[str, float],
    *,
    series: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
    notes: Sequence[str] = (),
    exploration: Exploration | None = None,
) -> Result:
    """The result of an experiment that reads stored tokens itself; with several sites, a note gives the counts of each."""
    one = len(inputs.stored) == 1
    counts: dict[str, float] = {}
    about: list[str] = []
    for hook, tokens in inputs.stored.items():
        counts = tokens.numbers()
        own = [*token_notes(inputs.resolved, counts), *few_tokens_note(tokens.cache.d_in, tokens.count(FIT))]
        about += own if one else [f"{hook}: {note}" for note in own]
    if inputs.settings.saes.sae:
        hooks = list(inputs.stored)
        samples = measured_samples(inputs.source, hooks, inputs.roles, inputs.settings.device)
        about += [*inputs.resolved.usage.notes, *signs_of(inputs.saes, samples)]
    return Result(
        experiment=experiment,
        config=inputs.config(),
        numbers=(counts if one else {}) | dict(numbers),
        series={"saes": [sae.listed for sae in inputs.saes], **(series or {}), **_about(exploration)},
        arrays={**(arrays or {}), **({} if exploration is None else exploration.arrays)},
        notes=[*about, *notes],
        seconds=stages.seconds,
        provenance=provenance(inputs.settings.device) | {"text_sha256": inputs.text},
    )
