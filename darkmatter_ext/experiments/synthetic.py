"""Does the split into linear and nonlinear error find planted noise and ablated latents?

Does the split into linear and nonlinear error find what was planted? (figure 15, table 1)

Sae(x) takes the place of the activation, so that its latents are all there is to find. The "SAE" of this activation is the
same one with the weakest active latents of each token ablated. Noise of known standard deviation is added to the
activation (dense, and known to b*) and to the reconstruction (what no map of the activation can know). Then the linear
and nonlinear error are estimated as everywhere, and compared with what was put in.

Energies are mean squared norms a token in units of one noise level, level^2 = 1 meaning d * unit^2: noise at level s has
energy s^2. The released code calls the level "variance"; it is a standard deviation.

Shapes: n tokens, d model dimension, A levels on the activation, R on the reconstruction, Q shares of ablated latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import seed_interval
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
from darkmatter_ext.runtime.inputs import InputError, require_at_least
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.drop_in import accelerate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


RELEASED_CODE_TOKENS = 50_000  # fitted and scored on the same ones
FIT_BATCH = 2048  # tokens widened to float64 at a time: (Q + 2) d columns of them
PLANTED = ("activation_noise", "reconstruction_noise", "ablation")
ESTIMATED = ("linear", "nonlinear")


@dataclass(frozen=True)
class SyntheticSettings(Settings):
    """Plant noise of known size and ablate latents, and see where the estimated linear and nonlinear error go."""

    levels: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0)
    """noise levels, standard deviations in units of unit, on the activation and on the reconstruction"""
    ablations: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    """shares of the active latents of each token to ablate, the weakest first"""
    unit: float = 0.0
    """standard deviation of level 1 in a dimension; 0: half the root mean square of the SAE's own error"""
    fit_tokens: int = 16_000
    """tokens b* is fitted on, at most"""
    score_tokens: int = 8_000
    """held-out tokens the error is estimated on, at most"""
    noise_seeds: int = 3
    """draws of all noises; intervals are over them"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.levels) < 2 or min(self.levels) < 0:
            raise InputError(f"levels: must be at least 2 numbers of at least 0, got {list(self.levels)}")
        if not self.ablations or not all(0 <= share < 1 for share in self.ablations):
            raise InputError(f"ablations: must be shares of at least 0 and below 1, got {list(self.ablations)}")
        require_at_least("unit", 0, self.unit)
        for name, least in (("fit_tokens", 2), ("score_tokens", 2), ("noise_seeds", 1)):
            require_at_least(name, least, getattr(self, name))

    @property
    def released(self) -> bool:
        """As the released code: fitted and scored on the same 50 000 tokens, level 1 = 1."""
        return self.measure.parity == "released-code"


PRESETS = {"demo": extended(DEMO, SyntheticSettings, widths=(2048,))}


def plan(settings: SyntheticSettings) -> list[str]:
    """Describe a run, one line a step, without starting it."""
    cells = len(settings.levels) ** 2 * len(settings.ablations)
    return [
        *plan_lines(settings),
        f"noise     levels {list(settings.levels)} (standard deviations) on activation and reconstruction",
        f"ablate    {', '.join(f'{share:.0%}' for share in settings.ablations)} of the active latents: {cells} cells",
        f"tokens    {_token_plan(settings)}; {settings.noise_seeds} draws of the noises",
    ]


def _token_plan(settings: SyntheticSettings) -> str:
    if settings.released:
        return f"fitted and scored on the same {RELEASED_CODE_TOKENS} (released code)"
    return f"b* fitted on {settings.fit_tokens}, scored on {settings.score_tokens} held-out ones"


def ablate_weakest(acts: SparseActs, share: float, strength: Tensor) -> SparseActs:
    """The acts with the weakest `share` of each token's active latents set to 0 (rounded down to whole latents).

    `strength` [F]: what a unit of each latent weighs (norms of decoder rows).
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


