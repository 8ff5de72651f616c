"""Does a language model hold numbers on a helix, or only their digits?

Kantamneni and Tegmark (2502.00873) fit the states of numbers by a helix, B(a) = [1, a, cos and sin of 2 pi a / T] for T =
2, 5, 10, 100, and patch it into models that add. Where a number is written in digits, periods 2, 5 and 10 and the line are
sums of functions of its digits: a model that only knows digits fits such a helix too. What decides is what the helix holds
*beyond digits*, and how it does beside as many random columns out of the digits' own.

Every R2 is of values held out of the fit (folds by value: the templates of a value never on both sides), weighted by
variance, over all templates; the ceiling is another template's state of the same value. Patches move a state by what a fit
says lies between two values, in prompts that count on ("23, 24, 25, 2"); scores are in units of putting in the other
value's own state, less the mean state's, which is what a fit that knows nothing puts in.

Shapes: v values, t templates, d width of the site, p columns of a fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter_ext.activations.hook_points import transformer_blocks
from darkmatter_ext.activations.number_prompts import (
    Ids,
    Prompts,
    continued_rightly,
    counting_prompts,
    number_states,
    patch_logits,
    patch_numbers,
    tokens_of,
)
from darkmatter_ext.activations.splicing import SplicedModel
from darkmatter_ext.activations.store import load_model, load_tokenizer
from darkmatter_ext.estimators.intervals import bootstrap, ratio
from darkmatter_ext.estimators.ridge import dealt_folds, held_out
from darkmatter_ext.estimators.value_fits import (
    beyond,
    ceiling_sums,
    digit_columns,
    fit_sums,
    helix_columns,
    null_r2,
    polynomial_columns,
    r2,
    spectrum,
    states_of,
)
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import presets
from darkmatter_ext.measurement.resolved import resolve
from darkmatter_ext.measurement.run import measured, prepare
from darkmatter_ext.measurement.settings import Settings
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREY, ORANGE, SERIES, interval_bars, legend_beside, new_figure
from darkmatter_ext.report.table import Table, shown, with_interval
from darkmatter_ext.runtime.inputs import require, require_at_least
from darkmatter_ext.runtime.progress import Stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = (  # long enough that the number stands beyond a context's first positions, which SAEs do not see
    "The meeting took place in the year 19{a}",
    "You will find more about it in chapter {a}",
    "The answer is printed at the end of page {a}",
    "At the market this morning she bought {a}",
    "By now her grandfather must be at least {a}",
    "He always wore a shirt with the number {a}",
    "The value of the variable x was set to {a}",
    "We took the bus to the station, line {a}",
)
LARGEST, FEWEST_VALUES = 999, 20
FEWEST_RIGHT = 30  # prompts that the model continues rightly; with fewer nothing is patched
BAND = 0.95
FITS = {
    "helix": "linear term, cosine and sine of every period",
    "circle": "the helix without its linear term",
    "digits": "a free state for every digit at every place: the control that decides",
    "polynomial": "as many powers of the value as the helix has columns",
}
PATCHES = {
    "value_mean": "the mean states of the two values (the most a fit by value can do)",
    "digits": "the digits-only model",
    "helix": "the helix",
    "polynomial": "the polynomial",
    "random_move": "control: a random direction, as long as the helix's move",
}
EMBEDDING = "embedding"
_PARTS = ("sae", "linear", "nonlinear")


@dataclass(frozen=True)
class NumbersSettings(Settings):
    """Fit the states of numbers by a helix and by their digits, patch both, and ask what of it is in the SAE's error."""

    blocks: tuple[int, ...] = (0, 5, 10, 15, 20, 25)
    """whose outputs are fitted and patched; the SAEs' own and the embedding join them"""
    low: int = 10
    """least value"""
    high: int = 99
    """largest value"""
    periods: tuple[float, ...] = (2.0, 5.0, 10.0, 100.0)
    """of the helix"""
    templates: tuple[str, ...] = ()
    """texts with {a} where the number stands, the state is read at its last token; default: eight built in"""
    draws: int = 99
    """of every null: permuted values, random periods, random columns of the digits"""
    train_fraction: float = 0.75
    """share of the values in a fit; every value is held out once"""
    pairs: int = 40
    """prompts that are patched, at most"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.low <= LARGEST, "low", f"must be from 0 to {LARGEST}", self.low)
        require(self.low <= self.high <= LARGEST, "high", f"must be from low to {LARGEST}", self.high)
        require_at_least("high - low + 1", FEWEST_VALUES, self.high - self.low + 1)
        require_at_least("draws", 19, self.draws)
        require_at_least("pairs", 1, self.pairs)
        require(0.5 <= self.train_fraction < 1, "train_fraction", "must be from 0.5 to below 1", self.train_fraction)
        require(bool(self.periods), "periods", "must name at least one", "none")
        require(min(self.periods, default=2) >= 2, "periods", "must be at least 2", list(self.periods))
        for template in self.templates:
            require("{a}" in template, "templates", "must hold {a} where the number stands", repr(template))
        require(len(self.texts) > 1, "templates", "must be at least 2, the ceiling is another's", len(self.texts))

    @property
    def texts(self) -> tuple[str, ...]:
        """The text up to the number: what follows changes no state before it."""
        return tuple(template.partition("{a}")[0] for template in self.templates or TEMPLATES)

    @property
    def values(self) -> Tensor:
        """[v]"""
        return torch.arange(self.low, self.high + 1)


PRESETS = presets(NumbersSettings, {"widths": (2048,)})


def plan(settings: NumbersSettings) -> list[str]:
    """Describe a run, one line a step, without starting it."""
    blocks = ", ".join(map(str, settings.blocks))
    return [
        *plan_lines(settings),
        f"numbers   {settings.low} to {settings.high} in {len(settings.texts)} templates, after blocks {blocks}",
        *(f"fit       {name}: {about}" for name, about in FITS.items()),
        *(f"patch     {name}: {about}" for name, about in PATCHES.items()),
    ]


# ---- fits


def fit_numbers(h: Tensor, settings: NumbersSettings) -> dict[str, float]:
    """All fits of states h [v, t, d] with their nulls; intervals by value."""
    states, folds, seed, columns = states_of(h), _folds(settings), settings.seed, _columns(settings)
    helix, digits = columns["helix"], columns["digits"]
    sums = {name: fit_sums(states, own, folds) for name, own in columns.items()}
    numbers = bootstrap(ceiling_sums(h), r2, seed=seed)[0].numbers("r2/ceiling")
    for name, own in sums.items():
        numbers |= bootstrap(own, r2, seed=seed)[0].numbers(f"r2/{name}")
    both = fit_sums(states, torch.cat([digits, beyond(helix, digits)], dim=1), folds)
    more = torch.stack([both[:, 0], sums["digits"][:, 0]], dim=1)  # of what digits leave
    numbers |= bootstrap(more, r2, seed=seed)[0].numbers("r2/beyond_digits")
    explained = [sums[name][:, 1] - sums[name][:, 0] for name in ("helix", "digits")]
    numbers |= ratio(torch.stack(explained, dim=1)).numbers("share_of_digits")
    for period in settings.periods:
        rest = helix_columns(settings.values, [other for other in settings.periods if other != period])
        drop = torch.cat([fit_sums(states, rest, folds)[:, :1], sums["helix"]], dim=1)
        (lost,) = bootstrap(drop, lambda s: (s[..., :1] - s[..., 1:2]) / s[..., 2:], seed=seed)
        numbers |= lost.numbers(f"drop/{period:g}")
    draws = null_r2(states, folds, helix, digits, draws=settings.draws, seed=seed + 11)
    for null, drawn in draws.items():
        own = numbers["r2/beyond_digits" if null == "beyond_digits" else "r2/helix"]
        numbers[f"null/{null}"] = drawn.median().item()
        numbers[f"null/{null}/high"] = drawn.quantile(BAND).item()
        numbers[f"rank/{null}"] = (1 + int((drawn >= own).sum())) / (1 + len(drawn))
    return numbers


def _columns(settings: NumbersSettings) -> dict[str, Tensor]:
    """The columns of each of FITS."""
    values, helix = settings.values, helix_columns(settings.values, settings.periods)
    return {
        "helix": helix,
        "circle": helix_columns(values, settings.periods, line=False),
        "digits": digit_columns(values),
        "polynomial": polynomial_columns(values, helix.shape[1]),
    }


def _folds(settings: NumbersSettings) -> Tensor:
    count = max(2, round(1 / (1 - settings.train_fraction)))
    return dealt_folds(len(settings.values), min(count, len(settings.values)), seed=settings.seed)


# ---- what of it is in the SAE's error


def part_numbers(h: Tensor, parts: Mapping[str, Tensor], settings: NumbersSettings) -> dict[str, float]:
    """Helix and digits fitted to Sae(h), b* h and the nonlinear error [v, t, d], and the share of the helix in each.

    `share/helix`: of the energy of what the helix predicts of h, what it predicts of the part (they add up to 1);
    `share/all`: the same of the states by value, helix or not.
    """
    folds, seed, columns = _folds(settings), settings.seed, _columns(settings)
    centred = {name: (x.double() - x.double().mean(0)).mean(1) for name, x in {"h": h, **parts}.items()}
    d = h.shape[-1]
    joint = held_out(columns["helix"], torch.cat(list(centred.values()), dim=1), folds)
    moves = dict(zip(centred, (joint.predicted - joint.mean).split(d, dim=1), strict=True))
    numbers: dict[str, float] = {}
    for name, part in parts.items():
        for fit in ("helix", "digits"):
            sums = fit_sums(states_of(part), columns[fit], folds)
            numbers |= bootstrap(sums, r2, seed=seed)[0].numbers(f"r2/{fit}_in_{name}")
        for key, of in (("helix", moves), ("all", centred)):
            sums = torch.stack([(of[name] * of["h"]).sum(1), of["h"].square().sum(1)], dim=1)
            numbers |= ratio(sums).numbers(f"share/{key}_in_{name}")
    return numbers


# ---- patches


def moves_of(h: Tensor, settings: NumbersSettings, prompts: Prompts) -> dict[str, Tensor]:
    """What each fit of states h [v, t, d], made without either value, says lies between a prompt's two numbers: [n, d]."""
    folds = _folds(settings)
    means = (h.double() - h.double().mean(0)).mean(1)
    points = {"value_mean": means}
    for name, columns in _columns(settings).items():
        points[name] = held_out(columns, means, folds).predicted
    start, end = prompts.value - settings.low, prompts.to - settings.low
    return {name: own[end] - own[start] for name, own in points.items()}


