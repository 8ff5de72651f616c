"""Figures drawn from a Result alone, never from live objects: a figure can always be made again from its file.

One module an experiment; `style.py` is what they share.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from darkmatter_ext.figures import (
    baselines,
    decomposition,
    downstream,
    earlier_layers,
    error_saes,
    latent_alignment,
    norm_test,
    pathology,
    per_token,
    pursuit,
    scaling,
    synthetic,
)
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import STYLE
from darkmatter_ext.runtime.storage import atomic_file

FIGURES: dict[str, dict[str, Callable[[Result], Any]]] = {
    "baselines": {"r2": baselines.r2_by_layer},
    "decomposition": {
        "fvu": decomposition.fvu_by_width,
        "norm_test": decomposition.norm_test,
        "per_token": decomposition.per_token_error,
    },
    "downstream": {"losses": downstream.losses, "recovered": downstream.recovered},
    "earlier-layers": {"parts": earlier_layers.parts},
    "error-saes": {"fvu": error_saes.fvu, "detection": error_saes.detection},
    "latent-alignment": {"scatter": latent_alignment.scatter, "correlations": latent_alignment.correlations},
    "norm-test": {"violins": norm_test.violins, "saes": norm_test.by_sae},
    "pathology": {"ratios": pathology.ratios, "gap": pathology.gap, "tokens": pathology.gap_by_token},
    "per-token": {"matrices": per_token.matrices, "curves": per_token.curves},
    "pursuit": {"widths": pursuit.by_width},
    "scaling": {"lines": scaling.lines, "contours": scaling.contours, "breakdown": scaling.breakdown},
    "synthetic": {"noise": synthetic.noise_grid, "ablation": synthetic.ablation},
}


def save_figures(result: Result, folder: Path, *, kind: str = "png") -> list[Path]:
    """Draw every figure of a result into `folder` as `<experiment>_<figure>.<kind>` (png, pdf or svg).

    Raises ValueError for an experiment without figures.
    """
    import matplotlib

    if result.experiment not in FIGURES:
        raise ValueError(f"RESULT: must be of {', '.join(FIGURES)}, got a result of {result.experiment!r}")
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES[result.experiment].items():
            if draw is decomposition.per_token_error and not result.series.get("excerpt"):
                continue  # SAEs of several sites: no scale in common
            path = folder / f"{result.experiment}_{name}.{kind}"
            with atomic_file(path) as part:
                draw(result).savefig(part)
            paths.append(path)
    return paths