@torch.no_grad()
def measure_cells(
    clean: Tensor,
    ablated: Sequence[Tensor],
    fit: slice,
    score: slice,
    levels: Sequence[float],
    unit: float,
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Estimated linear and nonlinear error of every cell of the grid, in units of level 1.

    Args:
        clean: the activation without noise, [n, d].
        ablated: what each ablation takes from the reconstruction, Q tensors [n, d].
        fit, score: the tokens b* is fitted on and those the error is measured on.
        levels: A = R noise levels; unit: standard deviation of level 1.
        seed: of both noises.
        progress: called with 1 after every level of the activation noise.

    Returns:
        [A, R, Q, 2] mean squared norms of the linear and the nonlinear error, divided by d unit^2.

    The error is linear in its parts (ablation, the two noises), and so is least squares in its target: one regression a
    level, onto all parts side by side, gives every cell exactly. Cost a level: n d^2 (Q + 3) float64 multiply-adds.
    """
    n, d = clean.shape
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(n, d, generator=generator).to(clean) for _ in range(2)]
    parts = torch.cat([*ablated, *noises], dim=1)  # [n, (Q + 2) d]
    cells = torch.empty(len(levels), len(levels), len(ablated), 2, dtype=torch.float64)
    for a, level in enumerate(levels):
        x = clean + level * unit * noises[0]
        statistics = LinearStatistics(d, parts.shape[1], clean.device)
        for x_part, y_part in zip(x[fit].split(FIT_BATCH), parts[fit].split(FIT_BATCH), strict=True):
            statistics.update(x_part, y_part)
        predicted = statistics.solve()(x[score])
        linear = predicted.view(-1, len(ablated) + 2, d)
        nonlinear = (parts[score] - predicted).view_as(linear)
        for r, other in enumerate(levels):
            scale = (level * unit, -other * unit)
            for which, found in enumerate((linear, nonlinear)):
                noise = scale[0] * found[:, -2] + scale[1] * found[:, -1]
                energy = (found[:, :-2] + noise[:, None]).square().sum(-1).mean(0)  # [Q]
                cells[a, r, :, which] = energy.cpu() / (d * unit**2)
        if progress is not None:
            progress(1)
    return cells


def planted_energies(ablated: Sequence[Tensor], score: slice, levels: Sequence[float], unit: float) -> Tensor:
    """Energies [A, R, Q, 3] of what was planted, in the order of PLANTED and the units of `measure_cells`."""
    squares = torch.tensor(levels, dtype=torch.float64).square()
    taken = [part[score].double().square().sum(-1).mean().item() / (part.shape[1] * unit**2) for part in ablated]
    grids = torch.meshgrid(squares, squares, torch.tensor(taken, dtype=torch.float64), indexing="ij")
    return torch.stack(grids, dim=-1)


def attribution(planted: Tensor, estimated: Tensor) -> dict[str, float]:
    """Where the planted energies [A, R, Q, 3] went, by the estimates [A, R, Q, 2].

    `NAME/share_as/ESTIMATE`: of what is planted at the highest level of NAME alone, the part estimated as that kind of
    error. `NAME/correlation/ESTIMATE`: Pearson's r over all cells (table 1). NaN for what is not varied.
    """
    numbers = {}
    lowest = [int(planted[..., i].amin(dim=[j for j in range(3) if j != i]).argmin()) for i in range(len(PLANTED))]
    for i, name in enumerate(PLANTED):
        highest = list(lowest)
        highest[i] = int(planted[..., i].amax(dim=[j for j in range(3) if j != i]).argmax())
        added = planted[tuple(highest)][i] - planted[tuple(lowest)][i]
        for j, estimate in enumerate(ESTIMATED):
            gained = estimated[tuple(highest)][j] - estimated[tuple(lowest)][j]
            r = torch.corrcoef(torch.stack([planted[..., i].flatten(), estimated[..., j].flatten()]))[0, 1]
            numbers[f"{name}/share_as/{estimate}"] = (gained / added).item()
            numbers[f"{name}/correlation/{estimate}"] = r.item()
    return numbers


def _tokens(settings: SyntheticSettings, stored: StoredTokens) -> tuple[Tensor, slice, slice]:
    """Activations [n, d] with the slices to fit and to score on, a seeded sample of each side."""
    sides = [stored.with_role(role) for role in (FIT, HELD_OUT)]
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.released:
        every = torch.cat(sides)
        x = every[torch.randperm(len(every), generator=generator)[:RELEASED_CODE_TOKENS]]
        return x.to(settings.device), slice(None), slice(None)
    limits = (settings.fit_tokens, settings.score_tokens)
    parts = [
        side[torch.randperm(len(side), generator=generator)[:limit]] for side, limit in zip(sides, limits, strict=True)
    ]
    n_fit = len(parts[0])
    return torch.cat(parts).to(settings.device), slice(0, n_fit), slice(n_fit, None)


@torch.no_grad()
def _planted_in(sae: Any, x: Tensor, settings: SyntheticSettings) -> tuple[Tensor, list[Tensor], float]:
    """Sae(x), what each ablation takes from it, and the standard deviation of level 1."""
    own = cast("Any", accelerate(sae))
    acts = own.encode_sparse(x.to(own.dtype))
    clean = own.decode_sparse(acts).float()
    strength = own.W_dec.detach().norm(dim=1)
    ablated = [clean - own.decode_sparse(ablate_weakest(acts, share, strength)).float() for share in settings.ablations]
    unit = settings.unit or (1.0 if settings.released else 0.5 * (x - clean).square().mean().sqrt().item())
    return clean, ablated, unit


def run(settings: SyntheticSettings, stages: Stages) -> Result:
    """Plant and estimate, for every SAE.

    Raises InputError for bad settings, SAEs of several sites, or one without sparse codes; StateError for a damaged cache.
    """
    inputs = prepare(settings, stages, splices=True)
    x, fit, score = _tokens(settings, inputs.stored[inputs.one_site])
    numbers: dict[str, float] = {}
    grids: dict[str, Any] = {}
    levels, seed = settings.levels, settings.seed
    for sae in inputs.saes:
        name = sae.name
        with stages.stage(f"estimate planted error, {name}", settings.noise_seeds * len(levels)) as advance:
            clean, ablated, unit = _planted_in(sae.load(), x, settings)
            planted = planted_energies(ablated, score, levels, unit)
            draws = [
                measure_cells(clean, ablated, fit, score, levels, unit, seed=seed + number, progress=advance)
                for number in range(settings.noise_seeds)
            ]
        found = [attribution(planted, estimated) for estimated in draws]
        numbers[f"{name}/unit"] = unit
        for key in found[0]:
            numbers |= seed_interval([draw[key] for draw in found]).numbers(f"{name}/{key}")
        grids[name] = {"planted": planted.tolist(), "estimated": torch.stack(draws).mean(0).tolist()}
    notes = [
        f"Synthetic: {_token_plan(settings)}. Levels are standard deviations; energies are in units of level 1. "
        "Intervals: 95 %, Student's t over draws of the noises.",
    ]
    series = {"grids": grids, "planted": PLANTED, "estimated": ESTIMATED}
    return stored_result("synthetic", inputs, stages, numbers, series=series, notes=notes)


def table(result: Result) -> Table:
    """One row an SAE and planted quantity: where its energy went, and Pearson's r over the cells."""
    rows = []
    for sae in result.series["saes"]:
        for planted in result.series["planted"]:
            cells = [
                with_interval(result.numbers, f"{sae['name']}/{planted}/{kind}/{estimate}", "{:.2f}")
                for kind in ("share_as", "correlation")
                for estimate in result.series["estimated"]
            ]
            rows.append([f"{sae['name']}: {planted.replace('_', ' ')}", *cells])
    return Table(
        title=f"synthetic: {result.config['model']}, {result.config['hook']}, Sae(x) as the activation",
        headings=("planted", "estimated as linear", "as nonlinear", "r with linear", "r with nonlinear"),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """Where a unit of each planted energy is found, and how much of it is overfitting."""
    lines = []
    for sae_name in (sae["name"] for sae in result.series["saes"]):
        kinds = result.series["estimated"]
        noise, reconstruction, ablation = (
            [f"{result.numbers[f'{sae_name}/{planted}/share_as/{kind}']:.0%}" for kind in kinds]
            for planted in result.series["planted"]
        )
        lines.append(
            f"{sae_name}: noise in the activation is estimated as linear error to {noise[0]} and as nonlinear to "
            f"{noise[1]}; noise in the reconstruction {reconstruction[0]} and {reconstruction[1]} (planted: 0% and 100%); "
            f"ablated latents {ablation[0]} and {ablation[1]}."
        )
    return lines


def noise_grid(result: Result) -> Figure:
    """Estimated linear and nonlinear error over the two noises, nothing ablated; one row of panels an SAE."""
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
    """Estimated error without noise against the energy of the ablated latents, which it adds up to."""
    saes = result.series["saes"]
    figure, panels = new_panels(2.7, len(saes), sharey=True)
    for axes, sae in zip(panels, saes, strict=True):
        grid = result.series["grids"][sae["name"]]
        shares = [100 * share for share in result.config["ablations"]]
        linear, nonlinear = ([cell[which] for cell in grid["estimated"][0][0]] for which in (0, 1))
        axes.stackplot(
            shares, nonlinear, linear, colors=(BLUE, SKY), labels=("estimated nonlinear", "estimated linear")
        )
        axes.plot(
            shares, [cell[2] for cell in grid["planted"][0][0]], "ko--", markersize=3, linewidth=1, label="planted"
        )
        axes.set_xlabel("weakest active latents ablated, %")
        axes.set_title(f"Ablation without noise, {sae['d_sae']} latents")
    panels[0].set_ylabel("error, units of noise level 1")
    panels[0].legend(loc="upper left")
    return figure


FIGURES = {"noise": noise_grid, "ablation": ablation}