# ---- the run


def run(settings: NumbersSettings, stages: Stages) -> Result:
    """Measure the SAEs (for b*), fit the states of numbers, patch them.

    Raises InputError for bad settings, a block the model does not have, a tokenizer that does not tell the values apart;
    StateError for damaged files.
    """
    model = resolve(settings).model
    with stages.stage("load the language model"):
        network = load_model(model, device=settings.device, dtype=torch.float32)
    last = len(transformer_blocks(network)) - 1
    for block in settings.blocks:
        require(0 <= block <= last, "blocks", f"must be from 0 to {last} of {model}", block)
    inputs = prepare(settings, stages)
    found = measured(inputs, stages)
    ids = tokens_of(load_tokenizer(inputs.model), bos=inputs.resolved.usage.bos)
    sites = {EMBEDDING: "blocks.0.hook_resid_pre"}
    sites |= {f"block-{block}": f"blocks.{block}.hook_resid_post" for block in settings.blocks}
    hooks = list(dict.fromkeys([*sites.values(), *(sae.hook for sae in inputs.saes)]))
    rows = [[ids(f"{text}{value}") for value in settings.values.tolist()] for text in settings.texts]
    with stages.stage("states of numbers", len(rows)) as advance:
        h = number_states(network, hooks, rows, advance)
    numbers: dict[str, float] = {}
    spectra: dict[str, Any] = {}
    with stages.stage("fit numbers", len(sites)) as advance:
        for name, hook in sites.items():
            numbers |= {f"{name}/{key}": value for key, value in fit_numbers(h[hook], settings).items()}
            powers, band = spectrum(
                states_of(h[hook]).means, settings.values, draws=settings.draws, level=BAND, seed=settings.seed
            )
            on_grid = {f"power/{period:g}": powers[period] for period in settings.periods if period in powers}
            numbers |= {f"{name}/{key}": share for key, share in (on_grid | {"power/band": band}).items()}
            spectra[name] = {"periods": list(powers), "shares": list(powers.values()), "band": band}
            advance(1)
    for sae in inputs.saes:
        parts = _parts(h[sae.hook].to(settings.device), sae.own, found.site_of(sae.name).maps[sae.name])
        numbers |= {f"{sae.name}/{key}": value for key, value in part_numbers(h[sae.hook], parts, settings).items()}
    patched, note = _patched(network, ids, settings, h, stages)
    notes = [
        f"Numbers {settings.low} to {settings.high} in {len(rows)} templates, the state at the last token; intervals: 95 %, by "
        f"value. Nulls: {settings.draws} draws, their {BAND:.0%} quantile; ranks are p-values, at least "
        f"{1 / (1 + settings.draws):.2g}.",
        note,
    ]
    series = {"sites": sites, "spectra": spectra, "fits": FITS, "patches": PATCHES}
    return measured_result("numbers", found, stages, numbers | patched, series=series, notes=notes)


