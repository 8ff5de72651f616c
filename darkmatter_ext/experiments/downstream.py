"""What the linear and the nonlinear error cost the language model, in cross-entropy and KL.

What the linear and the nonlinear part of SAE error cost the language model (figure 9).

Sae(x), Sae(x) + linear error and Sae(x) + nonlinear error replace x at the held-out tokens of whole contexts; the rest of
the model runs, and its cross-entropy and KL are compared with the unchanged model. b* is fitted on fit tokens only.
CE recovered = (L_sae - L_setting) / (L_sae - L_original): if both parts cost in proportion to their energy, adding the
linear part recovers the linear share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from darkmatter_ext.activations.splicing import Splice, SplicedModel, SplicedTokens, splice_contexts
from darkmatter_ext.estimators.intervals import bootstrap, ratio, sums_by
from darkmatter_ext.measurement.decompose import Decomposition
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import DEMO
from darkmatter_ext.measurement.run import Inputs, prepare
from darkmatter_ext.measurement.sae_splices import decomposed, sae_splices
from darkmatter_ext.measurement.settings import Settings, extended
from darkmatter_ext.measurement.stored_tokens import (
    WholeContexts,
    check_whole_contexts,
)
from darkmatter_ext.measurement.tokens import FIT
from darkmatter_ext.report.measured import stored_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREY, ORANGE, SKY, interval_bars, legend_beside, new_figure, new_panels
from darkmatter_ext.report.table import Table, shown, with_interval
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import as_encoder, random_dictionary, shuffled_sae

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = {
    "sae": "Sae(x)",
    "linear": "Sae(x) + linear error",
    "nonlinear": "Sae(x) + nonlinear error",
    "shuffled": "control: Sae(x) + the linear error of another token",
}
CONTROLS = {
    "mean": "control: the mean activation",
    "random_dictionary": "control: pursuit over random directions, as many as the widest SAE has",
    "shuffled_decoder": "control: the widest SAE with its decoder rows permuted",
}


@dataclass(frozen=True)
class DownstreamSettings(Settings):
    """Splice Sae(x), with and without each part of its error, into the model: what does each part cost?"""

    contexts: int = 32
    """held-out contexts to splice into"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_contexts(self.contexts, self.measure.split)


PRESETS = {"demo": extended(DEMO, DownstreamSettings)}


