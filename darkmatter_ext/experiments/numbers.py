"""Does a language model hold numbers on a helix, or only their digits?

Kantamneni and Tegmark (2502.00873) fit the states of numbers by a helix, B(a) = [1, a, cos and sin of 2 pi a / T] for T =
2, 5, 10, 100, and patch it into models that add. If a number is written in digits, periods 2, 5 and 10 and the line are
sums of functions of its digits, so a model that only knows digits fits such a helix too. What decides is how much the helix
holds *beyond digits*, and how it compares with as many random columns drawn from the digits' own.

Every R2 is on values held out of the fit (folds by value: the templates of a value are never on both sides), weighted by
variance, over all templates; the ceiling is another template's state of the same value. Patches move a state by the
difference that a fit predicts between two values, in sums without a carry ("23 + 4 = 2"). The unit of scores is putting in
the other value's own state; subtracted is the score of the mean state, which a fit that knows nothing would put in. At the
last token of such a sum, too: is there more than functions of each addend, and is it a helix of the sum (the "Clock")?
There, folds are by the pair of digits that are added.

Shapes: v values, t templates, d width of the site, p columns of a fit.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter_ext.activations.hook_points import transformer_blocks
from darkmatter_ext.activations.number_prompts import (
    TEMPLATES,
    Ids,
    last_states,
    number_states,
    patch_logits,
    patch_numbers,
    sum_prompts,
    summed_rightly,
    tokens_of,
)
from darkmatter_ext.activations.splicing import SplicedModel
from darkmatter_ext.activations.store import load_model, load_tokenizer
from darkmatter_ext.estimators.number_fits import (
    BAND,
    FITS,
    ValueFits,
    fit_numbers,
    moves_between,
    part_numbers,
    sum_numbers,
)
from darkmatter_ext.estimators.value_fits import spectrum, states_of
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
from darkmatter_ext.runtime.threads import one_thread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST, FEWEST_VALUES = 999, 20
FEWEST_RIGHT = 30  # sums that the model gets right; with fewer, sums are not examined
LETTERS = string.ascii_uppercase  # control: an ordered sequence that is not numbers
PATCHES = {
    "value_mean": "the mean states of the two values (the most a fit by value can do)",
    "digits": "the digits-only model",
    "helix": "the helix",
    "polynomial": "the polynomial",
    "random_move": "control: a random direction, as long as the helix's move",
}
EMBEDDING = "embedding"
SHOWN_SCORE = 4  # largest patch score shown: longer intervals are cut off in the figure
_PARTS = ("sae", "linear", "nonlinear")


@dataclass(frozen=True)
class NumbersSettings(Settings):
    """Fit the states of numbers by a helix and by their digits, patch both, and ask how much of it is in the SAE's error."""

    blocks: tuple[int, ...] = (0, 5, 10, 15, 20, 25)
    """blocks whose outputs are fitted and patched; the SAEs' own sites and the embedding are added"""
    low: int = 10
    """least value"""
    high: int = 99
    """largest value"""
    periods: tuple[float, ...] = (2.0, 5.0, 10.0, 100.0)
    """periods of the helix"""
    templates: tuple[str, ...] = ()
    """texts with {a} in place of the number, whose last token's state is read; default: eight built-in ones"""
    draws: int = 99
    """draws of every null: permuted values, random periods, random columns of the digits"""
    train_fraction: float = 0.75
    """share of the values used in a fit; every value is held out once"""
    pairs: int = 40
    """sums to patch, at most"""

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
        """The texts up to the number: what follows does not change any earlier state."""
        return tuple(template.partition("{a}")[0] for template in self.templates or TEMPLATES)

    @property
    def values(self) -> Tensor:
        """[v]"""
        return torch.arange(self.low, self.high + 1)

    @property
    def fits(self) -> ValueFits:
        """What the values' states are fitted with."""
        count = max(2, round(1 / (1 - self.train_fraction)))
        return ValueFits(self.values, self.periods, count, self.draws, self.seed)


PRESETS = presets(NumbersSettings, {"widths": (2048,)})