@torch.no_grad()
def _parts(h: Tensor, encode: Any, b_star: Any) -> dict[str, Tensor]:
    x = h.flatten(0, 1)
    x_hat, linear = encode(x).x_hat, b_star(x).float()
    parts = dict(zip(_PARTS, (x_hat, linear, x - x_hat - linear), strict=True))
    return {name: part.cpu().unflatten(0, h.shape[:2]) for name, part in parts.items()}


def _patched(
    network: Any,
    ids: Ids,
    settings: NumbersSettings,
    h: Mapping[str, Tensor],
    stages: Stages,
) -> tuple[dict[str, float], str]:
    """Patches after every block but the last, where the model counts on rightly often enough; and what was done."""
    prompts = counting_prompts(ids, settings.values.tolist(), seed=settings.seed)
    if prompts is None:
        return {"patch/prompts": 0}, "Nothing was patched: the tokenizer does not write numbers in digits."
    right = continued_rightly(network, prompts)
    numbers: dict[str, float] = {"patch/prompts": len(right), "patch/right": int(right.sum())}
    said = f'The model goes on counting ("23, 24, 25, 2") rightly in {int(right.sum())} of {len(right)} prompts'
    if int(right.sum()) < FEWEST_RIGHT:
        return numbers, f"{said}: too few to patch (at least {FEWEST_RIGHT})."
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(settings.seed))
    chosen = order[right[order]][: settings.pairs].sort().values
    kept = Prompts(*(column if isinstance(column, int) else column[chosen] for column in prompts))  # type: ignore[arg-type]
    with stages.stage("patch numbers", len(settings.blocks)) as advance:
        for block in settings.blocks:
            if block < len(transformer_blocks(network)) - 1:  # after the last nothing reads another token's state
                moves = moves_of(h[f"blocks.{block}.hook_resid_post"], settings, kept)
                logits = patch_logits(SplicedModel(network, block), kept, moves, seed=settings.seed)
                own = patch_numbers(logits, seed=settings.seed)
                numbers |= {f"block-{block}/{key}": value for key, value in own.items()}
            advance(1)
    return numbers | {"patch/patched": len(chosen)}, f"{said}; {len(chosen)} of them were patched."


