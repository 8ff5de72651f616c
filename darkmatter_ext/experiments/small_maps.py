"""How much of the nonlinear error does a small nonlinear map of x predict?

"Nonlinear" error is what no *linear* map of x predicts. This asks the next question: how much of it do small nonlinear maps
predict on held-out documents, and how much is there to predict?

- *quadratic*: x and all products of its `rank` leading principal components, by ridge regression.
- *random features*: x and ReLU of `features` random directions of whitened x (Rahimi and Recht 2007), by ridge.
- *network*: two layers of `features` ReLUs on whitened x, by Adam, stopped when other fit documents are predicted best.
- *linear*, the baseline: R2 about 0, since b* has already removed what a linear map knows.
- *another seed*, the ceiling for what does not depend on this training run: least squares from x and the nonlinear error of
  the same kind of SAE from another seed. What two trainings share is a property of the activation; the part of it that no
  map of x finds exists, but is out of reach for a small map.
- *shuffled*, the control: the network on the nonlinear errors of other tokens.

The penalty of each ridge and the network's last step are chosen on a fifth of the fit documents; nothing is chosen on
held-out ones. R2 is over energies: 1 - sum |e - map(x)|^2 / sum |e - mean e|^2.

Shapes: n tokens, d width of the site, p features of a map.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from darkmatter_ext.estimators.intervals import Interval, bootstrap, sums_by
from darkmatter_ext.estimators.least_squares import train_mask
from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import presets
from darkmatter_ext.measurement.reading import tokens_again
from darkmatter_ext.measurement.run import Inputs, measured, prepare
from darkmatter_ext.measurement.settings import Settings
from darkmatter_ext.measurement.site_saes import SiteSae
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import GREY, SERIES, interval_bars, new_figure
from darkmatter_ext.report.table import Table, with_interval
from darkmatter_ext.runtime.inputs import require_at_least
from darkmatter_ext.runtime.progress import Stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAPS = {
    "linear": "a linear map of x (baseline: b* has taken what it knows)",
    "quadratic": "x and products of its principal components, ridge",
    "random_features": "x and random ReLU features of x, ridge",
    "network": "two-layer network of x",
    "another_seed": "x and the nonlinear error of an SAE from another seed",
    "shuffled": "control: the network, on nonlinear errors of other tokens",
}
PENALTIES = tuple(10.0**power for power in range(-4, 3))  # of a ridge, relative to the mean variance of its features
CHOOSING = 0.2  # share of the fit documents that penalties and the network's last step are chosen on
FEWEST_DOCUMENTS, RUN_TOKENS = 5, 64  # with fewer documents to divide, runs of this many tokens are divided instead
NETWORK_BATCH, NETWORK_RATE, PATIENCE = 512, 1e-3, 4  # epochs without a better score before the network stops
FEATURE_BATCH = 8192  # tokens whose features are computed at a time


@dataclass(frozen=True)
class SmallMapsSettings(Settings):
    """Predict the nonlinear error with small nonlinear maps of x."""

    rank: int = 48
    """principal components whose products are features of the quadratic map: rank (rank + 1) / 2 of them"""
    features: int = 1024
    """number of random features, and of units of the network"""
    epochs: int = 40
    """epochs of the network, at most"""
    fit_limit: int = 60_000
    """tokens the maps are fitted on, at most"""
    score_limit: int = 30_000
    """held-out tokens they are scored on, at most"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "features", "epochs", "fit_limit", "score_limit"):
            require_at_least(name, 1, getattr(self, name))


PRESETS = presets(SmallMapsSettings, {"widths": (2048,), "sae_seeds": 2})


