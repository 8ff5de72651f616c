"""What SAE outputs of earlier sites say about the error and its linear and nonlinear part.

What SAE outputs of earlier sites say about the error (the paper's figure 10b).

Least squares from the outputs of SAEs at the same site (res), the previous residual stream, and the MLP and attention of
the same block to SaeError(x), its linear and its nonlinear part; R2 on held-out tokens, each predictor alone and all
together. If the nonlinear error were features of earlier layers that the SAE misses, their SAEs would predict it.

Controls: `x` itself (the nonlinear error is what x does not predict: R2 must be about 0), `shuffled`, the output of the
previous SAE at another token (about 0), `random`, a TopK SAE of random directions there (nothing learned; what is left is
that sparse codes of another tensor are nonlinear in x).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from darkmatter_ext.activations.hook_points import parse_hook_point
from darkmatter_ext.measurement import family, many_saes, many_saes_config
from darkmatter_ext.measurement.family import AnyConfig, FamilyConfig, FamilySite, given_hooks, measured_family
from darkmatter_ext.measurement.many_saes import Measured
from darkmatter_ext.measurement.many_saes_config import ManySaesConfig
from darkmatter_ext.measurement.measurement import MeasuredSae, SiteMeasurement
from darkmatter_ext.measurement.nulls import other_tokens
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREEN, ORANGE, interval_bars, new_panels
from darkmatter_ext.report.table import Table, shown, with_interval
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import Encoded, Encoder, as_encoder, random_directions
from darkmatter_ext.saes.loading import describe_sae

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("error", "linear", "nonlinear")
OWN, PREVIOUS = "res", "previous res"
CONTROLS = {
    "x": "control: the activation itself, which by construction says nothing about the nonlinear error",
    "shuffled": "control: the output of the first earlier SAE at another token",
    "random": "control: a TopK SAE of random directions at the site of the first earlier SAE (k as there, else k)",
}
INTERVAL_GROUPS = 6  # each keeps a Gram matrix of all predictors side by side: 130 MB for seven of 576

Maker = Callable[[dict[str, FamilySite]], MeasuredSae]


@dataclass(frozen=True)
class EarlierLayersConfig(FamilyConfig):
    """Predict the error of an SAE, and its linear and nonlinear part, from the outputs of SAEs at earlier sites."""

    predictor: tuple[str, ...] = ()
    """with sae: folders of SAEs of other sites whose outputs are the predictors; without: SAEs are trained at the previous
    residual stream and at the MLP and attention of the block of hook"""
    widths: tuple[int, ...] = (2048,)
    """latents of the SAEs to train, at every site; the widest of a site is the predictor"""
    interval_groups: int = INTERVAL_GROUPS
    """groups of held-out contexts that confidence intervals come from, each with a Gram matrix of all predictors"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sae and not self.predictor:
            raise InputError("predictor: must name at least one SAE of another site with sae, got none")
        if self.predictor and not self.sae:
            raise InputError("sae: must be given with predictor, got none")


def related_hooks(hook: str) -> dict[str, str]:
    """Predictor -> hook point, for a residual stream after a block: itself, the previous one, the block's MLP and attention.

    Raises ValueError for another kind of hook point.
    """
    point = parse_hook_point(hook)
    if point.kind != "hook_resid_post":
        raise InputError(f"hook: must be a hook_resid_post, whose earlier sites are known, got {hook}")
    block = f"blocks.{point.layer}"
    before = f"blocks.{point.layer - 1}.hook_resid_post" if point.layer else f"{block}.hook_resid_pre"
    return {OWN: hook, PREVIOUS: before, "mlp": f"{block}.hook_mlp_out", "attention": f"{block}.attn.hook_z"}


PRESETS: dict[str, AnyConfig] = {
    "demo": EarlierLayersConfig(),
    **{
        name: dataclasses.replace(preset, interval_groups=INTERVAL_GROUPS)
        for name, preset in many_saes_config.PRESETS.items()
    },
}


def plan(config: AnyConfig) -> list[str]:
    """What a run would do, in lines, without doing it."""
    if isinstance(config, ManySaesConfig):
        return family.plan(config)
    if config.sae:
        predictors = [f"predictor {folder}" for folder in getattr(config, "predictor", ())]
        return [*family.plan(config), *predictors]
    return family.plan(config, list(related_hooks(config.hook).values()))


# ---- predictors


def shuffled(name: str, sae: MeasuredSae, *, seed: int) -> MeasuredSae:
    """The SAE's output of other tokens: every batch is permuted first, the same way in every reading."""

    def load() -> Encoder:
        encode = sae.load()

        def other(x: Tensor) -> Encoded:
            order = other_tokens(len(x), torch.Generator().manual_seed(seed))
            return encode(x[order.to(x.device)])

        return other

    return MeasuredSae(name, sae.hook, sae.d_sae, load, sae.weight_bytes)