# ---- what is shown


def table(result: Result) -> Table:
    """One row a site: how well values, digits and the helix say the state, and what decides between the last two."""
    rows = []
    for name in result.series["sites"]:
        own = {key.partition("/")[2]: value for key, value in result.numbers.items() if key.startswith(f"{name}/")}
        fits = [with_interval(own, f"r2/{fit}", "{:.2f}") for fit in ("ceiling", "digits", "helix", "polynomial")]
        band = shown(own["null/beyond_digits/high"], "{:.3f}")
        rows.append(
            [
                name.replace("-", " "),
                *fits,
                f"{with_interval(own, 'r2/beyond_digits', '{:.3f}')}, band {band}",
                f"{own['null/digit_columns']:.2f}, p {own['rank/digit_columns']:.2f}",
                f"p {own['rank/periods']:.2f}",
            ]
        )
    headings = ("state after", "ceiling", "digits", "helix", "polynomial", "beyond digits", "digit columns", "periods")
    title = f"states of {result.config['low']} to {result.config['high']}, R2 on held-out values"
    return Table(title=f"numbers: {result.config['model']}, {title}", headings=headings, rows=rows)


def reading(result: Result) -> list[str]:
    """Whether there is a helix beyond digits, whether its periods are special, what patches do, what the SAE leaves of it."""
    numbers, level = result.numbers, 1 - BAND
    sites = [name for name in result.series["sites"] if name != EMBEDDING]

    def where(test: Callable[[str], bool]) -> str:
        own = [name.removeprefix("block-") for name in sites if test(name)]
        return f"after blocks {', '.join(own)}" if own else "after no block"

    best = max(sites, key=lambda name: numbers[f"{name}/r2/helix"])

    def of(key: str, form: str = "{:.2f}", site: str = best) -> str:
        return with_interval(numbers, f"{site}/{key}", form)

    beyond = where(
        lambda site: numbers[f"{site}/r2/beyond_digits"] > 0 and numbers[f"{site}/rank/beyond_digits"] <= level
    )
    lines = [
        f"The helix explains most after {best.replace('-', ' ')}: R2 {of('r2/helix')} on held-out values, digits alone "
        f"{of('r2/digits')}, another template {of('r2/ceiling')}.",
        f"Beyond digits the helix says more than permuted values do (p at most {level:.2f}) {beyond}; as many random columns "
        f"out of the digits' do worse than it {where(lambda site: numbers[f'{site}/rank/digit_columns'] <= level)}, random "
        f"periods {where(lambda site: numbers[f'{site}/rank/periods'] <= level)}.",
    ]
    patched = [site for site in sites if f"{site}/patch/helix" in numbers]
    told = [site for site in patched if not math.isnan(numbers[f"{site}/patch/helix"])]
    if told:
        early = max(told, key=lambda site: numbers[f"{site}/patch/helix"])
        scores = ", ".join(
            f"{name.replace('_', ' ')} {of(f'patch/{name}', site=early)}" for name in result.series["patches"]
        )
        lines.append(f"Patched after {early.replace('-', ' ')}, in units of the other number's own state: {scores}.")
    elif patched:
        lines.append(
            "Putting in the other number's own state does not move the answer clear of the mean state: no scores."
        )
    else:
        lines.append("Nothing was patched: see the notes.")
    for sae in result.series["saes"]:
        shares = [f"{of(f'share/{key}_in_nonlinear', site=sae['name'])}" for key in ("helix", "all")]
        lines.append(
            f"{sae['name']}: the nonlinear error holds {shares[0]} of the helix and {shares[1]} of all that the states tell of "
            f"the value; a helix fitted to it has R2 {of('r2/helix_in_nonlinear', site=sae['name'])}."
        )
    return lines