def plan(settings: SmallMapsSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    return [
        *plan_lines(settings),
        f"read      up to {settings.fit_limit} fit and {settings.score_limit} held-out tokens once more",
        *(f"map       {about}" for about in MAPS.values()),
    ]


class Tokens(NamedTuple):
    """Tokens at a site, in memory."""

    x: Tensor  # [n, d] float32, whitened by `whitening`
    e: Tensor  # [n, d] the nonlinear error, scaled to a mean square of 1
    documents: Tensor  # [n] int64


class Sides(NamedTuple):
    """The tokens that a map is fitted on, its penalty is chosen on, and it is scored on."""

    fit: Tokens
    choose: Tokens
    score: Tokens


def whitening(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and principal components [d, d] of x [n, d], each divided by its standard deviation, largest first."""
    x = x.double()
    mean = x.mean(0)
    variance, directions = torch.linalg.eigh((x - mean).mT @ (x - mean) / len(x))
    scale = variance.clamp(min=variance.max() * 1e-8).sqrt()
    return mean, (directions / scale).flip(1)


# ---- the maps: each is fitted on `fit`, chosen on `choose`, and predicts for any tokens

Predict = Callable[[Tensor], Tensor]  # whitened x [n, d] -> predictions [n, d]
Features = Callable[[Tensor], Tensor]  # whitened x [n, d] -> [n, p]


def quadratic_features(rank: int) -> Features:
    """x and all products of its first `rank` columns."""
    rows, columns = torch.triu_indices(rank, rank)
    return lambda x: torch.cat([x, x[:, rows.to(x.device)] * x[:, columns.to(x.device)]], dim=1)


def random_features(d: int, count: int, *, seed: int) -> Features:
    """x and ReLU of `count` random directions of unit variance, with random thresholds."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(d, count, generator=generator) / d**0.5
    thresholds = torch.randn(count, generator=generator)
    return lambda x: torch.cat([x, (x @ directions.to(x) - thresholds.to(x)).relu()], dim=1)


def ridge(sides: Sides, features: Features) -> Predict:
    """Ridge regression of e on features of x, the penalty chosen from PENALTIES. Cost: n p^2 + p^3 multiply-adds."""
    moments = None
    for x, e in zip(sides.fit.x.split(FEATURE_BATCH), sides.fit.e.split(FEATURE_BATCH), strict=True):
        z = features(x)
        z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1).double()
        found = (z.mT @ z, z.mT @ e.double())
        moments = found if moments is None else tuple(a + b for a, b in zip(moments, found, strict=True))
    assert moments is not None  # there are fit tokens
    gram, cross = moments
    diagonal = torch.full((len(gram),), gram.diagonal()[:-1].mean().item(), dtype=gram.dtype, device=gram.device)
    diagonal[-1] = 0  # the bias is not penalised
    maps = [torch.linalg.solve(gram + torch.diag(penalty * diagonal), cross) for penalty in PENALTIES]

    def predict_with(weight: Tensor) -> Predict:
        own = weight.float()
        return lambda x: torch.cat([features(part) @ own[:-1] + own[-1] for part in x.split(FEATURE_BATCH)])

    every = [predict_with(weight) for weight in maps]
    return min(every, key=lambda predict: _squared_error(predict, sides.choose))


def network(sides: Sides, units: int, epochs: int, *, seed: int) -> Predict:
    """A two-layer network from x to e, as it was after the epoch that predicts `choose` best."""
    d = sides.fit.x.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(d, units), nn.ReLU(), nn.Linear(units, d)).to(sides.fit.x.device)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(layers.parameters(), lr=NETWORK_RATE, weight_decay=1e-2)
    best, kept, since = math.inf, copy.deepcopy(layers.state_dict()), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(sides.fit.x), generator=generator).split(NETWORK_BATCH):
            with torch.enable_grad():
                loss = (layers(sides.fit.x[rows]) - sides.fit.e[rows]).square().mean()
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
        error = _squared_error(_without_gradients(layers), sides.choose)
        since += 1
        if error < best:
            best, kept, since = error, copy.deepcopy(layers.state_dict()), 0
        if since == PATIENCE:
            break
    layers.load_state_dict(kept)
    return _without_gradients(layers)


def _without_gradients(layers: nn.Module) -> Predict:
    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        return torch.cat([layers(part) for part in x.split(FEATURE_BATCH)])

    return predict


def _squared_error(predict: Predict, tokens: Tokens) -> float:
    return (predict(tokens.x) - tokens.e).double().square().sum().item()


def r2(predicted: Tensor, tokens: Tokens, *, seed: int) -> Interval:
    """R2 (of energies) of predictions [n, d], with its interval by document."""
    e = tokens.e.double()
    columns = [(e - predicted.double()).square().sum(1), e.square().sum(1), *e.unbind(1), torch.ones_like(e[:, 0])]
    sums = sums_by(tokens.documents, *(column.cpu() for column in columns))

    def of(totals: Tensor) -> Tensor:
        rest, square, mean, n = totals[..., 0], totals[..., 1], totals[..., 2:-1], totals[..., -1]
        return (1 - rest / (square - mean.square().sum(-1) / n))[..., None]

    return bootstrap(sums, of, seed=seed)[0]


