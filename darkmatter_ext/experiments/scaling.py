"""FVU, FVU_nonlinear and both prediction tests over width and L0, with the power law.

How FVU, its nonlinear part and both prediction tests depend on width and L0 (figures 1 to 4).

At a fixed L0, FVU follows c + a W^m in the width W, while FVU_nonlinear hardly changes. This splits the error (figure 1)
into what more latents would remove, curve - c; linear error that no width removes, c - mean FVU_nonlinear; what a better
encoder removes, mean FVU_nonlinear - FVU_nonlinear under pursuit at the same L0; and the rest.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from darkmatter_ext.estimators.intervals import Interval
from darkmatter_ext.estimators.power_law import MINIMUM_WIDTHS, PowerLaw, fit_power_law
from darkmatter_ext.measurement.exploration import explored
from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import KS, WIDTHS, presets
from darkmatter_ext.measurement.resolved import resolve
from darkmatter_ext.measurement.run import Inputs, Measurement, measured, prepare
from darkmatter_ext.measurement.settings import Settings, ToTrain, replaced
from darkmatter_ext.measurement.site_saes import Make
from darkmatter_ext.report.contours import contour_panels
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SERIES,
    SKY,
    interval_bars,
    new_figure,
    new_panels,
    width_axis,
)
from darkmatter_ext.report.table import Table, shown, with_interval
from darkmatter_ext.runtime.inputs import InputError, require
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import as_encoder, pursuit_encoder, random_directions, shuffled_sae

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

L0_TOLERANCE = (
    1.3  # an SAE counts as being at the law's L0 if it is off by at most this factor (the paper: 48 to 64 for 60)
)
CONTROLS = {
    "shuffled decoder": "control: the widest SAE with its decoder rows permuted",
    "random directions": "control: as many random directions, TopK of the tied encoder",
}
PURSUIT = "pursuit"


@dataclass(frozen=True)
class ScalingSettings(Settings):
    """See how FVU and its linear and nonlinear parts depend on the width and L0 of SAEs."""

    l0: float = 60.0
    """L0 of the power law: at each width, the SAE nearest to it is used, if it is off by a factor of at most 1.3"""
    with_pursuit: bool = False
    """also measure gradient pursuit over these SAEs' dictionaries, to see what a better encoder would remove (minutes)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.l0 > 0, "l0", "must be above 0", self.l0)
        widths = self.saes.widths
        if not self.saes.sae and len(widths) < 2:
            raise InputError(f"widths: must name at least 2 widths to see how error scales, got {list(widths)}")


PRESETS = presets(
    ScalingSettings,
    {"widths": WIDTHS, "ks": KS, "l0": 32.0, "sae_seeds": 3, "frozen": ("decoder", "soft-decoder", "encoder")},
)