_LINES = {
    "ceiling": ("another template (ceiling)", "black"),
    "digits": ("digits", BLUE),
    "helix": ("helix", ORANGE),
    "polynomial": ("polynomial", GREY),
}


def fits(result: Result) -> Figure:
    """R2 on held-out values by site: ceiling, digits, helix, polynomial; shaded, as many random columns of the digits."""
    figure, axes = new_figure(3.0)
    sites = list(result.series["sites"])
    for number, (key, (label, colour)) in enumerate(_LINES.items()):
        values, errors = interval_bars(result, [f"{site}/r2/{key}" for site in sites])
        places = [place + 0.06 * (number - 1.5) for place in range(len(sites))]
        axes.errorbar(places, values, yerr=errors, fmt="o-", markersize=3.5, linewidth=1, color=colour, label=label)
    middle, high = ([result.numbers[f"{site}/null/digit_columns{end}"] for site in sites] for end in ("", "/high"))
    axes.fill_between(range(len(sites)), middle, high, color=BLUE, alpha=0.15, label="random columns\nof the digits")
    _site_axis(axes, sites)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylabel("R² on held-out values")
    axes.set_title("What says the state of a number")
    legend_beside(axes)
    return figure


def _site_axis(axes: Any, sites: Sequence[str]) -> None:
    axes.set_xticks(range(len(sites)), [site.removeprefix("block-") for site in sites])
    axes.set_xlabel("state after block")


