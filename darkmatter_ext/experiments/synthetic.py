"""Does the split into linear and nonlinear error find planted noise and ablated latents?

Does the split into linear and nonlinear error find what was planted? (figure 15, table 1)

x' = Sae(x) replaces the activation, so that its latents are all there is to find. The "SAE" of this activation is the same
SAE, which encodes x' again with some latents ablated: by default the same ones at every token, those with the smallest mean
value, as if they were features that the SAE lacks. (Ablating the weakest latents of each token instead, `--ablate tokens`, is
a threshold, which is nonlinear even for features that are linear in x'.) Noise of known standard deviation is added to
the activation (dense, and known to b*) and to the reconstruction (which no map of the activation can know). Then the linear
and nonlinear errors are estimated as usual and compared with what was planted.

Energies are mean squared norms per token in units of one noise level, where level^2 = 1 means d * unit^2: noise at level s
has energy s^2. The released code calls the level "variance"; it is a standard deviation.

Shapes: n tokens, D documents, d model dimension, A levels on the activation, R on the reconstruction, Q shares of ablated
latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import Statistic, bootstrap, sums_by
from darkmatter_ext.estimators.least_squares import LinearStatistics
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import DEMO
from darkmatter_ext.measurement.run import prepare
from darkmatter_ext.measurement.settings import Settings, extended
from darkmatter_ext.measurement.stored_tokens import StoredTokens
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.report.measured import stored_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, SKY, WIDTH, new_panels
from darkmatter_ext.report.table import Table, with_interval
from darkmatter_ext.runtime.inputs import InputError, require_at_least, require_one_of
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.drop_in import accelerate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


RELEASED_CODE_TOKENS = 50_000  # fitted and scored on the same tokens
FIT_BATCH = 2048  # tokens converted to float64 at a time, (Q + 4) d columns each
NOISES = ("activation_noise", "reconstruction_noise")
PLANTED = (*NOISES, "ablation")
ESTIMATED = ("linear", "nonlinear")
ABLATE = ("latents", "tokens")


@dataclass(frozen=True)
class SyntheticSettings(Settings):
    """Plant noise of known size and ablate latents, and see how the estimated linear and nonlinear errors respond."""

    levels: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0)
    """noise levels (standard deviations in units of unit) on the activation and on the reconstruction"""
    ablations: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    """shares of the latents to ablate, the weakest first"""
    ablate: str = "latents"
    """latents: the same at every token, by mean value, as the paper's code does; tokens: each token's weakest active ones"""
    unit: float = 0.0
    """standard deviation of level 1 per dimension; 0: half the root mean square of the SAE's own error"""
    fit_tokens: int = 16_000
    """tokens b* is fitted on, at most"""
    score_tokens: int = 8_000
    """held-out tokens the error is estimated on, at most"""
    noise_seeds: int = 3
    """draws of all the noise, averaged"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.levels) < 2 or min(self.levels) < 0:
            raise InputError(f"levels: must be at least 2 numbers of at least 0, got {list(self.levels)}")
        if not self.ablations or not all(0 <= share < 1 for share in self.ablations):
            raise InputError(f"ablations: must be shares of at least 0 and below 1, got {list(self.ablations)}")
        require_one_of("ablate", ABLATE, self.ablate)
        require_at_least("unit", 0, self.unit)
        for name, least in (("fit_tokens", 2), ("score_tokens", 2), ("noise_seeds", 1)):
            require_at_least(name, least, getattr(self, name))

    @property
    def released(self) -> bool:
        """Whether to follow the released code: fitted and scored on the same 50 000 tokens, level 1 = 1."""
        return self.measure.released


_ABLATED = {"latents": "latents, the same at every token", "tokens": "active latents of each token"}
PRESETS = {"demo": extended(DEMO, SyntheticSettings, widths=(2048,))}


def plan(settings: SyntheticSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    cells = len(settings.levels) ** 2 * len(settings.ablations)
    shares = ", ".join(f"{share:.0%}" for share in settings.ablations)
    return [
        *plan_lines(settings),
        f"noise     levels {list(settings.levels)} (standard deviations) on activation and reconstruction",
        f"ablate    {shares} of the {_ABLATED[settings.ablate]}: {cells} cells",
        f"tokens    {_token_plan(settings)}; {settings.noise_seeds} draws of the noises",
    ]


def _token_plan(settings: SyntheticSettings) -> str:
    if settings.released:
        return f"fitted and scored on the same {RELEASED_CODE_TOKENS} (released code)"
    return f"b* fitted on {settings.fit_tokens}, scored on {settings.score_tokens} held-out ones"


def ablate_latents(acts: SparseActs, share: float, order: Tensor) -> SparseActs:
    """The acts without the first `share` of the latents in `order` [F] (rounded down), at every token."""
    kept = torch.ones(acts.d_sae, dtype=torch.bool, device=acts.values.device)
    kept[order[: int(share * acts.d_sae)]] = False
    values = acts.values.reshape(-1) * kept[acts.col_indices]
    return dataclasses.replace(acts, values=values.reshape(acts.values.shape))


def weakest_first(acts: SparseActs, strength: Tensor, tokens: slice) -> Tensor:
    """Latents [F], weakest first, by their mean value over `tokens` times the weight of one unit of each [F]."""
    token = acts.token_numbers()
    inside = (token >= (tokens.start or 0)) & (token < (acts.n_tokens if tokens.stop is None else tokens.stop))
    weight = (acts.values.reshape(-1) * strength[acts.col_indices]).double() * inside
    total = torch.zeros(acts.d_sae, dtype=torch.float64, device=weight.device).index_add_(0, acts.col_indices, weight)
    return total.sort(stable=True).indices


def ablate_tokens(acts: SparseActs, share: float, strength: Tensor) -> SparseActs:
    """The acts with the weakest `share` of each token's active latents (rounded down to whole latents) set to 0.

    `strength` [F]: the weight of one unit of each latent (norms of decoder rows).
    """
    values, token = acts.values.reshape(-1), acts.token_numbers()
    weight = values * strength[acts.col_indices]
    active = weight != 0
    order = weight.sort(descending=True, stable=True).indices
    order = order[token[order].sort(stable=True).indices]  # token by token, strongest first
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - acts.crow_indices[token[order]]
    l0 = torch.zeros(acts.n_tokens, dtype=torch.int64, device=token.device).index_add_(0, token, active.long())
    keep = rank < l0[token] - (share * l0[token]).floor().long()
    return dataclasses.replace(acts, values=(values * keep).reshape(acts.values.shape))


@dataclass(frozen=True)
class Planted:
    """The planted parts of an SAE's tokens, and where b* is fitted and scored."""

    clean: Tensor  # [n, d] the activation without noise
    introduced: Tensor  # [n, d] its error with nothing ablated: the encoder's own, on x'
    ablated: Sequence[Tensor]  # Q tensors [n, d]: what each ablation takes from the reconstruction
    fit: slice
    score: slice
    documents: Tensor  # [n] int64
    unit: float  # standard deviation of level 1 per dimension
    released: bool = False  # no bias in the regression, FVU about one mean for all dimensions


