"""Is Sae(x) worse for the language model than other points at the same distance from x?

Is Sae(x) a worse point than others at the same distance from x?

Gurnee (2024) finds Sae(x) 2 to 4.5 times as bad, in KL and CE, as a random point at the same distance, in every layer of
GPT-2 small; shrinkage does not explain it. Lee and Heimersheim (2410.12555) find that errors are no longer pathological
compared with mixtures of activations (the null `mixture`; the null with the errors' own covariance is this package's). All
are compared here (`nulls.NULLS`), at each layer and per token: by token, by its frequency in the text, by position.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter_ext.activations.splicing import Splice, SplicedModel, SplicedTokens, splice_contexts
from darkmatter_ext.activations.store import load_tokenizer
from darkmatter_ext.estimators.intervals import Interval, bootstrap, ratio, share_by, sums_by
from darkmatter_ext.measurement.nulls import NULLS, NullModels
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import DEMO
from darkmatter_ext.measurement.run import prepare
from darkmatter_ext.measurement.settings import Settings, extended
from darkmatter_ext.measurement.stored_tokens import MeasuredBatches, WholeContexts, check_whole_contexts
from darkmatter_ext.report.measured import stored_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import (
    BLUE,
    GREY,
    ORANGE,
    SERIES,
    interval_bars,
    legend_beside,
    new_panels,
    row_bars,
    visible,
)
from darkmatter_ext.report.table import Table, with_interval
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import Encode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MINIMUM_COUNT = 10  # occurrences of a token in the table: the mean of fewer says nothing
SHOWN_TOKENS = 12  # with the largest gaps, and as many with the smallest


@dataclass(frozen=True)
class PathologySettings(Settings):
    """Compare what Sae(x) does to the model with what other points at the same distance from x do."""

    contexts: int = 16
    """held-out contexts to splice into, at each site"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_contexts(self.contexts, self.measure.split)


PRESETS = {"demo": extended(DEMO, PathologySettings, layers=(5, 10, 15, 20), widths=(2048,))}