def _of_site(name: str, hook: str, folder: str = "") -> Maker:
    """The SAE of a folder, or the widest at a site, as a predictor."""

    def make(sites: dict[str, FamilySite]) -> MeasuredSae:
        saes = [sae for sae, own in sites[hook].saes.values() if not folder or own == Path(folder)]
        widest = max(saes, key=lambda sae: sae.cfg.d_sae)
        return MeasuredSae(name, hook, widest.cfg.d_sae, lambda: as_encoder(widest))

    return make


def _random_at(hook: str, config: EarlierLayersConfig) -> Maker:
    def make(sites: dict[str, FamilySite]) -> MeasuredSae:
        widest = max((sae for sae, _ in sites[hook].saes.values()), key=lambda sae: sae.cfg.d_sae)
        k = getattr(widest.cfg, "k", config.k)
        return MeasuredSae("random", hook, widest.cfg.d_sae, lambda: random_directions(widest, k, seed=config.seed))

    return make


def _makers(config: EarlierLayersConfig) -> tuple[str, dict[str, str], dict[str, Maker]]:
    """The target site; predictor -> its site; predictor and control -> what makes its SAE.

    Raises ValueError for SAEs that cannot be loaded, targets of several sites, predictors of the target's own site.
    """
    if config.sae:
        own = list(given_hooks(config))
        if len(own) > 1:
            raise InputError(f"sae: must be of one site, got {own[0]} and {own[1]}")
        given = given_hooks(dataclasses.replace(config, sae=config.predictor))
        if silent := next((own for own in config.predictor if not describe_sae(own).metadata.get("hook_name")), None):
            raise InputError(f"predictor: must name its hook_name in its metadata, got {silent}")
        if own[0] in given:
            raise InputError(f"predictor: must be of another site than sae ({own[0]}), got {given[own[0]][0]}")
        named = {
            (hook if len(folders) == 1 else f"{hook} {folder}"): (hook, folder)
            for hook, folders in given.items()
            for folder in folders
        }
        named = {OWN: (own[0], ""), **named}
    else:
        named = {name: (hook, "") for name, hook in related_hooks(config.hook).items()}
    makers = {name: _of_site(name, hook, folder) for name, (hook, folder) in named.items()}
    first = list(named)[1]
    makers["shuffled"] = lambda sites: shuffled("shuffled", makers[first](sites), seed=config.seed)
    makers["random"] = _random_at(named[first][0], config)
    return named[OWN][0], {name: hook for name, (hook, _) in named.items()}, makers


# ---- the run


def part_numbers(site: SiteMeasurement, sae: str, sets: dict[str, list[str]]) -> dict[str, float]:
    """R2 of every set of predictors for every part of the error, with intervals; and the noise floor of each set."""
    numbers: dict[str, float] = {}
    for name, used in sets.items():
        for part in PARTS:
            numbers |= site.part_interval(used, sae, part).numbers(f"{sae}/r2_from/{name}/{part}")
        numbers[f"{sae}/noise_floor/{name}"] = -site.n_columns(used) / site.n_fit
    return numbers


def predictor_sets(predictors: list[str]) -> dict[str, list[str]]:
    """Each predictor and control alone, all predictors together, and all but the site's own SAE."""
    real = [name for name in predictors if name not in CONTROLS]
    sets = {name: [name] for name in real}
    if len(real) > 1:
        sets["all"] = real
    if OWN in real and len(real) > 2:
        sets[f"all but {OWN}"] = [name for name in real if name != OWN]
    return sets | {name: [name] for name in CONTROLS if name == "x" or name in predictors}


def _measured(config: AnyConfig, stages: Stages) -> tuple[Measured, dict[str, str]]:
    """The measurement, and the site of each predictor ("": where its own metadata says)."""
    if isinstance(config, ManySaesConfig):
        if not config.predictor:
            raise InputError("predictor: must name at least one SAE of another site, got none")
        make = {"shuffled": lambda sae: shuffled("shuffled", sae, seed=config.seed)}
        found = many_saes.measured(config, stages, controls=make)
        return found, {name: "" for name in found.predictors if name not in CONTROLS}
    assert isinstance(config, EarlierLayersConfig)
    target, sites, makers = _makers(config)
    everywhere = dataclasses.replace(config, hook=target, sae=(*config.sae, *config.predictor))
    hooks = list(dict.fromkeys(sites.values()))
    found = measured_family(everywhere, stages, hooks=hooks, targets=[target], predictors=makers)
    shown = dataclasses.asdict(config) | {"hook": target}
    return dataclasses.replace(found, config=shown), sites


