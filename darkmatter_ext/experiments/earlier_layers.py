"""What SAE outputs of earlier sites say about the error and its linear and nonlinear part.

What the SAE outputs of earlier sites say about the error (the paper's figure 10b).

SaeError(x) and its linear and nonlinear parts are regressed on the outputs of SAEs at the same site (res), the previous
residual stream, and the MLP and attention of the same block: R2 on held-out tokens, for each predictor alone and for all
together. If the nonlinear error were features of earlier layers that the SAE misses, their SAEs would predict it. *Beyond x*
is the R2 of the nonlinear error from x and the predictor together. On x alone that R2 is 0, so this is what the
predictor adds; on its own, a predictor that is mostly linear in x is penalised for that part.

Controls: `x` itself (the nonlinear error is what x does not predict: R2 must be about 0); `shuffled`, the output of the
previous SAE at another token (about 0); `random`, a TopK SAE of random directions there, and with SAEs trained here also at
every other site (nothing is learned; what is left is that sparse codes of another tensor are nonlinear in x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from darkmatter_ext.activations.hook_points import parse_hook_point
from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.measurement.nulls import other_tokens
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import presets
from darkmatter_ext.measurement.resolved import resolve
from darkmatter_ext.measurement.run import Inputs, measured, prepare
from darkmatter_ext.measurement.settings import Regressions, Settings, replaced
from darkmatter_ext.measurement.site_saes import SiteSae
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREEN, ORANGE, interval_bars, new_panels
from darkmatter_ext.report.table import Table, shown, with_interval
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import Encode, Encoder, random_directions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from sae_lens import SAE

PARTS = ("error", "linear", "nonlinear")
OWN, PREVIOUS = "res", "previous res"
CONTROLS = {
    "x": "control: the activation itself, which by construction says nothing about the nonlinear error",
    "shuffled": "control: the output of the first earlier SAE at another token",
    "random": "control: a TopK SAE of random directions at the site of the first earlier SAE (k as there, else k)",
}
RANDOM = "random"
INTERVAL_GROUPS = 6  # each keeps a Gram matrix of all predictors side by side: 215 MB for nine of 576


@dataclass(frozen=True)
class EarlierLayersSettings(Settings):
    """Predict an SAE's error, and its linear and nonlinear parts, from the outputs of SAEs at earlier sites."""


def related_hooks(hook: str) -> dict[str, str]:
    """Predictor -> hook point, for a residual stream after a block: itself, the previous one, the block's MLP and attention.

    Raises ValueError for any other kind of hook point.
    """
    point = parse_hook_point(hook)
    if point.kind != "hook_resid_post":
        raise InputError(f"hook: must be a hook_resid_post, whose earlier sites are known, got {hook}")
    block = f"blocks.{point.layer}"
    before = f"blocks.{point.layer - 1}.hook_resid_post" if point.layer else f"{block}.hook_resid_pre"
    return {OWN: hook, PREVIOUS: before, "mlp": f"{block}.hook_mlp_out", "attention": f"{block}.attn.hook_z"}


PRESETS = presets(EarlierLayersSettings, {"widths": (2048,)}, interval_groups=INTERVAL_GROUPS)


SCRIPT = Regressions(bias=False)  # simple_circuits.py