@torch.no_grad()
def measure_cells(
    planted: Planted, levels: Sequence[float], *, seed: int, progress: Callable[[int], None] | None = None
) -> Tensor:
    """Sums, over the scored tokens of each document, of everything that `numbers_of` needs.

    Args:
        planted: see `Planted`.
        levels: A = R noise levels.
        seed: of both noises.
        progress: called with 1 after every level of the activation noise.

    Returns:
        [D, m] float64, to be read by `unpacked`: squared norms of the linear and the nonlinear estimate and of the error of
        every cell, and of each ablation alone, in units of d unit^2; the variance of x at each level; tokens.

    The error is linear in its parts (introduced, ablation, the two noises), and least squares is linear in its target, so
    one regression per level, with all parts side by side as targets, gives every cell exactly. Cost per level:
    n d^2 (Q + 4) float64 multiply-adds.
    """
    clean, unit = planted.clean, planted.unit
    n, d = clean.shape
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(n, d, generator=generator).to(clean) for _ in range(2)]
    parts = torch.cat([planted.introduced, *planted.ablated, *noises], dim=1)  # [n, (Q + 3) d]
    cells, alone, variances = [], [], []
    for level in levels:
        x = clean + level * unit * noises[0]
        statistics = LinearStatistics(d, parts.shape[1], clean.device)
        for x_part, y_part in zip(x[planted.fit].split(FIT_BATCH), parts[planted.fit].split(FIT_BATCH), strict=True):
            statistics.update(x_part, y_part)
        predicted = (statistics.about_zero() if planted.released else statistics).solve()(x[planted.score])
        linear = predicted.view(-1, len(planted.ablated) + 3, d)
        whole = parts[planted.score].view_as(linear).to(linear.dtype)
        found = (linear, whole - linear, whole)
        energies = [_Products.of(part) for part in found]
        cells += [own.energy(level * unit, -other * unit) for other in levels for own in energies]
        if level == min(levels):
            alone = [part[:, 1:-2].square().sum(-1) for part in found]
        mean = x[planted.score].mean() if planted.released else x[planted.score].mean(0)
        variances.append((x[planted.score] - mean).square().sum(-1, keepdim=True))
        if progress is not None:
            progress(1)
    energies = torch.cat([*cells, *alone, *variances], dim=1) / (d * unit**2)  # [n', m - 1]
    columns = torch.cat([energies, torch.ones_like(energies[:, :1])], dim=1).cpu()
    return sums_by(planted.documents[planted.score].cpu(), *columns.unbind(1))