def run(config: AnyConfig, stages: Stages) -> Result:
    """Measure, and regress the parts of the error on the outputs of the other SAEs.

    Raises ValueError for bad settings, SAEs that do not fit; RuntimeError for damaged files.
    """
    found, sites = _measured(config, stages)
    sets = predictor_sets(found.predictors)
    numbers: dict[str, float] = {}
    with stages.stage("regress the error", len(found.saes)) as advance:
        for sae in found.saes:
            numbers |= part_numbers(found.site_of(sae["name"]), sae["name"], sets)
            advance(1)
    about = {name: CONTROLS.get(name) or f"{name}: {sites.get(name) or ', '.join(used)}" for name, used in sets.items()}
    notes = [
        "R2 is the mean over dimensions, on held-out tokens. A set of p predictors that says nothing scores about "
        "-p / (fit tokens): see noise_floor (0 for x and the nonlinear error, whose map is zero).",
        f"Sae(x) = x - SaeError(x): what `{OWN}` says about the error is partly the error inside Sae(x) itself.",
        "Tokens are left out by the rules of the measured site; those of the other sites concern the training of their SAEs.",
    ]
    if found.config["parity"] == "released-code":
        notes.append("As the released code: no bias in any regression; b* on all tokens, as its norm script has it.")
    return measured_result("earlier-layers", found, stages, numbers, series={"predictors": about}, notes=notes)


PAPER = "SAE outputs of earlier sites explain up to 50 % of the variance of the nonlinear error"
_PARTS = ("error", "linear", "nonlinear")


def table(result: Result) -> Table:
    """One row a predictor: R2 for the error and its parts, and what a predictor that says nothing would score."""
    rows, several = [], len(result.series["saes"]) > 1
    for sae in result.series["saes"]:
        for name, about in result.series["predictors"].items():
            label = f"control: {name}" if about.startswith("control") else name
            scores = [
                with_interval(result.numbers, f"{sae['name']}/r2_from/{name}/{part}", "{:.3f}") for part in _PARTS
            ]
            floor = shown(result.numbers[f"{sae['name']}/noise_floor/{name}"], "{:.3f}")
            rows.append([f"{sae['name']}: {label}" if several else label, *scores, floor])
    return Table(
        title=f"earlier-layers: {result.config['model']}, {result.config['hook']}, held-out R2 from SAE outputs",
        headings=("from", "error", "linear error", "nonlinear error", "noise floor"),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """How much of the nonlinear error other SAEs explain, beside the controls."""
    numbers, predictors, lines = result.numbers, result.series["predictors"], []
    real = [name for name, about in predictors.items() if not about.startswith("control")]
    for sae in result.series["saes"]:

        def score(name: str, own: str = sae["name"]) -> str:
            return with_interval(numbers, f"{own}/r2_from/{name}/nonlinear", "{:.3f}")

        best = max((name for name in real if not name.startswith("all")), key=lambda n, own=sae["name"]: numbers[
            f"{own}/r2_from/{n}/nonlinear"
        ])  # fmt: skip
        together = f", all together {score('all')}" if "all" in real else ""
        without = f", all but the SAE's own output {score('all but res')}" if "all but res" in real else ""
        lines.append(f"{sae['name']}: of the nonlinear error {best} alone explains {score(best)}{together}{without}.")
        controls = [f"{name} {score(name)}" for name in predictors if name not in real]
        lines.append(f"{sae['name']}: the controls: {'; '.join(controls)}.")
    return [*lines, f"The paper, Gemma 2 9B: {PAPER}."]


_TITLES = {"error": ("SaeError(x)", BLUE), "linear": ("linear error", GREEN), "nonlinear": ("nonlinear error", ORANGE)}


def parts(result: Result) -> Figure:
    """R2 of each predictor for the error and its two parts, with intervals: a panel a part, a bar a predictor."""
    saes, predictors = result.series["saes"], list(result.series["predictors"])
    figure, panels = new_panels(0.9 + 0.26 * len(predictors), len(_TITLES), sharey=True)
    height = 0.8 / len(saes)
    for axes, (part, (title, colour)) in zip(panels, _TITLES.items(), strict=True):
        for number, sae in enumerate(saes):
            names = [f"{sae['name']}/r2_from/{predictor}/{part}" for predictor in predictors]
            lengths, errors = interval_bars(result, names)
            where = [place + (number - (len(saes) - 1) / 2) * height for place in range(len(predictors))]
            axes.barh(where, lengths, height, xerr=errors, color=colour, alpha=0.9, error_kw={"linewidth": 0.8})
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_xlim(min(0, axes.get_xlim()[0]), 1)
        axes.set_title(title)
    labels = [_label(name, about) for name, about in result.series["predictors"].items()]
    panels[0].set_yticks(range(len(predictors)), labels)
    panels[0].invert_yaxis()
    panels[1].set_xlabel("held-out R²" + (", SAEs from top to bottom as in the table" if len(saes) > 1 else ""))
    return figure


def _label(name: str, about: str) -> str:
    own = f"control: {name}" if about.startswith("control") else name
    return own if len(own) <= 28 else "…" + own[-27:]


FIGURES = {"parts": parts}