def plan(settings: ScalingSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    pursued = ["pursuit   gradient, over the dictionaries of these SAEs"] if settings.with_pursuit else []
    return [
        *plan_lines(settings),
        f"law       c + a W^m at L0 about {settings.l0:g}, from {MINIMUM_WIDTHS} widths on",
        *pursued,
        *(f"          {about}" for about in CONTROLS.values()),
    ]


def at_fixed_l0(saes: list[dict[str, Any]], numbers: dict[str, float], l0: float) -> list[dict[str, Any]]:
    """For each width, in order, the SAE whose measured L0 is nearest to `l0`, unless off by more than L0_TOLERANCE."""

    def distance(sae: dict[str, Any]) -> float:
        own = numbers[f"{sae['name']}/l0"]
        return abs(math.log(own / l0)) if own > 0 else math.inf

    widths = sorted({sae["d_sae"] for sae in saes})
    nearest = [min((sae for sae in saes if sae["d_sae"] == width), key=distance) for width in widths]
    return [sae for sae in nearest if distance(sae) <= math.log(L0_TOLERANCE)]


def _candidates(inputs: Inputs, saes: list[dict[str, Any]], l0: float, architecture: str) -> list[dict[str, Any]]:
    """The SAEs that the law may be fitted to.

    For SAEs trained here: no controls, one architecture, the k nearest to l0 if there are several, the first seed.
    """
    trained = {sae.name: sae.trained for sae in inputs.saes if sae.trained is not None}
    if not trained:
        return saes
    ks = {own.k for own in trained.values()}
    nearest = min(ks, key=lambda k: (abs(k - l0), k)) if len(ks) > 1 else min(ks)
    wanted = [ToTrain(architecture, own.width, nearest) for own in trained.values()]
    return [sae for sae in saes if trained[sae["name"]] in wanted]


def _other_seeds(inputs: Inputs, saes: list[dict[str, Any]], chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same SAEs, trained with other seeds."""
    first = [inputs.sae(sae["name"]).trained for sae in chosen]
    if None in first:
        return []
    trained = [(sae, inputs.sae(sae["name"]).trained) for sae in saes]
    return [sae for sae, own in trained if own is not None and own.seed and own._replace(seed=0) in first]


def breakdown(
    law: PowerLaw, saes: list[dict[str, Any]], numbers: dict[str, float], mean_nonlinear: Interval, *, pursued: bool
) -> dict[str, float]:
    """The four parts of FVU at each width of the law; the constant part has an interval, from those of c and the mean.

    `SAE/breakdown/absent`: what more latents would remove; `breakdown/linear`: linear error at any width;
    `SAE/breakdown/encoder`: what pursuit removes (0 without it); `SAE/breakdown/rest`: nonlinear error that remains.
    """
    mean = mean_nonlinear.value
    found = _difference(law.c, mean_nonlinear).numbers("breakdown/linear") | mean_nonlinear.numbers(
        "breakdown/nonlinear"
    )
    for name, sae in zip([sae["name"] for sae in saes], saes, strict=True):
        rest = numbers[f"{name} {PURSUIT}/fvu_nonlinear"] if pursued else mean
        found |= {
            f"{name}/breakdown/absent": law(sae["d_sae"]) - law.c.value,
            f"{name}/breakdown/encoder": mean - rest,
            f"{name}/breakdown/rest": rest,
        }
    return found


def _difference(a: Interval, b: Interval) -> Interval:
    """a - b for independent estimates: half-widths add in quadrature, on each side."""
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Interval(value, low, high)


def paired_numbers(site: SiteMeasurement, saes: list[dict[str, Any]], prefix: str = "paired") -> dict[str, float]:
    """`paired/QUANTITY`: widest minus narrowest; `paired/QUANTITY_per_doubling`: slope over log2 width; on the same tokens."""
    names = [sae["name"] for sae in saes]
    at = [math.log2(sae["d_sae"]) for sae in saes]
    middle = fmean(at)
    spread = math.fsum((place - middle) ** 2 for place in at)
    difference = site.contrast({names[-1]: 1.0, names[0]: -1.0})
    slope = site.contrast({name: (place - middle) / spread for name, place in zip(names, at, strict=True)})
    numbers: dict[str, float] = {}
    for key in ("fvu", "fvu_nonlinear"):
        numbers |= difference[key].numbers(f"{prefix}/{key}") | slope[key].numbers(f"{prefix}/{key}_per_doubling")
    return numbers


def _controls(inputs: Inputs, widest: dict[str, Any], numbers: dict[str, float], stages: Stages) -> Measurement:
    """The controls of the widest SAE, measured the same way."""
    l0, seed = max(1, round(numbers[f"{widest['name']}/l0"])), inputs.settings.seed
    controls: dict[str, Make] = {
        "shuffled decoder": lambda sae: as_encoder(shuffled_sae(sae, seed=seed)),
        "random directions": functools.partial(random_directions, l0=l0, seed=seed),
    }
    return measured(inputs, stages, saes=[inputs.sae(widest["name"])], encoders=controls)


def _law(saes: list[dict[str, Any]], numbers: dict[str, float], key: str) -> PowerLaw:
    return fit_power_law([sae["d_sae"] for sae in saes], [numbers[f"{sae['name']}/{key}"] for sae in saes])


def _check_saes(settings: ScalingSettings) -> None:
    """Raises InputError for given SAEs of only one width, or SAEs of several sites."""
    found = resolve(settings)
    if len(found.sites) > 1:
        raise InputError(f"sae: must be of one site to see how error scales, got {' and '.join(found.sites)}")
    widths = {sae.d_sae for sae in found.saes}
    if len(widths) == 1:
        raise InputError(f"sae: must be SAEs of at least 2 widths to see how error scales, got {sorted(widths)}")


def run(settings: ScalingSettings, stages: Stages) -> Result:
    """Measure all SAEs, fit the power law at l0, and take the error apart.

    Raises InputError for bad settings, SAEs of only one width or of several sites; StateError for damaged files.
    """
    if settings.measure.released:  # the released scaling script leaves out the first and the last position
        settings = replaced(settings, drop_positions=1)
    _check_saes(settings)
    inputs = prepare(settings, stages)
    found = measured(inputs, stages)
    numbers = found.sae_numbers()
    first, *others = settings.saes.architectures
    chosen = at_fixed_l0(_candidates(inputs, found.saes, settings.l0, first), numbers, settings.l0)
    notes: list[str] = []
    series: dict[str, Any] = {"law": [], "controls": [], "about": CONTROLS, "with_pursuit": settings.with_pursuit}
    series["others"] = {}  # other architectures: the names of their SAEs at the law's L0
    if chosen:
        if settings.with_pursuit:
            saes = [inputs.sae(sae["name"]) for sae in chosen]
            numbers |= measured(inputs, stages, saes=saes, encoders={PURSUIT: pursuit_encoder}).sae_numbers()
        controls = _controls(inputs, chosen[-1], numbers, stages)
        numbers |= controls.sae_numbers()
        series["controls"] = controls.saes
    if len(chosen) < MINIMUM_WIDTHS:
        notes.append(
            f"No power law: it needs {MINIMUM_WIDTHS} widths at L0 about {settings.l0:g}, there are {len(chosen)} "
            f"(of {len({sae['d_sae'] for sae in found.saes})} measured)."
        )
    else:
        site = found.site_of(chosen[0]["name"])
        points = [*chosen, *_other_seeds(inputs, found.saes, chosen)]
        law = _law(points, numbers, "fvu")
        mean = site.contrast({sae["name"]: 1 / len(chosen) for sae in chosen})["fvu_nonlinear"]
        numbers |= law.numbers("law") | breakdown(law, chosen, numbers, mean, pursued=settings.with_pursuit)
        numbers |= paired_numbers(site, chosen)
        if found.training_text:
            numbers |= _law(points, numbers, "fvu_training_text").numbers("law_training_text")
        series["law"] = [sae["name"] for sae in chosen]
        for architecture in others if not settings.saes.sae else ():
            same = at_fixed_l0(_candidates(inputs, found.saes, settings.l0, architecture), numbers, settings.l0)
            if len(same) > 1:
                numbers |= paired_numbers(site, same, f"paired/{architecture}")
            series["others"][architecture] = [sae["name"] for sae in same]
        notes.append(
            f"Power law from {len(points)} SAEs of {len(chosen)} widths with {len(points) - 3} residuals to spare; its "
            "intervals are profiles of the likelihood, NaN where the points set no bound. They cover the scatter about the "
            "law, not what training longer or on more text would change."
        )
    exploration = explored(inputs, found, stages)
    return measured_result("scaling", found, stages, numbers, series=series, notes=notes, exploration=exploration)


_HEADINGS = {
    "fvu": "FVU",
    "fvu_training_text": "FVU training text",
    "fvu_nonlinear": "FVU nonlin.",
    "r2_vec": "R² error",
    "r2_norm/error": "R² error norm",
}
PAPER = "FVU_nonlinear is about constant in width at fixed L0"


def table(result: Result) -> Table:
    """One row per SAE, with pursuit and controls below."""
    saes = sorted(result.series["saes"], key=lambda sae: (round(result.numbers[f"{sae['name']}/l0"]), sae["d_sae"]))
    names = [sae["name"] for sae in saes]
    if result.series["with_pursuit"]:
        names += [f"{name} pursuit" for name in result.series["law"]]
    names += [sae["name"] for sae in result.series["controls"]]
    training_text = any(f"{name}/fvu_training_text" in result.numbers for name in names)
    keys = ("fvu", *(["fvu_training_text"] if training_text else []), "fvu_nonlinear", "r2_vec", "r2_norm/error")
    rows = [
        [name, shown(result.numbers[f"{name}/l0"], "{:.1f}")]
        + [
            with_interval(result.numbers, f"{name}/{key}", "{:.3f}") if f"{name}/{key}" in result.numbers else ""
            for key in keys
        ]
        for name in names
    ]
    return Table(
        title=f"scaling: {result.config['model']}, {result.config['hook']}, held-out tokens",
        headings=("SAE", "L0", *(_HEADINGS[key] for key in keys)),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """How well the law is determined, how flat FVU_nonlinear is, and what the error consists of."""
    numbers, names = result.numbers, result.series["law"]
    if not names:
        return ["Too few widths at one L0 for a power law; see the notes."]
    constants = ", ".join(f"{name} = {with_interval(numbers, f'law/{name}', '{:.3g}')}" for name in "cam")
    widths = {sae["name"]: sae["d_sae"] for sae in result.series["saes"]}
    narrow, wide = names[0], names[-1]
    lines = [
        f"FVU(W) = c + a W^m over {len(names)} widths at L0 about {fmean(numbers[f'{name}/l0'] for name in names):.0f}: "
        f"{constants}; R² {numbers['law/r2']:.4f}, largest residual {numbers['law/largest_residual']:.4f}.",
        f"From {widths[narrow]} to {widths[wide]} latents FVU goes {_change(result, narrow, wide, 'fvu')}, FVU nonlinear "
        f"{_change(result, narrow, wide, 'fvu_nonlinear')} (the paper: {PAPER}); on the same tokens FVU nonlinear differs by "
        f"{with_interval(numbers, 'paired/fvu_nonlinear', '{:+.4f}')}.",
        f"Of the FVU {numbers[f'{wide}/fvu']:.3f} at {widths[wide]} latents, {numbers[f'{wide}/breakdown/absent']:.3f} is what "
        f"more latents would remove, {with_interval(numbers, 'breakdown/linear', '{:.3f}')} linear error at any width, "
        f"{numbers['breakdown/nonlinear']:.3f} nonlinear error (its mean over widths).",
        *_on_training_text(result, narrow, wide),
        *_of_other_architectures(result, widths),
    ]
    if numbers["breakdown/linear/high"] < 0:
        lines.append(
            "c is below the mean FVU nonlinear, with all of its interval: FVU nonlinear cannot stay as it is at larger "
            "widths, so what remains at any width cannot be split."
        )
    elif numbers["breakdown/linear/low"] <= 0 or numbers["breakdown/linear"] <= 0:
        lines.append(
            "The interval of c reaches below the mean FVU nonlinear: whether linear error stays at any width cannot be told "
            "from these widths."
        )
    if result.series["with_pursuit"]:
        removed = [numbers[f"{name}/breakdown/encoder"] for name in names]
        lines.append(
            f"Gradient pursuit at the same L0 takes {min(removed):+.4f} to {max(removed):+.4f} off FVU nonlinear."
        )
    return lines


def _on_training_text(result: Result, narrow: str, wide: str) -> list[str]:
    """How much of FVU is a gap between the SAEs' training text and other text, and what that does to c."""
    numbers = result.numbers
    if "law_training_text/c" not in numbers:
        return []
    gaps = [numbers[f"{name}/fvu"] - numbers[f"{name}/fvu_training_text"] for name in (narrow, wide)]
    constants = [with_interval(numbers, f"{law}/c", "{:.3f}") for law in ("law_training_text", "law")]
    return [
        f"FVU is lower by {gaps[0]:.3f} at the narrowest and {gaps[1]:.3f} at the widest on the text the SAEs were trained on; "
        f"there c = {constants[0]}, on held-out text {constants[1]}. Where the two differ, c is partly overfitting."
    ]


def _of_other_architectures(result: Result, widths: dict[str, int]) -> list[str]:
    """How flat FVU_nonlinear is in the other architectures, where they are at the law's L0."""
    lines = []
    for architecture, names in result.series.get("others", {}).items():
        if len(names) < 2:
            lines.append(f"{architecture}: SAEs at the law's L0 at {len(names)} of the widths: nothing to compare.")
            continue
        narrow, wide = names[0], names[-1]
        lines.append(
            f"{architecture}, {widths[narrow]} to {widths[wide]} latents: FVU {_change(result, narrow, wide, 'fvu')}, FVU "
            f"nonlinear {_change(result, narrow, wide, 'fvu_nonlinear')}, on the same tokens "
            f"{with_interval(result.numbers, f'paired/{architecture}/fvu_nonlinear', '{:+.4f}')}."
        )
    return lines


def _change(result: Result, narrow: str, wide: str, key: str) -> str:
    first, last = (result.numbers[f"{name}/{key}"] for name in (narrow, wide))
    return f"from {first:.3f} to {last:.3f} ({last / first - 1:+.0%})"


_L0_STEP = 1.25  # SAEs whose L0 differs by a smaller factor share a line
QUANTITIES = {
    "fvu": "FVU",
    "fvu_nonlinear": "FVU nonlinear",
    "r2_vec": "R² of the error vector",
    "r2_norm/error": "R² of the error's norm",
}


def _drawn(result: Result) -> list[dict[str, Any]]:
    """The SAEs in figures over width and L0: without controls that have an untrained part."""
    return [sae for sae in result.series["saes"] if sae.get("frozen", "none") == "none"]


def _lines(result: Result) -> list[tuple[str, list[dict[str, Any]]]]:
    """SAEs grouped by architecture and similar L0, smallest first, each group with its label and sorted by width."""
    l0 = {sae["name"]: result.numbers[f"{sae['name']}/l0"] for sae in result.series["saes"]}
    groups: dict[str, list[list[dict[str, Any]]]] = {sae.get("trained_as", ""): [] for sae in _drawn(result)}
    for sae in sorted(_drawn(result), key=lambda sae: l0[sae["name"]]):
        own = groups[sae.get("trained_as", "")]
        if own and l0[sae["name"]] <= _L0_STEP * l0[own[-1][0]["name"]]:
            own[-1].append(sae)
        else:
            own.append([sae])
    found = []
    for architecture, own in groups.items():
        about = f", {architecture}" if len(groups) > 1 else ""
        for group in own:
            label = f"L0 {fmean(l0[sae['name']] for sae in group):.0f}{about}"
            found.append((label, sorted(group, key=lambda sae: sae["d_sae"])))
    return found


def lines(result: Result) -> Figure:
    """FVU and FVU_nonlinear by width, one line per L0, with the power law at its L0."""
    figure, panels = new_panels(3.3, 2, sharey=True)
    for axes, quantity in zip(panels, ("fvu", "fvu_nonlinear"), strict=True):
        for number, (label, saes) in enumerate(_lines(result)):
            values, errors = interval_bars(result, [f"{sae['name']}/{quantity}" for sae in saes])
            axes.errorbar(
                [sae["d_sae"] for sae in saes], values, yerr=errors, fmt="o-", markersize=3.5, linewidth=1,
                color=SERIES[number % len(SERIES)], label=label,
            )  # fmt: skip
        width_axis(axes, [sae["d_sae"] for sae in result.series["saes"]])
        axes.set_title(QUANTITIES[quantity])
        axes.set_ylim(bottom=0)
    if result.series["law"]:
        _draw_law(panels[0], result)
    panels[0].set_ylabel("fraction of variance")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _draw_law(axes: Axes, result: Result) -> None:
    c, a, m = (result.numbers[f"law/{name}"] for name in "cam")
    widths = [sae["d_sae"] for sae in result.series["saes"]]
    low, high = math.log2(min(widths)), math.log2(max(widths))
    places = [2 ** (low + (high - low) * step / 60) for step in range(61)]
    axes.plot(
        places,
        [c + a * width**m for width in places],
        color="black",
        linewidth=1.1,
        linestyle="--",
        zorder=3,
        label="c + a Wᵐ",
    )
    axes.axhline(c, color=GREY, linewidth=0.9, linestyle=":", label="c")


def contours(result: Result) -> Figure:
    """FVU, FVU_nonlinear, R2 of the error vector and of its norm, by width and L0; of several architectures, the first."""
    drawn = _drawn(result)
    saes = [sae for sae in drawn if sae.get("trained_as") == drawn[0].get("trained_as")]  # one surface is of one kind
    x = [math.log2(sae["d_sae"]) for sae in saes]
    y = [math.log2(max(1e-3, result.numbers[f"{sae['name']}/l0"])) for sae in saes]
    values = {title: [result.numbers[f"{sae['name']}/{key}"] for sae in saes] for key, title in QUANTITIES.items()}
    return contour_panels(x, y, values)


def stacked_breakdown(result: Result) -> Figure:
    """FVU at each width of the law, stacked: absent latents, linear error, what pursuit removes, the rest (figure 1)."""
    figure, axes = new_figure(3.0)
    names = result.series["law"]
    reason = "" if names else "no power law: too few widths at one L0"
    if names and result.numbers["breakdown/linear"] < 0:  # parts below 0 do not stack
        reason = "no split: c is below the mean FVU nonlinear"
    if reason:
        axes.annotate(reason, (0.5, 0.5), xycoords="axes fraction", ha="center")
        return figure
    widths = {sae["name"]: sae["d_sae"] for sae in result.series["saes"]}
    bottom = [0.0] * len(names)
    linear = result.numbers["breakdown/linear"]
    parts = {
        "rest": (BLUE, "nonlinear error that stays" if result.series["with_pursuit"] else "nonlinear error"),
        "encoder": (ORANGE, "removed by pursuit"),
        "linear": (SKY, "linear error at any width"),
        "absent": (GREEN, "absent latents"),
    }
    for key, (colour, label) in parts.items():
        if key == "encoder" and not result.series["with_pursuit"]:
            continue
        heights = [linear if key == "linear" else result.numbers[f"{name}/breakdown/{key}"] for name in names]
        heights = [max(0.0, height) for height in heights]
        top = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.fill_between([widths[name] for name in names], bottom, top, color=colour, linewidth=0, label=label)
        bottom = top
    places = [widths[name] for name in names]
    axes.plot(places, [result.numbers[f"{name}/fvu"] for name in names], "o", color="black", markersize=4, label="FVU")
    values, errors = interval_bars(result, ["law/c"])
    axes.errorbar(
        [max(places) * 1.1], values, yerr=errors, fmt="D", color=GREY, markersize=4, linewidth=1, label="c, 95 %"
    )
    width_axis(axes, places)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("fraction of variance")
    l0 = [result.numbers[f"{name}/l0"] for name in names]
    axes.set_title(
        f"What the error is made of, L0 {min(l0):.0f}" + (f" to {max(l0):.0f}" if max(l0) > min(l0) + 1 else "")
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1, 1))
    return figure


FIGURES = {"lines": lines, "contours": contours, "breakdown": stacked_breakdown}