class _Products(NamedTuple):
    """Dot products of a token's parts: every cell's energy without forming its error, Q + 5 products for A R cells."""

    fixed: Tensor  # [n, Q] squared norms of what is in the error without the noises
    with_noises: Tensor  # [n, Q, 2] their products with both noises
    noises: Tensor  # [n, 2, 2]

    @classmethod
    def of(cls, parts: Tensor) -> _Products:
        """From parts [n, Q + 3, d]: introduced, ablated, both noises."""
        fixed, noises = parts[:, :1] + parts[:, 1:-2], parts[:, -2:]
        return cls(fixed.square().sum(-1), fixed @ noises.mT, noises @ noises.mT)

    def energy(self, *factors: float) -> Tensor:
        """[n, Q] squared norms after adding the noises times these factors."""
        f = torch.tensor(factors, dtype=self.fixed.dtype, device=self.fixed.device)
        return self.fixed + 2 * self.with_noises @ f + (self.noises @ f @ f)[:, None]


class Cells(NamedTuple):
    """Means over tokens, in units of d unit^2, for any number of draws [...]."""

    cells: Tensor  # [..., A, R, 3, Q]: linear, nonlinear, error
    alone: Tensor  # [..., 3, Q]: the same for each ablation with nothing else in the error
    variance: Tensor  # [..., A]: of the activation


def unpacked(sums: Tensor, levels: int) -> Cells:
    """Totals [..., m] of `measure_cells` as means."""
    means = sums[..., :-1] / sums[..., -1:]
    q = (means.shape[-1] - levels) // (3 * levels**2 + 3)
    cells, alone, variance = means.split([3 * levels**2 * q, 3 * q, levels], dim=-1)
    return Cells(cells.unflatten(-1, (levels, levels, 3, q)), alone.unflatten(-1, (3, q)), variance)


def numbers_of(levels: Sequence[float]) -> tuple[list[str], Statistic]:
    """Names of an SAE's numbers, and the function from totals [..., m] to these numbers [..., q].

    `PLANTED/share_as/ESTIMATE`: of what a noise at its highest level adds to the error, or of the energy of the largest
    ablation alone, the part estimated as that kind of error.
    `NOISE/correlation/ESTIMATE`: Pearson's r of the noise's level with the estimate as a difference of FVUs, over the A R
    cells without ablation (table 1).
    """
    names = [f"{planted}/share_as/{estimate}" for planted in PLANTED for estimate in ESTIMATED]
    names += [f"{noise}/correlation/{estimate}" for noise in NOISES for estimate in ESTIMATED]
    low, high = levels.index(min(levels)), levels.index(max(levels))
    added = max(levels) ** 2 - min(levels) ** 2
    grid = torch.meshgrid(*2 * [torch.tensor(levels, dtype=torch.float64)], indexing="ij")

    def statistic(sums: Tensor) -> Tensor:
        cells, alone, variance = unpacked(sums, len(levels))
        plain = cells[..., 0]  # [..., A, R, 3]
        start = plain[..., low, low, :2]
        shares = [(end - start) / added for end in (plain[..., high, low, :2], plain[..., low, high, :2])]
        shares.append(alone[..., :2, -1] / alone[..., 2:, -1])
        estimates = torch.stack([plain[..., 2] - plain[..., 1], plain[..., 1]], dim=-1) / variance[..., None, None]
        table = [_correlation(noise.to(estimates.device), estimates) for noise in grid]
        return torch.cat([*shares, *table], dim=-1)

    return names, statistic


def _correlation(level: Tensor, estimates: Tensor) -> Tensor:
    """Pearson's r [..., 2] of levels [A, R] with estimates [..., A, R, 2]."""
    a, b = (level - level.mean())[..., None], estimates - estimates.mean((-3, -2), keepdim=True)
    return (a * b).sum((-3, -2)) / (a.square().sum() * b.square().sum((-3, -2))).sqrt()