def plan(settings: NumbersSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    blocks = ", ".join(map(str, settings.blocks))
    return [
        *plan_lines(settings),
        f"numbers   {settings.low} to {settings.high} in {len(settings.texts)} templates, after blocks {blocks}",
        *(f"fit       {name}: {about}" for name, about in FITS.items()),
        *(f"patch     {name}: {about}" for name, about in PATCHES.items()),
    ]


# ---- the run


def run(settings: NumbersSettings, stages: Stages) -> Result:
    """Measure the SAEs (for b*), fit the states of numbers, patch them.

    Raises InputError for bad settings, a block the model does not have, a tokenizer that cannot tell the values apart;
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

    def read(name: str, words: Sequence[Any]) -> dict[str, Tensor]:
        rows = [[ids(f"{text}{word}") for word in words] for text in settings.texts]
        with stages.stage(f"states of {name}", len(rows)) as advance:
            return number_states(network, hooks, rows, advance)

    h = read("numbers", settings.values.tolist())
    told = [len({tuple(ids(f"{text}{letter}")) for letter in LETTERS}) == len(LETTERS) for text in settings.texts]
    letters = read("letters", LETTERS) if all(told) else {}
    numbers: dict[str, float] = {}
    spectra: dict[str, Any] = {}
    with stages.stage("fit numbers", len(sites)) as advance, one_thread():
        for name, hook in sites.items():
            own, spectra[name] = _fitted(h[hook], letters.get(hook), settings)
            numbers |= {f"{name}/{key}": value for key, value in own.items()}
            advance(1)
    for sae in inputs.saes:
        parts = _parts(h[sae.hook].to(settings.device), sae.own, found.site_of(sae.name).maps[sae.name])
        numbers |= {
            f"{sae.name}/{key}": value for key, value in part_numbers(h[sae.hook], parts, settings.fits).items()
        }
    summed, note = _summed(network, ids, settings, h, sites, stages)
    notes = [
        f"Numbers {settings.low} to {settings.high} in {len(settings.texts)} templates, the state at the last token; "
        f"intervals: 95 %, by value (of sums: by the pair of digits added). Nulls: {settings.draws} draws, their {BAND:.0%} "
        f"quantile; ranks are p-values, at least {1 / (1 + settings.draws):.2g}.",
        note,
    ]
    series = {"sites": sites, "spectra": spectra, "fits": FITS, "patches": PATCHES}
    return measured_result("numbers", found, stages, numbers | summed, series=series, notes=notes)


def _fitted(h: Tensor, letters: Tensor | None, settings: NumbersSettings) -> tuple[dict[str, float], dict[str, Any]]:
    """Fits of one site's numbers and letters, and the spectrum of its numbers."""
    fits = settings.fits
    numbers = fit_numbers(h, fits)
    few = settings.values[: len(LETTERS)]
    for name, states, values in (("letters", letters, torch.arange(len(LETTERS))), ("few", h[: len(few)], few)):
        if states is not None:  # `few`: as many numbers as there are letters
            control = fit_numbers(states, dataclasses.replace(fits, values=values))
            numbers |= {f"{name}/{key}": value for key, value in control.items() if "digit" not in key}
    means = states_of(h).means
    powers, band = spectrum(means, settings.values, draws=settings.draws, level=BAND, seed=settings.seed)
    on_grid = {f"power/{period:g}": powers[period] for period in settings.periods if period in powers}
    shape = {"periods": list(powers), "shares": list(powers.values()), "band": band}
    return numbers | on_grid | {"power/band": band}, shape


@torch.no_grad()
def _parts(h: Tensor, encode: Any, b_star: Any) -> dict[str, Tensor]:
    x = h.flatten(0, 1)
    x_hat, linear = encode(x).x_hat, b_star(x).float()
    parts = dict(zip(_PARTS, (x_hat, linear, x - x_hat - linear), strict=True))
    return {name: part.cpu().unflatten(0, h.shape[:2]) for name, part in parts.items()}


def _summed(
    network: Any,
    ids: Ids,
    settings: NumbersSettings,
    h: Mapping[str, Tensor],
    sites: Mapping[str, str],
    stages: Stages,
) -> tuple[dict[str, float], str]:
    """Sums that the model gets right: what its last state knows about them, and patches of their first number."""
    prompts = sum_prompts(ids, settings.values.tolist(), seed=settings.seed)
    if prompts is None:
        return {"sums/prompts": 0}, "No sums: the tokenizer does not write numbers in digits, or no value has two."
    right = summed_rightly(network, prompts)
    numbers: dict[str, float] = {"sums/prompts": len(right), "sums/right": int(right.sum())}
    said = f'The model has the last digit of "23 + 4 = 2" right in {int(right.sum())} of {len(right)} prompts'
    if int(right.sum()) < FEWEST_RIGHT:
        return numbers, f"{said}: too few to look at (at least {FEWEST_RIGHT})."
    known = prompts.those(right.nonzero().flatten())
    with stages.stage("states of sums"):
        after = last_states(network, list(sites.values()), known.tokens)
    with stages.stage("fit sums", len(sites)) as advance, one_thread():
        for name, hook in sites.items():
            own = sum_numbers(after[hook], known.value, known.added, settings.fits)
            numbers |= {f"{name}/{key}": value for key, value in own.items()}
            advance(1)
    order = torch.randperm(len(known.value), generator=torch.Generator().manual_seed(settings.seed))
    first = dict(zip(known.value[order].tolist(), order.tolist(), strict=True))  # one prompt per value
    kept = known.those(torch.tensor(sorted(list(first.values())[: settings.pairs])))
    start, end = kept.value - settings.low, kept.to - settings.low
    with stages.stage("patch numbers", len(settings.blocks)) as advance:
        for block in settings.blocks:
            if block < len(transformer_blocks(network)) - 1:  # after the last block nothing reads another token's state
                moves = moves_between(h[f"blocks.{block}.hook_resid_post"], settings.fits, start, end)
                logits = patch_logits(SplicedModel(network, block), kept, moves, seed=settings.seed)
                own = patch_numbers(logits, seed=settings.seed)
                numbers |= {f"block-{block}/{key}": value for key, value in own.items()}
            advance(1)
    return numbers | {"sums/patched": len(kept.value)}, f"{said}; {len(kept.value)} of them were patched."


# ---- what is shown


def table(result: Result) -> Table:
    """One row per site: how well values, digits and the helix predict the state, and what decides between the last two."""
    rows = []
    for name in result.series["sites"]:
        own = {key.partition("/")[2]: value for key, value in result.numbers.items() if key.startswith(f"{name}/")}
        fits = [with_interval(own, f"r2/{fit}", "{:.2f}") for fit in ("ceiling", "digits", "helix", "polynomial")]
        band = shown(own["null/beyond_digits/high"], "{:.3f}")
        clock = "sum_digits", "sum_helix"
        sums = [with_interval(own, f"r2/{key}", "{:.2f}") if f"r2/{key}" in own else "" for key in clock]
        rows.append(
            [
                name.replace("-", " "),
                *fits,
                f"{with_interval(own, 'r2/beyond_digits', '{:.3f}')}, band {band}, smooth {own['r2/smooth_beyond_digits']:.3f}",
                f"{own['null/digit_columns']:.2f}, p {own['rank/digit_columns']:.2f}",
                f"p {own['rank/periods']:.2f}",
                *sums,
            ]
        )
    headings = ("state after", "ceiling", "digits", "helix", "polynomial", "beyond digits", "digit columns", "periods",
                "digits of a sum", "its helix")  # fmt: skip
    title = f"states of {result.config['low']} to {result.config['high']}, R2 on held-out values"
    return Table(title=f"numbers: {result.config['model']}, {title}", headings=headings, rows=rows)


def reading(result: Result) -> list[str]:
    """Is there a helix beyond digits, are its periods special, what do patches do, and how much of it does the SAE keep?"""
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
    most = max(sites, key=lambda name: numbers[f"{name}/r2/beyond_digits"])

    def low(null: str) -> Callable[[str], bool]:
        return lambda site: numbers[f"{site}/rank/{null}"] <= level

    lines = [
        f"The helix explains most after {best.replace('-', ' ')}: R2 {of('r2/helix')} on held-out values, digits alone "
        f"{of('r2/digits')}, another template {of('r2/ceiling')}.",
        f"Beyond digits the helix says more than permuted values do (p at most {level:.2f}) {beyond}: at most "
        f"{of('r2/beyond_digits', '{:.3f}', most)} of what digits leave, where as many low powers of the value, which have no "
        f"period, say {of('r2/smooth_beyond_digits', '{:.3f}', most)}.",
        f"As many random columns out of the digits' do worse than the helix {where(low('digit_columns'))}, random periods "
        f"{where(low('periods'))}.",
        *(
            f"Control: for letters by their place in the alphabet the helix has R2 {of('letters/r2/helix')} after the same "
            f"block (for as many numbers {of('few/r2/helix')}); random periods do worse "
            f"{where(lambda site: numbers[f'{site}/letters/rank/periods'] <= level)} "
            f"({where(lambda site: numbers[f'{site}/few/rank/periods'] <= level)})."
            for _ in range(f"{best}/letters/r2/helix" in numbers)
        ),
        *_sum_lines(result, sites, of),
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


def _sum_lines(result: Result, sites: Sequence[str], of: Callable[..., str]) -> list[str]:
    told = [site for site in sites if f"{site}/r2/sum_helix" in result.numbers]
    if not told:
        return []
    best = max(told, key=lambda site: result.numbers[f"{site}/r2/sum_digits"])

    def p(null: str) -> str:
        return f"{result.numbers[f'{best}/rank/{null}']:.2f}"

    line = (
        f"The last token of a sum tells most of it after {best.replace('-', ' ')}: of what functions of each addend leave "
        f"(R2 {of('r2/addends', site=best)}), digits of the sum explain {of('r2/sum_digits', site=best)} (p {p('sum_digits')} "
        f"against digits dealt other values), its helix {of('r2/sum_helix', site=best)} (p {p('sum_helix')})"
    )
    if f"{best}/rank/sum_digit_columns" not in result.numbers:
        return [f"{line}."]
    return [
        f"{line}; the waves of it that digits can say {of('r2/sum_waves', site=best)}, as many random columns out of the "
        f"sum's digits {result.numbers[f'{best}/null/sum_digit_columns']:.2f} (p {p('sum_digit_columns')})."
    ]


_LINES = {
    "ceiling": ("another template (ceiling)", "black"), "digits": ("digits", BLUE), "helix": ("helix", ORANGE),
    "polynomial": ("polynomial", GREY),
}  # fmt: skip


def fits(result: Result) -> Figure:
    """R2 on held-out values by site: ceiling, digits, helix, polynomial; shaded: as many random columns of the digits."""
    figure, axes = new_figure(3.0)
    sites = list(result.series["sites"])
    _over_sites(axes, result, sites, {f"r2/{key}": line for key, line in _LINES.items()})
    _null_band(axes, result, sites, "digit_columns", "random columns\nof the digits", BLUE)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylabel("R² on held-out values")
    axes.set_title("What says the state of a number")
    legend_beside(axes)
    return figure


def sums(result: Result) -> Figure | None:
    """What the state at a sum's last token holds beyond functions of the addends; None if the model got no sum right."""
    sites = [site for site in result.series["sites"] if f"{site}/r2/sum_helix" in result.numbers]
    if not sites:
        return None
    figure, axes = new_figure(2.8)
    lines = {"r2/sum_digits": ("digits of the sum", BLUE), "r2/sum_helix": ("helix of the sum", ORANGE)}
    _over_sites(axes, result, sites, lines)
    if f"{sites[0]}/null/sum_digit_columns" in result.numbers:
        _null_band(axes, result, sites, "sum_digit_columns", "random columns\nof its digits", BLUE)
    _null_band(axes, result, sites, "sum_digits", "sum of digits\ndealt anew", GREY)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylabel("share of what the addends leave")
    axes.set_title("The sum, before its last digit")
    legend_beside(axes)
    return figure


def _over_sites(
    axes: Any,
    result: Result,
    sites: Sequence[str],
    lines: Mapping[str, tuple[str, str]],
    *,
    step: float = 0.06,
    fmt: str = "o-",
) -> None:
    """Plot numbers with intervals over sites, side by side; `lines`: name -> label and colour."""
    for number, (name, (label, colour)) in enumerate(lines.items()):
        values, errors = interval_bars(result, [f"{site}/{name}" for site in sites])
        places = [place + step * (number - (len(lines) - 1) / 2) for place in range(len(sites))]
        axes.errorbar(places, values, yerr=errors, fmt=fmt, markersize=3.5, linewidth=1, color=colour, label=label)
    axes.set_xticks(range(len(sites)), [site.removeprefix("block-") for site in sites])
    axes.set_xlabel("state after block")


def _null_band(axes: Any, result: Result, sites: Sequence[str], null: str, label: str, colour: str) -> None:
    """Shade from a null's median to its upper quantile."""
    middle, high = ([result.numbers[f"{site}/null/{null}{end}"] for site in sites] for end in ("", "/high"))
    axes.fill_between(range(len(sites)), middle, high, color=colour, alpha=0.15, label=label)


def power(result: Result) -> Figure:
    """Share of the energy of the mean states at every period, after removing a line, after three blocks; dashed: the band."""
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
    """Scores of every patch by block; None if nothing was patched."""
    sites = [site for site in result.series["sites"] if f"{site}/patch/helix" in result.numbers]
    if not sites:
        return None
    figure, axes = new_figure(3.0)
    named = zip(result.series["patches"], SERIES, strict=False)
    lines = {f"patch/{name}": (name.replace("_", " "), colour) for name, colour in named}
    _over_sites(axes, result, sites, lines, step=0.08, fmt="o")
    for height in (0, 1):
        axes.axhline(height, color="black", linewidth=0.6)
    axes.set_ylim(max(axes.get_ylim()[0], -SHOWN_SCORE), min(axes.get_ylim()[1], SHOWN_SCORE))
    axes.set_ylabel("logit won / by the other's own state")
    axes.set_title("Patching a number by what lies between two values")
    legend_beside(axes)
    return figure


def shares(result: Result) -> Figure:
    """The share of the helix, and of all that states say about the value, in Sae(x), the linear and the nonlinear error."""
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


FIGURES = {"fits": fits, "power": power, "sums": sums, "patches": patches, "shares": shares}
