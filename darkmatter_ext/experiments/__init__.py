"""The experiments by name. Each module has a config dataclass, `plan(config)` and `run(config, stages) -> Result`."""

from __future__ import annotations

import importlib
from types import ModuleType

EXPERIMENTS = {
    "baselines": "what predicts the norm of the error: a linear probe, or token mean, loss, L0 and the activation's norm?",
    "decomposition": "how much of an SAE's error is linear in the activation (vector and norm tests, FVU)",
    "downstream": "what the linear and the nonlinear error cost the language model, in cross-entropy and KL",
    "earlier-layers": "what SAE outputs of earlier sites say about the error and its linear and nonlinear part",
    "error-saes": "SAEs trained on the linear and the nonlinear error: FVU, dead latents, interpretability",
    "latent-alignment": "do latents that predict a large error have a large mean active value?",
    "norm-test": "how well a linear map of x predicts six squared norms, over a family of SAEs",
    "pathology": "is Sae(x) worse for the language model than other points at the same distance from x?",
    "per-token": "which tokens have large error: the error norm of one SAE predicted from another's, of several widths",
    "pursuit": "FVU and its linear part with pursuit over the SAE's dictionary instead of its encoder",
    "scaling": "FVU, FVU_nonlinear and both prediction tests over width and L0, with the power law",
    "synthetic": "does the split into linear and nonlinear error find planted noise and ablated latents?",
}


def experiment(name: str) -> ModuleType:
    """The module of an experiment. Raises ValueError naming the known ones."""
    if name not in EXPERIMENTS:
        raise ValueError(f"EXPERIMENT: must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    return importlib.import_module(f"darkmatter_ext.experiments.{name.replace('-', '_')}")