def _tokens(settings: SyntheticSettings, stored: StoredTokens) -> tuple[Tensor, Tensor, slice, slice]:
    """Activations [n, d] and documents [n], with the slices to fit on and to score on: a seeded sample of each side."""
    sides = [(stored.with_role(role), stored.documents_with(role)) for role in (FIT, HELD_OUT)]
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.released:
        x, documents = (torch.cat(part) for part in zip(*sides, strict=True))
        chosen = torch.randperm(len(x), generator=generator)[:RELEASED_CODE_TOKENS]
        return x[chosen].to(settings.device), documents[chosen], slice(None), slice(None)
    limits = (settings.fit_tokens, settings.score_tokens)
    chosen = [torch.randperm(len(x), generator=generator)[:limit] for (x, _), limit in zip(sides, limits, strict=True)]
    x, documents = (
        torch.cat([side[part][rows] for side, rows in zip(sides, chosen, strict=True)]) for part in range(2)
    )
    n_fit = len(chosen[0])
    return x.to(settings.device), documents, slice(0, n_fit), slice(n_fit, None)


@torch.no_grad()
def plant(sae: Any, x: Tensor, documents: Tensor, fit: slice, score: slice, settings: SyntheticSettings) -> Planted:
    """Ablate latents of an SAE on its own reconstructions of x [n, d]."""
    own = cast("Any", accelerate(sae))
    first = own.encode_sparse(x.to(own.dtype))
    clean = own.decode_sparse(first)
    acts = own.encode_sparse(clean)  # encode again, as the released code does: the encoder errs on x' too
    again, clean = own.decode_sparse(acts).float(), clean.float()
    strength = own.W_dec.detach().norm(dim=1)
    order = weakest_first(first, strength, fit)
    ablated = []
    for share in settings.ablations:
        rest = (
            ablate_latents(acts, share, order) if settings.ablate == "latents" else ablate_tokens(acts, share, strength)
        )
        ablated.append(again - own.decode_sparse(rest).float())
    unit = settings.unit or (1.0 if settings.released else 0.5 * (x - clean).square().mean().sqrt().item())
    return Planted(clean, clean - again, ablated, fit, score, documents, unit, settings.released)


def planted_energies(planted: Planted, levels: Sequence[float]) -> Tensor:
    """Energies [A, R, Q, 3] of what was planted, in the order of PLANTED and the units of `measure_cells`."""
    squares = torch.tensor(levels, dtype=torch.float64).square()
    scale = planted.clean.shape[1] * planted.unit**2
    taken = [part[planted.score].double().square().sum(-1).mean().item() / scale for part in planted.ablated]
    grids = torch.meshgrid(squares, squares, torch.tensor(taken, dtype=torch.float64), indexing="ij")
    return torch.stack(grids, dim=-1)


def run(settings: SyntheticSettings, stages: Stages) -> Result:
    """Plant errors and estimate them, for every SAE.

    Raises InputError for bad settings, SAEs of several sites, or one without sparse codes; StateError for a damaged cache.
    """
    inputs = prepare(settings, stages, splices=True)
    x, documents, fit, score = _tokens(settings, inputs.stored[inputs.one_site])
    names, statistic = numbers_of(settings.levels)
    numbers: dict[str, float] = {"scored_documents": len(documents[score].unique())}
    grids: dict[str, Any] = {}
    for sae in inputs.saes:
        planted = plant(sae.load(), x, documents, fit, score, settings)
        with stages.stage(f"estimate {sae.name}", settings.noise_seeds * len(settings.levels)) as advance:
            draws = [
                measure_cells(planted, settings.levels, seed=settings.seed + number, progress=advance)
                for number in range(settings.noise_seeds)
            ]
        sums = torch.stack(draws).mean(0)
        for name, interval in zip(names, bootstrap(sums, statistic, seed=settings.seed), strict=True):
            numbers |= interval.numbers(f"{sae.name}/{name}")
        found = unpacked(sums.sum(0), len(settings.levels))
        scale = x.shape[1] * planted.unit**2
        introduced = planted.introduced[score].double().square().sum(-1).mean().item() / scale
        numbers |= {f"{sae.name}/unit": planted.unit, f"{sae.name}/introduced": introduced}
        grids[sae.name] = {
            "estimated": found.cells[:, :, :2].mT.tolist(),  # [A, R, Q, 2]
            "planted": planted_energies(planted, settings.levels).tolist(),
            "ablation_alone": found.alone[:2].mT.tolist(),  # [Q, 2]
        }
    notes = [
        f"Synthetic: {_token_plan(settings)}. Levels are standard deviations; energies are in units of level 1, means of "
        f"{settings.noise_seeds} draws of the noises. Ablated: {_ABLATED[settings.ablate]}. Intervals: 95 %, by document.",
    ]
    series = {"grids": grids, "planted": PLANTED, "estimated": ESTIMATED}
    return stored_result("synthetic", inputs, stages, numbers, series=series, notes=notes)


