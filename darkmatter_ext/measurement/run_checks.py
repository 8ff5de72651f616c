"""Check whether the SAEs a run measures look misloaded. See `saes/sanity.py` for the signs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkmatter_ext.activations.sources import Source
from darkmatter_ext.measurement.tokens import TokenRoles
from darkmatter_ext.runtime.storage import atomic_file
from darkmatter_ext.saes.encoders import Encode
from darkmatter_ext.saes.sanity import SAMPLE_TOKENS, misloaded, signs

SAMPLE_CONTEXTS = 8


class RunChecks:
    """Signs of misloaded SAEs, looked for when each is first loaded and kept with the run's state for later reports."""

    def __init__(self, folder: Path, samples: Callable[[], Mapping[str, Tensor]]) -> None:
        self._path = folder / "sae_signs.json"
        self._samples = functools.cache(samples)  # hook point -> [n, d] measured tokens, read once if at all
        self._found: dict[str, list[str]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def see(
        self, name: str, hook: str, sae: Any, encode: Encode | None, expected_l0: float | None, *, writes: str = ""
    ) -> None:
        """Check an SAE, once. `encode`: if it is used with its own encoder; `writes`: the hook point a transcoder writes."""
        if name not in self._found:
            samples = self._samples()
            target = samples[writes] if writes and writes != hook else None
            self._found[name] = signs(sae, samples[hook], target, expected_l0=expected_l0, encode=encode)

    def save(self) -> None:
        """Save what was found; one process of a run does this."""
        with atomic_file(self._path) as part:
            part.write_text(json.dumps(self._found))

    def notes(self) -> list[str]:
        """What looks wrong, as notes for a result."""
        return [misloaded(name, sign) for name, every in self._found.items() for sign in every]


def measured_samples(source: Source, hooks: Sequence[str], roles: TokenRoles, device: str = "cpu") -> dict[str, Tensor]:
    """[n, d] measured tokens of the first contexts at each hook point, at most SAMPLE_TOKENS, spread over them.

    The tokens are the same at all hook points: those whose norm is not unusual at any of them.
    """
    batch = source.read(list(range(min(SAMPLE_CONTEXTS, source.n_contexts))))
    wanted = roles.wanted(batch.tokens)
    every = {hook: batch.activations[hook][wanted].float() for hook in hooks}
    usual = torch.ones(int(wanted.sum()), dtype=torch.bool)
    if roles.settings.max_norm_ratio > 0 and len(usual):
        for rows in every.values():
            norms = rows.norm(dim=-1)
            usual &= (norms <= roles.settings.max_norm_ratio * norms.median()).cpu()
    places = usual.nonzero().flatten()
    chosen = places[torch.linspace(0, max(0, len(places) - 1), min(len(places), SAMPLE_TOKENS)).long()]
    return {hook: rows[chosen.to(rows.device)].to(device) for hook, rows in every.items()}