def map_numbers(sides: Sides, other: Sides | None, settings: SmallMapsSettings) -> dict[str, float]:
    """`r2/MAP` for MAPS, with intervals; `other`: the same tokens with another seed's nonlinear error beside x."""
    seed, d = settings.seed, sides.fit.x.shape[1]
    order = torch.randperm(len(sides.fit.e), generator=torch.Generator().manual_seed(seed)).to(sides.fit.e.device)
    strangers = sides._replace(fit=sides.fit._replace(e=sides.fit.e[order]))
    predictors: dict[str, tuple[Sides, Predict]] = {
        "linear": (sides, ridge(sides, lambda x: x)),
        "quadratic": (sides, ridge(sides, quadratic_features(min(settings.rank, d)))),
        "random_features": (sides, ridge(sides, random_features(d, settings.features, seed=seed))),
        "network": (sides, network(sides, settings.features, settings.epochs, seed=seed)),
        "shuffled": (sides, network(strangers, settings.features, settings.epochs, seed=seed)),
    }
    if other is not None:
        predictors["another_seed"] = (other, ridge(other, lambda x: x))
    numbers: dict[str, float] = {}
    for name in MAPS:
        if name in predictors:
            own, predict = predictors[name]
            numbers |= r2(predict(own.score.x), own.score, seed=seed).numbers(f"r2/{name}")
    return numbers


# ---- the run


def _tokens(inputs: Inputs, hook: str, settings: SmallMapsSettings) -> dict[int, tuple[Tensor, Tensor]]:
    """Activations and documents of fit and of held-out tokens, in memory."""
    found = {}
    for role, limit in ((FIT, settings.fit_limit), (HELD_OUT, settings.score_limit)):
        again = tokens_again(
            inputs.source, inputs.roles, hook, (role,), limit=limit, seed=settings.seed, device=settings.device
        )
        x, documents = (torch.cat(part) for part in zip(*again, strict=True))
        found[role] = x.float(), documents
    return found


def _sides(tokens: dict[int, tuple[Tensor, Tensor]], site: SiteMeasurement, sae: SiteSae, *, seed: int) -> Sides:
    """Whitened x with an SAE's nonlinear error, the fit documents divided."""
    mean, components = whitening(tokens[FIT][0])
    errors = {role: _nonlinear(x, site, sae) for role, (x, _) in tokens.items()}
    scale = errors[FIT].square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    every = {
        role: Tokens(((x.double() - mean) @ components).float(), errors[role] / scale, documents)
        for role, (x, documents) in tokens.items()
    }
    fit = every[FIT]
    few = len(fit.documents.unique()) < FEWEST_DOCUMENTS
    runs = torch.arange(len(fit.documents)) // RUN_TOKENS
    chosen = train_mask(runs if few else fit.documents, fraction=1 - CHOOSING, seed=seed)
    parts = [Tokens(*(column[rows] for column in fit)) for rows in (chosen, ~chosen)]
    return Sides(parts[0], parts[1], every[HELD_OUT])


@torch.no_grad()
def _nonlinear(x: Tensor, site: SiteMeasurement, sae: SiteSae) -> Tensor:
    """SaeError(x) - b* x, float32."""
    encode, b_star = sae.own, site.maps[sae.name]
    return torch.cat([(part - encode(part).x_hat - b_star(part).float()) for part in x.split(FEATURE_BATCH)])


def _beside(sides: Sides, other: Sides) -> Sides:
    """x joined by another SAE's nonlinear error, as predictors of this one's."""
    return Sides(
        *(own._replace(x=torch.cat([own.x, theirs.e], dim=1)) for own, theirs in zip(sides, other, strict=True))
    )


def _other_seed(inputs: Inputs, sae: SiteSae) -> SiteSae | None:
    """The same SAE from the next seed, if there is one."""
    if sae.trained is None:
        return None
    wanted = sae.trained._replace(seed=sae.trained.seed + 1)
    return next((own for own in inputs.of(sae.hook) if own.trained == wanted), None)