def plan(settings: EarlierLayersSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    if settings.saes.sae:
        return plan_lines(settings)
    lines = [
        plan_lines(replaced(settings, hook=hook)) for hook in related_hooks(settings.saes.trained_hooks[0]).values()
    ]
    return list(dict.fromkeys(line for own in lines for line in own))


# ---- predictors


@dataclass(frozen=True)
class Predictors:
    """Encoders whose outputs predict the error, with a description of each."""

    encoders: list[Encoder]
    about: dict[str, str]  # predictor -> its site


def shuffled(sae: SiteSae, *, seed: int) -> Encoder:
    """The SAE's output at other tokens: every batch is permuted first, in the same way in every reading."""

    def make(loaded: SAE) -> Encode:
        encode = sae.own_of(loaded)
        return lambda x: encode(x[other_tokens(len(x), torch.Generator().manual_seed(seed)).to(x.device)])

    return sae.encoder(make, name="shuffled")


def control_about(name: str) -> str | None:
    """A description of the control with this name; None if it is not a control."""
    if name.startswith(f"{RANDOM} "):
        return f"control: a TopK SAE of random directions at the site of {name.removeprefix(f'{RANDOM} ')}"
    return CONTROLS.get(name)


def randomised(sae: SiteSae, *, k: int, seed: int, name: str = RANDOM) -> Encoder:
    """A TopK SAE of random directions in place of `sae`, with as many latents and as many active (`k` if `sae` is not TopK)."""

    def make(own: Any) -> Encode:
        return random_directions(own, getattr(own.cfg, "k", k), seed=seed)

    return sae.encoder(make, name=name)


def predictors_of(inputs: Inputs, target: str) -> Predictors:
    """The SAEs of other sites and the target's own, the widest at each site, and the controls."""
    settings = inputs.settings
    if inputs.predictors:
        if inside := next((sae for sae in inputs.predictors if sae.hook == target), None):
            raise InputError(f"predictor: must be of another site than sae ({target}), got {inside.folder}")
        named = {OWN: inputs.widest(target), **{sae.name: sae for sae in inputs.predictors}}
    else:
        named = {name: inputs.widest(hook) for name, hook in related_hooks(target).items()}
    (_, first), *others = list(named.items())[1:]
    encoders = [sae.encoder(name=name) for name, sae in named.items()]
    encoders += [shuffled(first, seed=settings.seed), randomised(first, k=settings.saes.k, seed=settings.seed)]
    if not inputs.predictors:  # given ones may be wide, and every control is as large as the SAE it stands for
        encoders += [
            randomised(sae, k=settings.saes.k, seed=settings.seed, name=f"{RANDOM} {name}") for name, sae in others
        ]
    return Predictors(encoders, {name: sae.hook for name, sae in named.items()})


# ---- the run


def part_numbers(site: SiteMeasurement, sae: str, sets: dict[str, list[str]]) -> dict[str, float]:
    """R2 of every set of predictors for every part of the error, with intervals; and the noise floor of each set."""
    numbers: dict[str, float] = {}
    for name, used in sets.items():
        for part in PARTS:
            numbers |= site.part_interval(used, sae, part).numbers(f"{sae}/r2_from/{name}/{part}")
        if name != "x":
            numbers |= site.part_interval(["x", *used], sae, "nonlinear").numbers(f"{sae}/beyond_x/{name}")
        numbers[f"{sae}/noise_floor/{name}"] = -site.n_columns(used) / site.n_fit
    return numbers


def predictor_sets(predictors: list[str]) -> dict[str, list[str]]:
    """Each predictor and control alone, all predictors together, and all but the site's own SAE."""
    real = [name for name in predictors if control_about(name) is None]
    sets = {name: [name] for name in real}
    if len(real) > 1:
        sets["all"] = real
    if OWN in real and len(real) > 2:
        sets[f"all but {OWN}"] = [name for name in real if name != OWN]
    return sets | {name: [name] for name in ("x", *(name for name in predictors if control_about(name)))}


def run(settings: EarlierLayersSettings, stages: Stages) -> Result:
    """Measure, then regress the parts of the error on the outputs of the other SAEs.

    Raises InputError for bad settings, SAEs that do not fit; StateError for damaged files.
    """
    if settings.saes.sae and not settings.saes.predictor:
        raise InputError("predictor: must name at least one SAE of another site with sae, got none")
    target, *others = resolve(settings).sites
    if others:
        raise InputError(f"sae: must be of one site, got {target} and {others[0]}")
    train_at = () if settings.saes.sae else tuple(related_hooks(target).values())
    inputs = prepare(settings, stages, train_at=train_at)
    predictors = predictors_of(inputs, target)
    found = measured(inputs, stages, saes=inputs.of(target), predictors=predictors.encoders, released=SCRIPT)
    sets = predictor_sets(found.predictors)
    numbers: dict[str, float] = {}
    with stages.stage("regress the error", len(found.saes)) as advance:
        for sae in found.saes:
            numbers |= part_numbers(found.site_of(sae["name"]), sae["name"], sets)
            advance(1)
    sites = predictors.about
    about = {
        name: control_about(name) or f"{name}: {sites.get(name) or ', '.join(used)}" for name, used in sets.items()
    }
    notes = [
        "R2 is the mean over dimensions, on held-out tokens. A set of p predictors that says nothing scores about "
        "-p / (fit tokens): see noise_floor (0 for x and the nonlinear error, whose map is zero).",
        f"Sae(x) = x - SaeError(x): what `{OWN}` says about the error is partly the error inside Sae(x) itself.",
        "Tokens are left out by the rules of the measured site; those of the other sites concern the training of their SAEs.",
    ]
    if found.config["parity"] == "released-code":
        notes.append("As the released code (simple_circuits.py): no bias in any regression, b* fitted on fit tokens.")
    return measured_result("earlier-layers", found, stages, numbers, series={"predictors": about}, notes=notes)


PAPER = "SAE outputs of earlier sites explain up to 50 % of the variance of the nonlinear error"
_PARTS = ("error", "linear", "nonlinear")


def table(result: Result) -> Table:
    """One row per predictor: R2 for the error and its parts, and the score of an uninformative predictor."""
    rows, several = [], len(result.series["saes"]) > 1
    for sae in result.series["saes"]:
        for name, about in result.series["predictors"].items():
            label = f"control: {name}" if about.startswith("control") else name
            scores = [
                with_interval(result.numbers, f"{sae['name']}/r2_from/{name}/{part}", "{:.3f}") for part in _PARTS
            ]
            key = f"{sae['name']}/beyond_x/{name}"
            beyond = with_interval(result.numbers, key, "{:.3f}") if key in result.numbers else ""
            floor = shown(result.numbers[f"{sae['name']}/noise_floor/{name}"], "{:.3f}")
            rows.append([f"{sae['name']}: {label}" if several else label, *scores, beyond, floor])
    return Table(
        title=f"earlier-layers: {result.config['model']}, {result.config['hook']}, held-out R2 from SAE outputs",
        headings=("from", "error", "linear error", "nonlinear error", "nonlinear, beyond x", "noise floor"),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """How much of the nonlinear error other SAEs explain, compared with the controls."""
    numbers, predictors, lines = result.numbers, result.series["predictors"], []
    real = [name for name, about in predictors.items() if not about.startswith("control")]
    for sae in result.series["saes"]:

        def score(name: str, own: str = sae["name"]) -> str:
            key = "r2_from/x/nonlinear" if name == "x" else f"beyond_x/{name}"
            return with_interval(numbers, f"{own}/{key}", "{:.3f}")

        # By definition, the SAE's own output says everything beyond x: x minus that output is the error.
        others = [name for name in real if name != OWN and not name.startswith("all")]
        best = max(others, key=lambda n, own=sae["name"]: numbers[f"{own}/beyond_x/{n}"])
        together = f", all but the SAE's own output {score('all but res')}" if "all but res" in real else ""
        lines.append(f"{sae['name']}: of the nonlinear error, beyond x, {best} alone explains {score(best)}{together}.")
        controls = [f"{name} {score(name)}" for name in predictors if name not in real]
        lines.append(f"{sae['name']}: the controls: {'; '.join(controls)}.")
    return [*lines, f"The paper, Gemma 2 9B: {PAPER}."]


_TITLES = {"error": ("SaeError(x)", BLUE), "linear": ("linear error", GREEN), "nonlinear": ("nonlinear error", ORANGE)}


def parts(result: Result) -> Figure:
    """R2 of each predictor for the error and its two parts, with intervals: one panel per part, one bar per predictor."""
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
