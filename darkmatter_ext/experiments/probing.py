"""Are an SAE's latents, its reconstruction or its error of use for probing?

Binary tasks on texts ("is this from numpy?", "does it hold a number?"), one probe per kind of feature of the last token:

- *x*: logistic regression on the activation, and on its principal components (as many numbers as latents); neighbours.
- *latents*: the k whose class means differ most (after division by mean active values), with L1 logistic regression.
- *Sae(x)*, *error*, *linear* and *nonlinear error* (b* from unlabelled text), *x without its nonlinear error*.
- *controls*: words of the text, k random latents, random directions, an SAE whose decoder stayed random, permuted labels.

Regimes: all training rows, few, few of one label, wrong labels, another domain. Penalties and neighbours are chosen by AUC
within the training rows. A *quiver* is a set of probes from which the one with the best validation AUC is used: what the
SAE's probes add to it is compared with what probes of permuted labels add in their place.

Kantamneni, Engels, Rajamanoharan, Tegmark, Nanda, "Are Sparse Autoencoders Useful?" (2502.16681); probes of the error are
not theirs. Shapes: n rows of a task, T tasks, A arrows (probes of one kind), F latents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from darkmatter_ext.activations.text import Document, installed_documents
from darkmatter_ext.activations.text_sites import POOLS, text_sites
from darkmatter_ext.estimators.intervals import ratio, seed_interval
from darkmatter_ext.estimators.probe_scores import Scores, over_tasks, quiver_gains, sign_test
from darkmatter_ext.estimators.probes import Make, arrows, dense, latents, neighbours, random_rank, validation_folds
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import DEMO
from darkmatter_ext.measurement.probe_features import PARTS, codes, features, words
from darkmatter_ext.measurement.probe_regimes import REGIMES, Regimes, draws
from darkmatter_ext.measurement.probe_tasks import Task, built_in_tasks, read_tasks
from darkmatter_ext.measurement.run import Inputs, Measurement, measured, prepare
from darkmatter_ext.measurement.settings import Settings, extended
from darkmatter_ext.measurement.site_saes import SiteSae
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREEN, GREY, ORANGE, SKY, interval_bars, legend_beside, new_figure
from darkmatter_ext.report.table import Table, shown, with_interval
from darkmatter_ext.runtime.inputs import require, require_at_least, require_one_of
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.threads import one_thread
from darkmatter_ext.saes.encoders import random_directions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIANTS = ("true", "permuted")  # labels that an arrow was fitted on
QUIVERS = {  # kinds of arrows: in every quiver, and what is added
    "baseline": ("x", "pca", "neighbours"),
    "sae": ("sae", "latents"),
    "dark_matter": ("error", "linear", "nonlinear"),
}
_ABOUT = {
    "x": "x (logistic regression)",
    "pca": "x, {k} principal components",
    "neighbours": "x, nearest neighbours",
    "sae": "Sae(x)",
    "latents": "{k} latents",
    "error": "error",
    "linear": "linear error",
    "nonlinear": "nonlinear error",
    "without_nonlinear": "x without its nonlinear error",
    "words": "control: words of the text",
    "random_latents": "control: {k} random latents",
    "random_directions": "control: {k} latents, random directions",
    "frozen": "control: {k} latents, decoder as drawn",
}


@dataclass(frozen=True)
class ProbingSettings(Settings):
    """Probe the activation, an SAE's latents and the parts of its error on labelled texts."""

    tasks: str = ""
    """CSV file with columns prompt and target (and task, document, domain); default: tasks of installed documentation"""
    regimes: tuple[str, ...] = REGIMES
    """regimes of training rows: normal (all), scarcity, imbalance, noise (wrong labels), shift (tested on another domain)"""
    probe_ks: tuple[int, ...] = (1, 16, 128)
    """latents, and principal components, that a probe may use; controls have the middle one"""
    train_sizes: tuple[int, ...] = (8, 32, 128, 512)
    """training rows; the largest, or all of a smaller task, is the normal regime"""
    imbalances: tuple[float, ...] = (0.1,)
    """shares of positive labels among training rows, for regime imbalance"""
    label_noise: tuple[float, ...] = (0.1, 0.3, 0.5)
    """shares of training labels that are flipped, for regime noise"""
    probe_seeds: int = 3
    """splits of each task into training and test documents"""
    rows: int = 300
    """texts of a built-in task, at most"""
    pool: str = "last"
    """what represents a text: last (its last token) or mean (over its tokens)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.drawn  # checks its values
        require_one_of("pool", POOLS, self.pool)
        require(bool(self.probe_ks), "probe_ks", "must name at least one number", "none")
        require(len(set(self.probe_ks)) == len(self.probe_ks), "probe_ks", "must be different", list(self.probe_ks))
        require_at_least("probe_ks", 1, min(self.probe_ks))
        require_at_least("probe_seeds", 1, self.probe_seeds)
        require_at_least("rows", 100, self.rows)
        saes = self.saes
        asked = len(saes.sae) or len([own for own in saes.trained if own.freeze == "none"]) * len(saes.trained_hooks)
        require(asked == 1, "sae, widths", "must name one SAE", asked)

    @property
    def drawn(self) -> Regimes:
        """Which training rows are drawn."""
        return Regimes(self.regimes, self.train_sizes, self.imbalances, self.label_noise)


PRESETS = {"demo": extended(extended(DEMO, Settings, widths=(2048,), frozen=("decoder",)), ProbingSettings)}


def plan(settings: ProbingSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    source = settings.tasks or f"installed documentation that the run has not read, up to {settings.rows} texts a task"
    return [
        *plan_lines(settings),
        f"tasks     {source}; {settings.pool} of each text's tokens",
        f"probes    {', '.join(settings.regimes)}; latents and components {list(settings.probe_ks)}; training rows "
        f"{list(settings.train_sizes)}; {settings.probe_seeds} splits",
    ]


# ---- probes


def kinds(own: Iterable[str], ks: Sequence[int], *, seed: int) -> list[tuple[str, Make]]:
    """Kinds of probes by the features they read, for those features that exist."""
    middle = sorted(ks)[len(ks) // 2]
    few = {name: latents({f"{name}-{middle}": middle}) for name in ("random_directions", "frozen")}
    random_latents = latents({f"random_latents-{middle}": middle}, rank=random_rank(seed))
    every = [
        ("x", dense("x", {f"pca-{k}": k for k in ks})),
        ("x", neighbours("neighbours")),
        *((name, dense(name)) for name in (*PARTS, "words")),
        ("latents", latents({f"latents-{k}": k for k in ks})),
        ("latents", random_latents),
        *few.items(),
    ]
    there = set(own)
    return [(name, make) for name, make in every if name in there]


def kind_of(arrow: str) -> tuple[str, str]:
    """`latents-16` -> ("latents", "16"); `x` -> ("x", "")."""
    name, _, k = arrow.partition("-")
    return name, k


@one_thread()
def probe(
    tasks: Sequence[Task],
    places: Sequence[Tensor],
    own: Mapping[str, Tensor],
    settings: ProbingSettings,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Scores, Scores]:
    """Fit every arrow in every regime, on the labels and on permuted labels.

    Args:
        places: for each task [n], the rows of the features that belong to its texts.
        own: see `probe_features.features`.
        progress: called with 1 after each split of a task.

    Cost: a few seconds per task and split on one core, mostly eigenvectors of Gram matrices of the training rows.
    """
    every = kinds(own, settings.probe_ks, seed=settings.seed)
    found: dict[str, dict[str, dict[tuple[int, int], dict[str, tuple[float, float]]]]] = {}
    for number, (task, place) in enumerate(zip(tasks, places, strict=True)):
        for split in range(settings.probe_seeds):
            for draw in draws(task, settings.drawn, seed=settings.seed + split):
                folds = validation_folds(task.labels[draw.rows], seed=settings.seed + split)
                train, test = place[draw.rows], place[draw.test]
                for feature, make in every:
                    x, y = own[feature], task.labels[draw.test]
                    for name, arrow in arrows(make, x[train], draw.labels, x[test], y, folds).items():
                        pairs = list(zip(arrow.validation.tolist(), arrow.test.tolist(), strict=True))
                        for point, pair in zip(draw.points, pairs[:-1], strict=True):
                            for variant, value in zip(VARIANTS, (pair, pairs[-1]), strict=True):
                                cells = found.setdefault(variant, {}).setdefault(point, {})
                                cells.setdefault((number, split), {})[name] = value
            progress(1)
    true, permuted = (Scores.of(found[variant], len(tasks), settings.probe_seeds) for variant in VARIANTS)
    return true, permuted


# ---- numbers


def regime_numbers(regime: str, true: Scores, permuted: Scores, *, seed: int) -> dict[str, float]:
    """AUC of every arrow in a regime, its difference from x, and what quivers gain; see docs/probing.md for the names."""
    numbers: dict[str, float] = {}
    points = true.points(regime)
    every = torch.stack([true.test[point] for point in points]).nanmean((0, 2))  # [T, A]
    x, nonlinear = (every[:, true.arrows.index(name)] for name in ("x", "nonlinear"))
    for column, name in enumerate(true.arrows):
        numbers |= over_tasks(every[:, column], seed=seed).numbers(f"{regime}/{name}/auc")
        for point in points if len(points) > 1 else ():
            own = true.test[point][:, :, column].nanmean(1)
            numbers |= over_tasks(own, seed=seed).numbers(f"{point}/{name}/auc")
        if name != "x":
            numbers |= over_tasks(every[:, column] - x, seed=seed).numbers(f"{regime}/{name}/over_x")
            numbers |= {f"{regime}/{name}/{key}": value for key, value in sign_test(every[:, column] - x).items()}
    known = x.isfinite()
    numbers |= ratio(torch.stack([nonlinear[known], x[known]], dim=1) - 0.5).numbers(f"{regime}/dark_matter_share")
    columns = {
        key: [i for i, name in enumerate(true.arrows) if kind_of(name)[0] in own] for key, own in QUIVERS.items()
    }
    for key in ("sae", "dark_matter"):
        gains = quiver_gains(points, true, permuted, columns["baseline"], columns[key])
        names = {"baseline": "quiver/baseline", "gain": f"quiver_gain/{key}", "null": f"quiver_gain_null/{key}"}
        for quantity, own in gains.items():
            numbers |= over_tasks(own, seed=seed).numbers(f"{regime}/{names[quantity]}")
    return numbers


def task_numbers(tasks: Sequence[str], true: Scores) -> dict[str, float]:
    """AUC of every arrow on each task with all training rows; intervals over splits."""
    numbers: dict[str, float] = {}
    for number, task in enumerate(tasks):
        for column, name in enumerate(true.arrows):
            own = true.test["normal"][number, :, column]
            numbers |= seed_interval(own.tolist()).numbers(f"{task}/{name}/auc")
    return numbers


# ---- the run


def _measured_sae(inputs: Inputs) -> tuple[SiteSae, SiteSae | None]:
    """The SAE, and the control whose decoder stayed as initialised, if there is one."""
    frozen = [sae for sae in inputs.saes if sae.trained is not None and sae.trained.freeze != "none"]
    (sae,) = (sae for sae in inputs.saes if sae not in frozen)
    return sae, next((own for own in frozen if own.trained is not None and own.trained.freeze == "decoder"), None)


def _read_already(inputs: Inputs) -> Iterable[Document]:
    """The installed documents that the run has already read, which its SAEs or b* may know."""
    data = inputs.settings.data
    if data.text or data.dataset or data.stored:
        return ()
    stored = next(iter(inputs.stored.values()), None)
    documents = inputs.source.documents if stored is None else stored.cache.column("documents")
    return islice(installed_documents(), 1 + int(documents.max()))


def _tasks(inputs: Inputs, settings: ProbingSettings) -> tuple[list[Task], list[str]]:
    if settings.tasks:
        return read_tasks(settings.tasks), []
    return built_in_tasks(settings.rows, seed=settings.seed, without=_read_already(inputs))


def run(settings: ProbingSettings, stages: Stages) -> Result:
    """Measure the SAE for b*, read the texts, fit every probe.

    Raises InputError for bad settings or tasks, SAEs that do not fit; StateError for damaged files.
    """
    if settings.tasks:  # reject a bad file before anything runs
        for task in read_tasks(settings.tasks):
            taken = kind_of(task.name)[0] in (*REGIMES, VARIANTS[1])  # their numbers would clash with the task's
            require(not taken, "tasks", "must not have the name of a regime", repr(task.name))
            _check_splits(task, settings)
    inputs = prepare(settings, stages)
    found = measured(inputs, stages)
    with stages.stage("make tasks"):
        tasks, notes = _tasks(inputs, settings)
        for task in tasks:
            _check_splits(task, settings)
    texts = list(dict.fromkeys(text for task in tasks for text in task.texts))
    own, sinks = _features(inputs, found, settings, texts, stages)
    number_of = {text: number for number, text in enumerate(texts)}
    places = [torch.tensor([number_of[text] for text in task.texts]) for task in tasks]
    with stages.stage("fit probes", len(tasks) * settings.probe_seeds) as advance:
        true, permuted = probe(tasks, places, own, settings, advance)
    regimes = [regime for regime in settings.regimes if true.points(regime)]
    numbers: dict[str, float] = {"tasks": len(tasks), "texts": len(texts)}
    for regime in regimes:
        numbers |= regime_numbers(regime, true, permuted, seed=settings.seed)
    numbers |= task_numbers([task.name for task in tasks], true)
    for column, name in enumerate(true.arrows):
        own_auc = permuted.test["normal"][:, :, column].mean(1)
        numbers |= over_tasks(own_auc, seed=settings.seed).numbers(f"permuted/{name}/auc")
    series = {
        "arrows": true.arrows, "regimes": regimes, "points": list(true.test),
        "tasks": {task.name: len(task) for task in tasks},
    }  # fmt: skip
    arrays = {
        f"{side}/{variant}/{point}": values.numpy()
        for variant, scores in zip(VARIANTS, (true, permuted), strict=True)
        for side in ("validation", "test")
        for point, values in getattr(scores, side).items()
    }
    notes += [*_notes(settings, tasks, regimes), *sinks]
    return measured_result("probing", found, stages, numbers, series=series, arrays=arrays, notes=notes)


def _check_splits(task: Task, settings: ProbingSettings) -> None:
    """Raise InputError, before the model reads anything, for a task that cannot be divided."""
    for split in range(settings.probe_seeds):
        draws(task, settings.drawn, seed=settings.seed + split)


def _features(
    inputs: Inputs, found: Measurement, settings: ProbingSettings, texts: Sequence[str], stages: Stages
) -> tuple[dict[str, Tensor], list[str]]:
    """What probes read from every text, controls included; and a note on texts that end on an attention sink."""
    sae, frozen = _measured_sae(inputs)
    site, usage, device = found.site_of(sae.name), inputs.resolved.usage, inputs.processes.device
    with stages.stage("read the texts", len(texts)) as advance:
        sites = text_sites(
            inputs.model, [sae.reads], texts, bos=usage.bos, pool=settings.pool, first=settings.measure.drop_positions,
            device=device, dtype=getattr(torch, settings.data.dtype), processing=usage.processing, progress=advance,
        )  # fmt: skip
    with stages.stage("encode the texts"):
        loaded = sae.load()
        own = features(sites, sae.reads, sae.own, site.maps[sae.name], device)
        own["words"] = words(sites.tokens)
        if hasattr(loaded, "W_dec") and hasattr(loaded, "b_dec"):
            active = max(1, round(site.decomposition(sae.name).l0))
            control = random_directions(loaded, active, seed=settings.seed)
            own["random_directions"] = codes(sites, sae.reads, control, device)
        if frozen is not None:
            own["frozen"] = codes(sites, frozen.reads, frozen.own, device)
    return own, sites.sink_notes(sae.reads, settings.measure.max_norm_ratio)


def _notes(settings: ProbingSettings, tasks: Sequence[Task], regimes: Sequence[str]) -> list[str]:
    unread = (
        "Texts are of documents that this run has not read; what a given SAE was trained on is not known here."
        if not settings.tasks
        else "Whether the SAE was trained on these texts is not known here."
    )
    return [
        f"AUC on test documents, mean over {len(tasks)} tasks and {settings.probe_seeds} splits of each; intervals 95 %, "
        f"tasks drawn again; of a single task Student's t over its splits. {unread}",
        "Not as in the paper: no XGBoost and no network among the baselines; L1 for latents, L2 elsewhere; seven penalties.",
        *(f"No task allows the regime {regime}." for regime in settings.regimes if regime not in regimes),
    ]


# ---- what is shown


def about(arrow: str) -> str:
    """An arrow in words."""
    name, k = kind_of(arrow)
    words = _ABOUT[name].format(k=k)
    return words if k != "1" else re.sub(r"\b1 (.*?)(latent|component)s", r"1 \1\2", words)


def table(result: Result) -> Table:
    """One row per arrow, one column per regime: mean test AUC; for all training rows also its interval and against x."""
    numbers, regimes = result.numbers, result.series["regimes"]
    others = [regime for regime in regimes if regime != "normal"]
    rows = []
    for name in result.series["arrows"]:
        over = with_interval(numbers, f"normal/{name}/over_x", "{:+.3f}") if name != "x" else ""
        cells = [with_interval(numbers, f"normal/{name}/auc", "{:.3f}"), over]
        rows.append([about(name), *cells, *(shown(numbers[f"{regime}/{name}/auc"], "{:.3f}") for regime in others)])
    for key, what in (("sae", "the SAE's probes"), ("dark_matter", "probes of the error")):
        for quantity, label in (("quiver_gain", "quiver: gain by"), ("quiver_gain_null", "null of it, permuted")):
            first = with_interval(numbers, f"normal/{quantity}/{key}", "{:+.4f}")
            more = [shown(numbers[f"{regime}/{quantity}/{key}"], "{:+.4f}") for regime in others]
            rows.append([f"{label} {what}" if quantity == "quiver_gain" else label, "", first, *more])
    return Table(
        title=f"probing: {result.config['model']}, {result.config['hook']}, mean test AUC of "
        f"{numbers['tasks']:.0f} tasks",
        headings=("probe of", "normal", "against x", *others),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """Whether latents beat the activation, what a quiver gains beyond its null, and what the error knows about labels."""
    numbers = result.numbers
    latent = [name for name in result.series["arrows"] if kind_of(name)[0] == "latents"]
    best = max(latent, key=lambda name: numbers[f"normal/{name}/auc"])
    over = with_interval(numbers, f"normal/{best}/over_x", "{:+.3f}")
    lines = [
        f"Logistic regression on x has a mean AUC of {with_interval(numbers, 'normal/x/auc', '{:.3f}')}; the best probe on "
        f"latents ({about(best)}) {numbers[f'normal/{best}/auc']:.3f}, {over} against x, and wins "
        f"{shown(numbers[f'normal/{best}/win_rate'], '{:.0%}')} of the tasks (p {numbers[f'normal/{best}/win_p']:.2g}). "
        "The paper, Gemma 2 9B: 0.941 and 0.921."
    ]
    for regime in result.series["regimes"]:
        parts = []
        for key, what in (("sae", "the SAE's probes"), ("dark_matter", "probes of the error")):
            low, high = (numbers[f"{regime}/quiver_gain/{key}/{end}"] for end in ("low", "high"))
            verdict = "gains by" if low > 0 else "loses by" if high < 0 else "does not clearly change with"
            gain, null = (
                with_interval(numbers, f"{regime}/{name}/{key}", "{:+.4f}")
                for name in ("quiver_gain", "quiver_gain_null")
            )
            parts.append(f"{verdict} {what} ({gain}; null {null})")
        lines.append(f"{regime}: a quiver of probes on x {' and '.join(parts)}.")
    lines.append(
        f"The nonlinear error alone has AUC {with_interval(numbers, 'normal/nonlinear/auc', '{:.3f}')}, "
        f"{with_interval(numbers, 'normal/dark_matter_share', '{:.0%}')} of what x has above 0.5; x without it has "
        f"{with_interval(numbers, 'normal/without_nonlinear/over_x', '{:+.3f}')} against x. Words alone have "
        f"{numbers['normal/words/auc']:.3f}; probes of permuted labels {numbers['permuted/x/auc']:.3f}."
    )
    return lines


_LINES = (
    ("x", BLUE, "o"),
    ("latents", ORANGE, "s"),
    ("sae", GREEN, "^"),
    ("nonlinear", SKY, "v"),
    ("words", GREY, "x"),
)


def sizes(result: Result) -> Figure | None:
    """Mean test AUC against the number of training rows, with intervals over tasks."""
    points = [point for point in result.series["points"] if kind_of(point)[0] == "scarcity"]
    if not points:
        return None
    points.sort(key=lambda point: int(kind_of(point)[1]))
    # The numbers of a regime with a single point go by the regime's name.
    points = points if len(points) > 1 else ["scarcity"]
    figure, axes = new_figure(2.8)
    arrows = result.series["arrows"]
    for number, (kind, colour, marker) in enumerate(_LINES):
        name = max((own for own in arrows if kind_of(own)[0] == kind), key=lambda own: int(kind_of(own)[1] or 0))
        values, errors = interval_bars(result, [f"{point}/{name}/auc" for point in [*points, "normal"]])
        places = [place + 0.06 * (number - 2) for place in range(len(values))]
        axes.errorbar(places, values, yerr=errors, fmt=f"{marker}-", color=colour, markersize=4, linewidth=1,
                      label=about(name).replace(": ", ":\n"))  # fmt: skip
    axes.axhline(0.5, color="black", linewidth=0.6, linestyle="--")
    axes.set_xticks(range(len(points) + 1), [*(kind_of(point)[1] or "few" for point in points), "all"])
    axes.set_xlabel("training rows")
    axes.set_ylabel("test AUC")
    axes.set_title("Few labels")
    legend_beside(axes)
    return figure


def gains(result: Result) -> Figure:
    """What a quiver of probes on x gains from more probes in each regime, compared with probes of permuted labels."""
    regimes = result.series["regimes"]
    figure, axes = new_figure(2.6)
    styles = [("sae", "quiver_gain", ORANGE, "s", "by the SAE's probes"), ("sae", "quiver_gain_null", ORANGE, "x", "null"),
              ("dark_matter", "quiver_gain", BLUE, "o", "by probes of the error"),
              ("dark_matter", "quiver_gain_null", BLUE, "x", "null")]  # fmt: skip
    for number, (key, quantity, colour, marker, label) in enumerate(styles):
        values, errors = interval_bars(result, [f"{regime}/{quantity}/{key}" for regime in regimes])
        places = [place + 0.14 * (number - 1.5) for place in range(len(regimes))]
        axes.errorbar(places, values, yerr=errors, fmt=marker, color=colour, markersize=4, linewidth=1, label=label,
                      alpha=0.6 if marker == "x" else 1)  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(regimes)), regimes)
    axes.set_ylabel("test AUC gained")
    axes.set_title("Does a quiver gain by more probes?")
    legend_beside(axes)
    return figure


def heat_map(result: Result) -> Figure:
    """Test AUC of every probe on every task, with all training rows."""
    names, arrows = list(result.series["tasks"]), result.series["arrows"]
    values = [[result.numbers[f"{task}/{name}/auc"] for name in arrows] for task in names]
    figure, axes = new_figure(1.9 + 0.17 * len(names))
    image = axes.imshow(values, vmin=0.4, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(arrows)), [about(name).replace("control: ", "") for name in arrows], rotation=45,
                    ha="right", rotation_mode="anchor", fontsize=7)  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=7)
    for row, own in enumerate(values):
        for column, value in enumerate(own):
            axes.text(column, row, f"{value:.2f}".removeprefix("0"), ha="center", va="center", fontsize=5.5,
                      color="black" if value > 0.8 else "white")  # fmt: skip
    figure.colorbar(image, ax=axes, label="test AUC")
    axes.spines[:].set_visible(False)
    return figure


FIGURES = {"sizes": sizes, "quivers": gains, "tasks": heat_map}