def power(result: Result) -> Figure:
    """Share of the energy of the mean states at every period, a line taken off, after three blocks; dashed, the band."""
    figure, axes = new_figure(2.8)
    blocks = [site for site in result.series["sites"] if site != EMBEDDING]
    chosen = dict.fromkeys([blocks[0], blocks[len(blocks) // 2], blocks[-1]])
    longest = max(max(result.series["spectra"][site]["periods"]) for site in chosen)
    for site, colour in zip(chosen, SERIES, strict=False):
        own = result.series["spectra"][site]
        frequencies = [1 / period for period in own["periods"]]
        axes.plot(frequencies, own["shares"], color=colour, linewidth=1, label=site.replace("-", " "))
        axes.axhline(own["band"], color=colour, linewidth=0.7, linestyle="--")
    axes.set_yscale("log")
    periods = [period for period in result.config["periods"] if period <= longest]
    axes.set_xticks([1 / period for period in periods], [f"{period:g}" for period in periods])
    axes.set_xlabel("period")
    axes.set_ylabel("share of energy")
    axes.set_title("Spectrum of the mean states")
    legend_beside(axes)
    return figure


def patches(result: Result) -> Figure | None:
    """Scores of every patch by block; none where nothing was patched."""
    sites = [site for site in result.series["sites"] if f"{site}/patch/helix" in result.numbers]
    if not sites:
        return None
    figure, axes = new_figure(3.0)
    for number, (name, colour) in enumerate(zip(result.series["patches"], SERIES, strict=False)):
        values, errors = interval_bars(result, [f"{site}/patch/{name}" for site in sites])
        places = [place + 0.08 * (number - 2) for place in range(len(sites))]
        axes.errorbar(
            places,
            values,
            yerr=errors,
            fmt="o",
            markersize=3.5,
            linewidth=1,
            color=colour,
            label=name.replace("_", " "),
        )
    for height in (0, 1):
        axes.axhline(height, color="black", linewidth=0.6)
    _site_axis(axes, sites)
    axes.set_ylabel("logit won / by the other's own state")
    axes.set_title("Patching a number by what lies between two values")
    legend_beside(axes)
    return figure


def shares(result: Result) -> Figure:
    """The share of the helix, and of all that the states tell of the value, in Sae(x), the linear and the nonlinear error."""
    figure, axes = new_figure(2.6)
    name = max(result.series["saes"], key=lambda sae: sae["d_sae"])["name"]
    for number, (key, label, colour) in enumerate((("helix", "the helix", ORANGE), ("all", "all of the value", BLUE))):
        values, errors = interval_bars(result, [f"{name}/share/{key}_in_{part}" for part in _PARTS])
        places = [place + 0.38 * (number - 0.5) for place in range(len(_PARTS))]
        axes.bar(places, values, 0.36, yerr=errors, color=colour, label=label, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(_PARTS)), ["Sae(x)", "linear error", "nonlinear error"])
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylabel("share")
    axes.set_title(f"Where {name} has what tells numbers apart")
    legend_beside(axes)
    return figure


FIGURES = {"fits": fits, "power": power, "patches": patches, "shares": shares}