def table(result: Result) -> Table:
    """One row per SAE and planted quantity: where its energy went, and for the noises the correlations of table 1."""
    rows = []
    for sae in result.series["saes"]:
        for planted in result.series["planted"]:
            names = [
                f"{sae['name']}/{planted}/{kind}/{estimate}"
                for kind in ("share_as", "correlation")
                for estimate in result.series["estimated"]
            ]
            cells = [with_interval(result.numbers, name, "{:.2f}") if name in result.numbers else "" for name in names]
            rows.append([f"{sae['name']}: {planted.replace('_', ' ')}", *cells])
    return Table(
        title=f"synthetic: {result.config['model']}, {result.config['hook']}, Sae(x) as the activation",
        headings=("planted", "estimated as linear", "as nonlinear", "r with linear", "r with nonlinear"),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """Where one unit of each planted energy is found."""
    lines = []
    for sae_name in (sae["name"] for sae in result.series["saes"]):
        kinds = result.series["estimated"]
        noise, reconstruction, ablation = (
            [with_interval(result.numbers, f"{sae_name}/{planted}/share_as/{kind}", "{:.0%}") for kind in kinds]
            for planted in result.series["planted"]
        )
        lines.append(
            f"{sae_name}: noise in the activation is estimated as linear error to {noise[0]} and as nonlinear to "
            f"{noise[1]}; noise in the reconstruction {reconstruction[0]} and {reconstruction[1]} (planted: 0% and 100%); "
            f"the largest ablation ({_ABLATED[result.config['ablate']]}) {ablation[0]} and {ablation[1]}."
        )
    return lines


def noise_grid(result: Result) -> Figure:
    """Estimated linear and nonlinear error over the two noises, with nothing ablated; one row of panels per SAE."""
    from matplotlib.figure import Figure

    saes, levels = result.series["saes"], result.config["levels"]
    figure = Figure(figsize=(WIDTH, 2.9 * len(saes)), layout="constrained")
    panels = figure.subplots(len(saes), 2, squeeze=False, sharey=True)
    for row, sae in zip(panels, saes, strict=True):
        cells = result.series["grids"][sae["name"]]["estimated"]
        top = max(max(entry[0]) for line in cells for entry in line)
        for axes, (which, title) in zip(row, enumerate(("linear", "nonlinear")), strict=True):
            values = [[cells[a][r][0][which] for r in range(len(levels))] for a in range(len(levels))]
            axes.imshow(values, origin="lower", cmap="cividis", vmin=0, vmax=top, aspect="auto")
            for a, line in enumerate(values):
                for r, value in enumerate(line):
                    colour = "black" if value > 0.5 * top else "white"
                    axes.annotate(f"{value:.1f}", (r, a), ha="center", va="center", fontsize=8, color=colour)
            ticks = [f"{level:g}" for level in levels]
            axes.set_xticks(range(len(levels)), ticks)
            axes.set_yticks(range(len(levels)), ticks)
            axes.set_xlabel("noise on the reconstruction, std")
            axes.set_title(f"Estimated {title} error" + (f", {sae['d_sae']} latents" if len(saes) > 1 else ""))
        row[0].set_ylabel("noise on the activation, std")
    return figure


def ablation(result: Result) -> Figure:
    """Estimated error without noise against the energy of the ablated latents, which its parts add up to."""
    saes = result.series["saes"]
    figure, panels = new_panels(2.7, len(saes), sharey=True)
    for axes, sae in zip(panels, saes, strict=True):
        grid = result.series["grids"][sae["name"]]
        shares = [100 * share for share in result.config["ablations"]]
        linear, nonlinear = ([cell[which] for cell in grid["ablation_alone"]] for which in (0, 1))
        axes.stackplot(
            shares, nonlinear, linear, colors=(BLUE, SKY), labels=("estimated nonlinear", "estimated linear")
        )
        axes.plot(
            shares, [cell[2] for cell in grid["planted"][0][0]], "ko--", markersize=3, linewidth=1, label="planted"
        )
        axes.set_xlabel(f"{_ABLATED[result.config['ablate']]}, %")
        axes.set_title(f"Ablation without noise, {sae['d_sae']} latents")
    panels[0].set_ylabel("error, units of noise level 1")
    panels[0].legend(loc="upper left")
    return figure


FIGURES = {"noise": noise_grid, "ablation": ablation}