def plan(settings: DownstreamSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    return [
        *plan_lines(settings),
        f"splice    into {settings.contexts} held-out contexts",
        *(f"          {about}" for about in [*SETTINGS.values(), *CONTROLS.values()]),
    ]


def loss_numbers(tokens: SplicedTokens, documents: Tensor, name: str, *, seed: int) -> dict[str, float]:
    """Mean CE increase and KL of one splice, with intervals by document; documents [n] are those of the tokens."""
    losses, ones = tokens.losses, torch.ones(len(documents))
    increase = losses.spliced[name] - losses.cross_entropy
    sums = sums_by(documents, increase, losses.kl[name], ones)
    ce, kl = bootstrap(sums, lambda s: s[..., :2] / s[..., 2:], seed=seed)
    return ce.numbers(f"{name}/ce_increase") | kl.numbers(f"{name}/kl")


def recovery_numbers(tokens: SplicedTokens, documents: Tensor, sae: str) -> dict[str, float]:
    """CE and KL recovered by every setting of the SAE named `sae`, in percent, with intervals by document.

    NaN if the increase that Sae(x) causes cannot be told from 0, because a share of nothing is undefined.
    """
    losses, numbers = tokens.losses, {}
    for setting in list(SETTINGS)[1:]:
        ce = (losses.cross_entropy, losses.spliced[f"{sae}/sae"], losses.spliced[f"{sae}/{setting}"])
        kl = (torch.zeros_like(ce[0]), losses.kl[f"{sae}/sae"], losses.kl[f"{sae}/{setting}"])
        for quantity, (original, whole, rest) in (("ce", ce), ("kl", kl)):
            found = ratio(sums_by(documents, 100 * (whole - rest), whole - original))
            numbers |= found.numbers(f"{sae}/{setting}/{quantity}_recovered")
    return numbers


def _share_numbers(name: str, decomposition: Decomposition) -> dict[str, float]:
    """What the recovery is compared with: shares of energy and R2 over all held-out tokens, in percent."""
    energy = decomposition.mean_squared_norm
    return {
        f"{name}/l0": decomposition.l0,
        f"{name}/fvu": decomposition.fvu,
        f"{name}/linear/share_of_fvu": 100 * decomposition.linear_share,
        f"{name}/nonlinear/share_of_fvu": 100 * (1 - decomposition.linear_share),
        f"{name}/linear/squared_norm_share": 100 * energy["linear"] / energy["error"],
        f"{name}/nonlinear/squared_norm_share": 100 * energy["nonlinear"] / energy["error"],
        f"{name}/linear/r2_vec": 100 * decomposition.r2_vec,
    }


def _all_splices(inputs: Inputs, found: dict[str, Decomposition], mean: Tensor) -> dict[str, Splice]:
    """The controls by their name, then every setting of every SAE as `SAE/SETTING`."""
    widest, seed = inputs.widest(inputs.one_site), inputs.settings.seed
    l0 = max(1, round(found[widest.name].l0))
    controls = {
        "random_dictionary": random_dictionary(mean, widest.d_sae, l0, seed=seed),
        "shuffled_decoder": as_encoder(shuffled_sae(widest.load(), seed=seed)),
    }
    splices: dict[str, Splice] = {"mean": lambda x: mean.to(x.dtype).expand_as(x)}
    for name, control in controls.items():
        splices[name] = sae_splices(control, found[widest.name].error_map, seed=seed)["sae"]
    for sae in inputs.saes:
        own = sae_splices(sae.own, found[sae.name].error_map, seed=seed)
        splices |= {f"{sae.name}/{setting}": splice for setting, splice in own.items()}
    return splices


@torch.no_grad()
def run(settings: DownstreamSettings, stages: Stages) -> Result:
    """Splice into the model and compare losses.

    Raises InputError for bad settings, SAEs of several sites, stored activations that are not the model's, fewer held-out
    contexts than asked for; StateError for a damaged cache.
    """
    inputs = prepare(settings, stages, splices=True)
    hook = inputs.one_site
    tokens = inputs.stored[hook]
    contexts = WholeContexts.sample(tokens, settings.contexts, seed=settings.seed)
    with stages.stage("fit the linear error"):
        found = decomposed(inputs, tokens)
        mean = tokens.mean(FIT).to(settings.device)
    splices = _all_splices(inputs, found, mean)
    with stages.stage("load the language model"):
        model = SplicedModel.load(inputs.model, hook, device=settings.device)
    with stages.stage("splice into the language model", len(contexts)) as advance:
        spliced = splice_contexts(model, contexts, splices, progress=advance)
    documents = contexts.documents_of(spliced.context)
    numbers: dict[str, float] = {
        "spliced_contexts": len(contexts),
        "spliced_documents": contexts.n_documents,
        "spliced_tokens": len(spliced.context),
        "ce_original": spliced.losses.cross_entropy.double().mean().item(),
    }
    for name in splices:
        numbers |= loss_numbers(spliced, documents, name, seed=settings.seed)
    for sae in inputs.saes:
        numbers |= _share_numbers(sae.name, found[sae.name])
        numbers |= recovery_numbers(spliced, documents, sae.name)
    notes = [
        f"Spliced at all held-out tokens of {len(contexts)} whole contexts of {contexts.n_documents} documents at once; "
        f"losses of {len(spliced.context)} tokens. Intervals: 95 %, by document; of shares recovered by Fieller's theorem, "
        "unknown where the increase itself cannot be told from 0.",
    ]
    series = {"settings": SETTINGS, "controls": CONTROLS}
    return stored_result("downstream", inputs, stages, numbers, series=series, arrays=spliced.columns(), notes=notes)


PAPER = "the nonlinear error carries a proportional share of the increase in CE"


def table(result: Result) -> Table:
    """One row per splice: what it costs, what it recovers, and the share of the error it puts back."""
    numbers = result.numbers
    rows = []
    for name in result.series["controls"]:
        rows.append([name.replace("_", " "), *_losses(result, name), "", ""])
    for sae in result.series["saes"]:
        for setting in result.series["settings"]:
            splice = f"{sae['name']}/{setting}"
            label = f"{sae['name']}" if setting == "sae" else f"{sae['name']} + {setting}"
            recovered = with_interval(numbers, f"{splice}/ce_recovered", "{:.0f}%") if setting != "sae" else ""
            share = numbers.get(f"{splice}/share_of_fvu")
            rows.append([label, *_losses(result, splice), recovered, "" if share is None else shown(share, "{:.0f}%")])
    return Table(
        title=f"downstream: {result.config['model']}, {result.config['hook']}, held-out contexts, "
        f"CE of the model {numbers['ce_original']:.3f}",
        headings=("spliced in", "CE increase, nats", "KL, nats", "CE recovered", "share of error put back"),
        rows=rows,
    )


def _losses(result: Result, name: str) -> list[str]:
    return [with_interval(result.numbers, f"{name}/{quantity}", "{:.3f}") for quantity in ("ce_increase", "kl")]


PROPORTION = 10  # percentage points: a recovery this close to the share is "in proportion"


def verdict(share: float, low: float, high: float) -> str:
    """What an interval of CE recovered says about a part that is `share` percent of the error.

    "in proportion" is an equivalence test: the whole interval must be within PROPORTION points of the share.
    """
    if math.isnan(low) or math.isnan(high):
        return "cannot be told, the CE increase is not clear of 0"
    if high < share:
        return "less than its share"
    if low > share:
        return "more than its share"
    if share - PROPORTION <= low and high <= share + PROPORTION:
        return f"in proportion (within {PROPORTION} points)"
    return "cannot be told, the interval is too wide"


def reading(result: Result) -> list[str]:
    """Recovery against the share of the error, for each SAE: less, more, in proportion, or undecided."""
    numbers, lines = result.numbers, []
    for sae in result.series["saes"]:
        parts = []
        for setting in ("linear", "nonlinear"):
            name = f"{sae['name']}/{setting}"
            share = numbers[f"{name}/share_of_fvu"]
            found = verdict(share, *(numbers[f"{name}/ce_recovered/{end}"] for end in ("low", "high")))
            parts.append(
                f"the {setting} error, {share:.0f}% of FVU, recovers "
                f"{with_interval(numbers, f'{name}/ce_recovered', '{:.0f}%')} of the CE increase: {found}"
            )
        lines.append(f"{sae['name']}: {'; '.join(parts)}.")
    return [*lines, f"The paper, Gemma 2 9B: {PAPER}."]


_SETTINGS = {
    "sae": ("Sae(x)", GREY),
    "linear": ("+ linear error", SKY),
    "nonlinear": ("+ nonlinear error", BLUE),
    "shuffled": ("+ another token's\nlinear error", ORANGE),
}


def losses(result: Result) -> Figure:
    """CE increase and KL of every setting of every SAE, with intervals by document."""
    saes = result.series["saes"]
    figure, panels = new_panels(2.9, 2)
    width = 0.8 / len(_SETTINGS)
    for axes, quantity, title in zip(panels, ("ce_increase", "kl"), ("Increase in cross-entropy", "KL"), strict=True):
        for number, (setting, (label, colour)) in enumerate(_SETTINGS.items()):
            places = [place + (number - (len(_SETTINGS) - 1) / 2) * width for place in range(len(saes))]
            names = [f"{sae['name']}/{setting}/{quantity}" for sae in saes]
            heights, errors = interval_bars(result, names)
            axes.bar(places, heights, width=width, color=colour, label=label, yerr=errors, error_kw={"linewidth": 0.8})
        axes.set_xticks(range(len(saes)), [f"{sae['d_sae']}\nlatents" for sae in saes])
        axes.set_title(title)
        axes.axhline(0, color="black", linewidth=0.6)
    panels[0].set_ylabel("nats a token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_SETTINGS))
    return figure


def recovered(result: Result) -> Figure:
    """CE recovered by adding a part of the error back, against that part's share of the error."""
    figure, axes = new_figure(3.2)
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle="--", label="in proportion")
    for setting, marker in (("linear", "o"), ("nonlinear", "s")):
        label, colour = _SETTINGS[setting]
        names = [f"{sae['name']}/{setting}" for sae in result.series["saes"]]
        heights, errors = interval_bars(result, [f"{name}/ce_recovered" for name in names])
        shares = [result.numbers[f"{name}/share_of_fvu"] for name in names]
        axes.errorbar(
            shares, heights, yerr=errors, fmt=marker, color=colour, markersize=5, linewidth=1, label=f"Sae(x) {label}"
        )
        for sae, share, height, above in zip(result.series["saes"], shares, heights, errors[1], strict=True):
            if math.isnan(height):
                continue
            place = (share, height + above)
            axes.annotate(str(sae["d_sae"]), place, xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]), top=max(100, axes.get_ylim()[1]))
    axes.set_xlabel("share of the error's energy put back, %")
    axes.set_ylabel("CE increase recovered, %")
    axes.set_title("Does each part of the error cost its share?")
    legend_beside(axes)
    return figure


FIGURES = {"losses": losses, "recovered": recovered}