@torch.no_grad()
def run(settings: SmallMapsSettings, stages: Stages) -> Result:
    """Measure, then fit the maps for every SAE (the first of several seeds).

    Raises InputError for bad settings, SAEs that do not fit; StateError for damaged files.
    """
    inputs = prepare(settings, stages)
    found = measured(inputs, stages)
    saes = [sae for sae in inputs.saes if sae.trained is None or sae.trained.seed == 0]
    numbers: dict[str, float] = {}
    read: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for sae in saes:
        site = found.site_of(sae.name)
        with stages.stage(f"fit small maps, {sae.name}"):
            if sae.hook not in read:
                read = {sae.hook: _tokens(inputs, sae.hook, settings)}
            sides = _sides(read[sae.hook], site, sae, seed=settings.seed)
            second = _other_seed(inputs, sae)
            beside = None
            if second is not None:
                beside = _beside(sides, _sides(read[sae.hook], site, second, seed=settings.seed))
            own = map_numbers(sides, beside, settings)
        decomposition = site.decomposition(sae.name)
        own |= {"fvu": decomposition.fvu, "fvu_nonlinear": decomposition.fvu_nonlinear}
        own |= {
            "fit_documents": len(sides.fit.documents.unique()),
            "score_documents": len(sides.score.documents.unique()),
        }
        numbers |= {f"{sae.name}/{key}": value for key, value in own.items()}
    notes = [
        "R2 of energies of the nonlinear error on held-out tokens; intervals 95 %, by document; maps, penalties and the "
        "network's last step stay as fitted. FVU_nonlinear times (1 - R2) is what a map leaves.",
    ]
    listed: list[dict[str, Any]] = [sae.listed for sae in saes]
    series = {"saes": listed, "maps": MAPS}
    return measured_result("small-maps", found, stages, numbers, series=series, notes=notes)


def _shown(result: Result) -> list[str]:
    first = result.series["saes"][0]["name"]
    return [name for name in result.series["maps"] if f"{first}/r2/{name}" in result.numbers]


def table(result: Result) -> Table:
    """One row per map, one column per SAE."""
    saes = result.series["saes"]
    rows = [
        [
            result.series["maps"][name],
            *(with_interval(result.numbers, f"{sae['name']}/r2/{name}", "{:.3f}") for sae in saes),
        ]
        for name in _shown(result)
    ]
    return Table(
        title=f"small-maps: {result.config['model']}, {result.config['hook']}, held-out R² of the nonlinear error",
        headings=("from", *(sae["name"] for sae in saes)),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """How much the best small map predicts, and how much another training run shares."""
    numbers, lines = result.numbers, []
    candidates = [name for name in ("quadratic", "random_features", "network") if name in _shown(result)]
    for sae in result.series["saes"]:
        own = sae["name"]
        best = max(candidates, key=lambda name, own=own: numbers[f"{own}/r2/{name}"])
        value = numbers[f"{own}/r2/{best}"]
        left = numbers[f"{own}/fvu_nonlinear"] * (1 - max(0.0, value))
        line = (
            f"{own}: of the nonlinear error the best small map of x ({best.replace('_', ' ')}) predicts "
            f"{with_interval(numbers, f'{own}/r2/{best}', '{:.1%}')}; of FVU nonlinear {numbers[f'{own}/fvu_nonlinear']:.3f} "
            f"that leaves {left:.3f}. The linear baseline has {with_interval(numbers, f'{own}/r2/linear', '{:.1%}')}, the "
            f"shuffled control {with_interval(numbers, f'{own}/r2/shuffled', '{:.1%}')}."
        )
        if f"{own}/r2/another_seed" in numbers:
            shared = with_interval(numbers, f"{own}/r2/another_seed", "{:.1%}")
            line += (
                f" The nonlinear error of another seed tells {shared} of it: of the activation, not of one training."
            )
        lines.append(line)
    return lines


def bars(result: Result) -> Figure:
    """Held-out R2 of every map, one group of bars per SAE, with intervals by document."""
    saes, shown = result.series["saes"], _shown(result)
    figure, axes = new_figure(0.9 + 0.34 * len(shown) * max(1, len(saes)) ** 0.5)
    height = 0.8 / len(saes)
    for number, sae in enumerate(saes):
        lengths, errors = interval_bars(result, [f"{sae['name']}/r2/{name}" for name in shown])
        where = [place + (number - (len(saes) - 1) / 2) * height for place in range(len(shown))]
        axes.barh(where, lengths, height, xerr=errors, color=SERIES[number % len(SERIES)], label=sae["name"],
                  error_kw={"linewidth": 0.8})  # fmt: skip
    axes.axvline(0, color=GREY, linewidth=0.6)
    axes.set_yticks(range(len(shown)), [name.replace("_", " ") for name in shown])
    axes.invert_yaxis()
    axes.set_xlabel("held-out R² of the nonlinear error")
    axes.set_title("What small maps of x know of the nonlinear error")
    if len(saes) > 1:
        axes.legend(loc="lower right")
    return figure


FIGURES = {"bars": bars}
