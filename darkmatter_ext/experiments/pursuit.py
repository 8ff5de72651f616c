"""FVU and its linear part with pursuit over the SAE's dictionary instead of its encoder.

Is the encoder to blame? The SAE's own latents, pursuit from zero, and a refit, side by side.

Engels et al. ask whether a better encoder would remove the nonlinear error: the dictionary is kept, and the codes are
chosen by pursuit at the SAE's own L0, token by token (figure 10a: over widths). The refit also keeps the encoder's choice
of latents and only improves their values (non-negative least squares).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import presets
from darkmatter_ext.measurement.run import measured, prepare
from darkmatter_ext.measurement.settings import Settings
from darkmatter_ext.measurement.site_saes import Make
from darkmatter_ext.ops.pursuit import METHODS
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.sae_table import sae_rows, sae_table
from darkmatter_ext.report.style import BLUE, GREEN, ORANGE, interval_bars, new_panels, width_axis
from darkmatter_ext.runtime.inputs import require_one_of
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import as_encoder, pursuit_encoder, refit_encoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIANTS = {"encoder": "the SAE itself", "pursuit": "pursuit from zero", "refit": "the encoder's latents, refitted"}


@dataclass(frozen=True)
class PursuitSettings(Settings):
    """Compare SAEs' encoders with pursuit over their dictionaries at the same L0, token by token."""

    method: str = "gradient"
    """gradient, matching or orthogonal (non-negative)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("method", METHODS, self.method)


PRESETS = presets(PursuitSettings, {"widths": (512, 1024, 2048)})


def plan(settings: PursuitSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    return [
        *plan_lines(settings),
        *(f"variant   {about}" for about in VARIANTS.values()),
        f"pursuit   {settings.method}",
    ]


def encoders(method: str) -> dict[str, Make]:
    """The three ways to use an SAE, named as in VARIANTS."""
    return {
        "encoder": as_encoder,
        "pursuit": functools.partial(pursuit_encoder, method=method),
        "refit": refit_encoder,
    }


def run(settings: PursuitSettings, stages: Stages) -> Result:
    """Measure FVU, FVU_nonlinear, R2 and L0 of every SAE with every encoder.

    Raises ValueError for bad settings, an SAE with maps that pursuit cannot handle; RuntimeError for a damaged cache.
    """
    found = measured(prepare(settings, stages), stages, encoders=encoders(settings.method))
    numbers = found.sae_numbers()
    notes = [f"Pursuit ({settings.method}) takes as many steps at each token as the encoder has active latents there."]
    return measured_result("pursuit", found, stages, numbers, notes=notes)


PAPER_PURSUIT = "total FVU 3 to 5% lower, nonlinear error very slightly lower"


table = sae_table  # one row per SAE


def reading(result: Result) -> list[str]:
    """What pursuit and the refit change compared with the encoder."""
    rows = sae_rows(result)
    lines = []
    encoders = {row["sae"]: row for row in rows if row["variant"] == "encoder"}
    for row in rows:
        if row["variant"] == "encoder":
            continue
        encoder = encoders[row["sae"]]
        change = row["fvu"] / encoder["fvu"] - 1
        nonlinear = row["fvu_nonlinear"] / encoder["fvu_nonlinear"] - 1
        lines.append(
            f"{row['name']}: FVU {encoder['fvu']:.3f} to {row['fvu']:.3f} ({change:+.0%}), FVU nonlinear "
            f"{encoder['fvu_nonlinear']:.3f} to {row['fvu_nonlinear']:.3f} ({nonlinear:+.0%}), L0 {row['l0']:.1f} "
            f"({encoder['l0']:.1f} of the encoder)."
        )
    return [*lines, f"The paper, gradient pursuit on Gemma Scope: {PAPER_PURSUIT}."]


_VARIANTS = {
    "encoder": ("the SAE's own encoder", BLUE, "o"),
    "pursuit": ("pursuit, same L0", ORANGE, "s"),
    "refit": ("the encoder's latents, refitted", GREEN, "^"),
}


def by_width(result: Result) -> Figure:
    """FVU and FVU_nonlinear by width, with the encoder, with pursuit at its L0, and with its latents refitted."""
    figure, panels = new_panels(3.0, 2)
    titles = {"fvu": "FVU", "fvu_nonlinear": "FVU nonlinear"}
    for axes, (quantity, title) in zip(panels, titles.items(), strict=True):
        for variant, (label, colour, marker) in _VARIANTS.items():
            saes = [sae for sae in result.series["saes"] if sae["variant"] == variant]
            saes.sort(key=lambda sae: sae["d_sae"])
            values, errors = interval_bars(result, [f"{sae['name']}/{quantity}" for sae in saes])
            style = f"{marker}-" if len({sae["d_sae"] for sae in saes}) == len(saes) else marker
            axes.errorbar(
                [sae["d_sae"] for sae in saes], values, yerr=errors, fmt=style, markersize=4, linewidth=1,
                color=colour, label=label,
            )  # fmt: skip
        width_axis(axes, [sae["d_sae"] for sae in result.series["saes"]])
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("fraction of variance")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


FIGURES = {"widths": by_width}