def plan(settings: PathologySettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    nulls = [f"null      {name}: {about}" for name, about in NULLS.items()]
    return [*plan_lines(settings), f"splice    into {settings.contexts} held-out contexts at each site", *nulls]


def patches(encode: Encode, nulls: NullModels, *, seed: int) -> dict[str, Splice]:
    """Sae(x) and every null model as functions of the activations [n, d] at the replaced places."""

    def sae(x: Tensor) -> Tensor:
        return encode(x).x_hat

    functions = nulls.functions(seed=seed)
    return {"sae": sae} | {name: lambda x, null=null: null(x, sae(x)) for name, null in functions.items()}


def ratio_numbers(tokens: SplicedTokens, documents: Tensor, *, seed: int) -> dict[str, float]:
    """KL and CE increase of Sae(x) and the nulls, and the ratio of the SAE's to each null's; intervals by documents [n].

    A ratio is NaN if the null's own loss cannot be told from 0.
    """
    losses, numbers = tokens.losses, {}
    kl = losses.kl
    ce = {name: spliced - losses.cross_entropy for name, spliced in losses.spliced.items()}
    for quantity, columns in (("kl", kl), ("ce_increase", ce)):
        for name, column in columns.items():
            mean = share_by(documents, column, torch.ones_like(column), seed=seed)
            numbers |= mean.numbers(f"{name}/{quantity}")
            if name != "sae":
                numbers |= ratio(sums_by(documents, columns["sae"], column)).numbers(f"{name}/{quantity}_ratio")
    return numbers


def _gap_rows(gap: Tensor, label: Tensor, documents: Tensor, labels: list[Any], *, seed: int) -> list[dict[str, Any]]:
    """Mean gap, its interval by document, and count of every group; label [n] is a group's number, or -1."""
    inside = label >= 0
    one_hot = torch.zeros(len(gap), len(labels), dtype=torch.float64)
    one_hot[inside.nonzero().flatten(), label[inside]] = 1
    sums = sums_by(documents, *(one_hot * gap.double()[:, None]).unbind(1), *one_hot.unbind(1))
    found: list[Interval] = bootstrap(sums, lambda s: s[..., : len(labels)] / s[..., len(labels) :], seed=seed)
    counts = one_hot.sum(0).long().tolist()
    rows = zip(labels, counts, found, strict=True)
    return [{"label": name, "count": count, **dataclasses.asdict(interval)} for name, count, interval in rows if count]


def gap_tables(
    tokens: SplicedTokens, documents: Tensor, text: Tensor, decode: Callable[[int], str], *, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """KL(Sae) minus KL(random) in nats, by token, by frequency and by position: mean, interval, count.

    Args:
        tokens: measured with at least the patches `sae` and `random`.
        documents: [n] the document of each token.
        text: token ids of the whole text, any shape, for frequencies.
        decode: token id -> text.

    Cost: small; memory n times the number of groups.
    """
    gap = tokens.losses.kl["sae"] - tokens.losses.kl["random"]
    ids, place, here = tokens.token.unique(return_inverse=True, return_counts=True)
    counts = torch.zeros(int(max(text.max(), ids.max())) + 1, dtype=torch.int64)
    counts += torch.bincount(text.flatten(), minlength=len(counts))
    often = (here >= MINIMUM_COUNT).nonzero().flatten()
    number = torch.full((len(ids),), -1)
    number[often] = torch.arange(len(often))
    by_token = _gap_rows(gap, number[place], documents, [decode(int(i)) for i in ids[often]], seed=seed)
    for row, token_id in zip(by_token, ids[often].tolist(), strict=True):
        row["in_text"] = int(counts[token_id])
    by_token.sort(key=lambda row: -row["value"])
    if len(by_token) > 2 * SHOWN_TOKENS:
        by_token = by_token[:SHOWN_TOKENS] + by_token[-SHOWN_TOKENS:]

    def by_powers(values: Tensor, base: int) -> list[dict[str, Any]]:
        group = (values.clamp(min=1).double().log2() / math.log2(base)).floor().long()
        names = [f"{base**power} to {base ** (power + 1) - 1}" for power in range(int(group.max()) + 1)]
        return _gap_rows(gap, group, documents, names, seed=seed)

    return {
        "token": by_token,
        "frequency": by_powers(counts[tokens.token], 4),
        "position": by_powers(tokens.position, 2),
    }


@torch.no_grad()
def run(settings: PathologySettings, stages: Stages) -> Result:
    """Patch Sae(x) and its nulls into every site.

    Raises InputError for bad settings, an SAE of another model, stored activations that are not the model's, fewer
    held-out contexts than asked for; StateError for a damaged cache.
    """
    inputs = prepare(settings, stages, splices=True)
    seed, device = settings.seed, settings.device
    numbers: dict[str, float] = {}
    listed, arrays, gaps = [], {}, {}
    tokenizer = load_tokenizer(inputs.model)
    for hook, stored in inputs.stored.items():
        contexts = WholeContexts.sample(stored, settings.contexts, seed=seed)
        model = SplicedModel.load(inputs.model, hook, device=device)
        text, layer = stored.cache.column("tokens"), model.layer
        for sae in inputs.of(hook):
            name = f"{hook}/{sae.name.removeprefix(f'{hook}/')}"
            listed.append(sae.listed | {"name": name, "layer": layer})
            with stages.stage(f"covariance of the errors, block {layer}"):
                nulls = NullModels.of_errors(MeasuredBatches(stored, device), sae.own, seed=seed)
            with stages.stage(f"patch the language model, block {layer}", len(contexts)) as advance:
                tokens = splice_contexts(model, contexts, patches(sae.own, nulls, seed=seed), progress=advance)
            documents = contexts.documents_of(tokens.context)
            found = ratio_numbers(tokens, documents, seed=seed)
            numbers |= {f"{name}/{key}": value for key, value in found.items()}
            arrays |= {f"{name}/{key}": column for key, column in tokens.columns().items()}
            gaps[name] = gap_tables(tokens, documents, text, lambda i: str(tokenizer.decode([i])), seed=seed)
            numbers[f"{name}/spliced_tokens"] = len(tokens.context)
            numbers[f"{name}/spliced_documents"] = contexts.n_documents
    notes = [
        f"Spliced at all held-out tokens of {settings.contexts} whole contexts at once. Intervals: 95 %, by document (ratios: "
        "Fieller); draws of the nulls are one a token."
    ]
    series = {"saes": listed, "nulls": NULLS, "gaps": gaps}
    return stored_result("pathology", inputs, stages, numbers, series=series, arrays=arrays, notes=notes)


GURNEE = "2 to 4.5 times in GPT-2 small, all layers"
LEE_HEIMERSHEIM = "no longer pathologically large against such nulls"


def table(result: Result) -> Table:
    """One row per SAE: its KL, and the ratio to each null's KL."""
    nulls = [null for null in result.series["nulls"] if null != "norm_only"]  # not at the same distance: in the reading
    rows = []
    for sae in result.series["saes"]:
        name = sae["name"]
        ratios = [with_interval(result.numbers, f"{name}/{null}/kl_ratio", "{:.2f}") for null in nulls]
        label = f"block {sae['layer']}, {name.split('/')[-1]}"
        rows.append([label, with_interval(result.numbers, f"{name}/sae/kl", "{:.3f}"), *ratios])
    return Table(
        title=f"pathology: {result.config['model']}, KL of Sae(x) in nats, and in multiples of the KL of each null",
        headings=("SAE", "KL", *(null.replace("_", " ") for null in nulls)),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """Whether Sae(x) is worse than a random point, and whether it still is compared with covariance-matched ones."""
    lines = []
    for null, about in (
        ("random", f"a random point at its distance (Gurnee: {GURNEE})"),
        ("error_covariance", "a direction of its errors' covariance (a null of this package)"),
        ("mixture", f"a mixture of activations (Lee and Heimersheim: {LEE_HEIMERSHEIM})"),
    ):
        names = [f"{sae['name']}/{null}/kl_ratio" for sae in result.series["saes"]]
        told = sorted((name for name in names if not math.isnan(result.numbers[name])), key=result.numbers.__getitem__)
        if not told:
            lines.append(f"How many times the KL of {about} that of Sae(x) is cannot be told: it is not clear of 0.")
            continue
        ends = dict.fromkeys(f"{result.numbers[name]:.2f}" for name in (told[0], told[-1]))
        worse = sum(result.numbers[f"{name}/low"] > 1 for name in told)
        better = sum(result.numbers[f"{name}/high"] < 1 for name in told)
        unknown = len(names) - len(told)
        lines.append(
            f"KL of Sae(x) is {' to '.join(ends)} times that of {about}: worse beyond its interval for {worse} of "
            f"{len(names)}, better for {better}" + (f", cannot be told for {unknown}." if unknown else ".")
        )
    shrinkage = [
        result.numbers[f"{sae['name']}/norm_only/kl"] / result.numbers[f"{sae['name']}/sae/kl"]
        for sae in result.series["saes"]
    ]
    lines.append(f"The norm of Sae(x) alone, put on x, has at most {max(shrinkage):.1%} of the KL of Sae(x).")
    return lines


_LABELS = {
    "random": "random direction",
    "same_angle": "same angle to x",
    "error_covariance": "covariance of the errors",
    "mixture": "mixture of activations",
    "shuffled": "another token's error",
    "norm_only": "norm alone (nearer)",
}


def ratios(result: Result) -> Figure:
    """Ratio of Sae(x)'s KL, and CE increase, to each null's; a line at 1, where the error is ordinary."""
    saes = result.series["saes"]
    figure, panels = new_panels(3.3, 2)
    step = 0.09
    titles = {"kl_ratio": "KL of Sae(x) / KL of ...", "ce_increase_ratio": "CE increase of Sae(x) / of ..."}
    for axes, (quantity, title) in zip(panels, titles.items(), strict=True):
        axes.axhline(1, color="black", linewidth=0.8)
        for number, null in enumerate(name for name in result.series["nulls"] if name != "norm_only"):
            places = [place + (number - 2) * step for place in range(len(saes))]
            values, errors = interval_bars(result, [f"{sae['name']}/{null}/{quantity}" for sae in saes])
            axes.errorbar(
                places, values, yerr=errors, fmt="o", markersize=3.5, linewidth=1, color=SERIES[number],
                label=_LABELS[null],
            )  # fmt: skip
        axes.set_xticks(range(len(saes)), [_sae_label(result, sae) for sae in saes])
        axes.set_ylim(bottom=0)
        axes.set_title(title)
    panels[0].set_ylabel("times")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _sae_label(result: Result, sae: dict[str, Any]) -> str:
    several = len({entry["d_sae"] for entry in result.series["saes"]}) > 1
    return f"block {sae['layer']}" + (f"\n{sae['d_sae']}" if several else "")


def gap(result: Result) -> Figure:
    """KL(Sae) minus KL(random) by frequency of the token and by position, one line per SAE, with counts."""
    figure, panels = new_panels(3.3, 2, sharey=True)
    for axes, table, label in zip(
        panels,
        ("frequency", "position"),
        ("times the token occurs in the text", "position in the context"),
        strict=True,
    ):
        groups = {row["label"]: row["count"] for gaps in result.series["gaps"].values() for row in gaps[table]}
        names = sorted(groups, key=lambda name: int(name.split(" ")[0]))
        for number, sae in enumerate(result.series["saes"]):
            rows = {row["label"]: row for row in result.series["gaps"][sae["name"]][table]}
            shift = (number - (len(result.series["saes"]) - 1) / 2) * 0.08
            shown = [(place + shift, rows[name]) for place, name in enumerate(names) if name in rows]
            _gap_line(axes, shown, SERIES[number % len(SERIES)], _sae_label(result, sae))
        axes.axhline(0, color="black", linewidth=0.6)
        labels = [f"{name} (n {groups[name]})" for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=50, ha="right", rotation_mode="anchor", fontsize=7)
        axes.set_xlabel(label)
    panels[0].set_ylabel("KL(Sae) − KL(random), nats")
    legend_beside(panels[1])
    return figure


def _gap_line(axes: Axes, shown: list[tuple[float, dict[str, Any]]], colour: str, label: str) -> None:
    places, rows = [place for place, _ in shown], [row for _, row in shown]
    values, errors = [row["value"] for row in rows], row_bars(rows)
    axes.errorbar(places, values, yerr=errors, fmt="o-", markersize=3, linewidth=1, color=colour, label=label)


def gap_by_token(result: Result) -> Figure:
    """The tokens with the largest and the smallest gap, for the first and the last SAE, with counts and intervals."""
    saes = result.series["saes"]
    chosen = [saes[0]] if len(saes) == 1 else [saes[0], saes[-1]]
    rows = [result.series["gaps"][sae["name"]]["token"] for sae in chosen]
    figure, panels = new_panels(1.2 + 0.14 * max(map(len, rows)), len(chosen))
    for axes, sae, own in zip(panels, chosen, rows, strict=True):
        for place, row in enumerate(own):
            colour = ORANGE if row["value"] > 0 else BLUE
            axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1)
            axes.plot(row["value"], place, "o", color=colour, markersize=3)
        axes.set_yticks(
            range(len(own)), [f"{visible(row['label'], strip=False)}  ({row['count']})" for row in own], fontsize=7
        )
        axes.invert_yaxis()
        axes.axvline(0, color=GREY, linewidth=0.6)
        axes.set_title(f"{_sae_label(result, sae)}: token (count)".replace("\n", ", "))
        axes.set_xlabel("KL(Sae) − KL(random), nats")
    return figure


FIGURES = {"ratios": ratios, "gap": gap, "tokens": gap_by_token}
