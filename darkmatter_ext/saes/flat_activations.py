"""Prepare an SAE for raw activations: heads flattened, scaling folded in."""

from __future__ import annotations

import copy
from typing import Any

from darkmatter_ext.runtime.inputs import InputError

# SAELens' values of `normalize_activations` whose factor is not among the weights. An SAE that still has one was saved
# before the factor was folded in, and its latents are meaningless on raw activations.
SCALED, WHITENED = "expected_average_only_in", "covariance_whitening"


def why_not_usable(sae: Any) -> str:
    """Why an SAE cannot take raw activations, as "rule, got value"; empty if it can."""
    kind = getattr(getattr(sae, "cfg", None), "normalize_activations", "none")
    fold = {SCALED: "fold_activation_norm_scaling_factor", WHITENED: "fold_activation_whitening"}.get(kind)
    return (
        f"must have its activation scaling folded in (sae.{fold}), got normalize_activations {kind!r}" if fold else ""
    )


def for_flat_activations(sae: Any) -> Any:
    """A twin of the SAE that takes x [n, d] with heads flattened; it shares the caller's weights and hook points.

    The caller's object keeps its class and attributes, whatever is done to the twin.

    Raises ValueError if the SAE needs activations scaled by a factor that it does not carry.
    """
    if reason := why_not_usable(sae):
        raise InputError(f"sae: {reason}")
    twin = copy.copy(sae)
    if hasattr(twin, "_setup_activation_normalization"):
        twin._setup_activation_normalization()  # the closures keep state on the object they were made for
    if getattr(twin, "hook_z_reshaping_mode", False):
        twin.turn_off_forward_pass_hook_z_reshaping()
    return twin
