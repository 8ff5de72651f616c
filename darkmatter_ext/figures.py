"""Figures drawn from a Result alone, never from live objects: a figure can always be made again from its file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkmatter_ext.error import NORM_TARGETS
from darkmatter_ext.results import Result
from darkmatter_ext.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#7F7F7F"
_SERIES = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", SKY)
_WIDTH = 6.4  # inches: full text width of a paper
_ROOMY = 4  # bars whose labels fit side by side in full size
NORM_TARGET_LABELS = {
    "x": "x",
    "sae": "Sae(x)",
    "error": "SaeError",
    "linear": "linear\nerror",
    "nonlinear": "nonlinear\nerror",
    "sae_plus_nonlinear": "Sae(x) +\nnonlinear",
}
_STYLE: Any = {  # matplotlib types its keys as literals
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 160,
    "savefig.bbox": "tight",
}


def _new(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def fvu_by_width(result: Result) -> Figure:
    """FVU of each SAE, split into the part linear in the activation and the nonlinear part."""
    saes = result.series["saes"]
    figure, axes = _new(2.8)
    for place, sae in enumerate(saes):
        fvu, nonlinear = (result.numbers[f"{sae['name']}/{key}"] for key in ("fvu", "fvu_nonlinear"))
        axes.bar(place, nonlinear, width=0.6, color=BLUE, label="nonlinear error" if place == 0 else None)
        axes.bar(
            place, fvu - nonlinear, width=0.6, bottom=nonlinear, color=SKY, label="linear error" if place == 0 else None
        )
        axes.annotate(f"{fvu:.3f}", (place, fvu), ha="center", va="bottom", xytext=(0, 1), textcoords="offset points")
        share = result.numbers[f"{sae['name']}/linear_share"]
        text = f"{share:.0%}" if len(saes) > _ROOMY else f"{share:.0%} linear"
        axes.annotate(text, (place, (fvu + nonlinear) / 2), ha="center", va="center", fontsize=8)
        axes.annotate(f"{nonlinear:.3f}", (place, nonlinear / 2), ha="center", va="center", color="white")
    labels = [f"{_place_label(sae)}\nL0 {result.numbers[sae['name'] + '/l0']:.1f}" for sae in saes]
    axes.set_xticks(range(len(saes)), labels, fontsize=9 if len(saes) <= _ROOMY else 7)
    axes.set_ylabel("fraction of variance unexplained")
    axes.set_title("SAE error on held-out text, by what a linear map of x explains")
    axes.margins(y=0.12)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _place_label(sae: dict[str, Any]) -> str:
    return f"{sae['d_sae']} latents" + (f"\n{sae['variant']}" if "variant" in sae else "")


def norm_test(result: Result) -> Figure:
    """Norm prediction test: R2 of a linear map from x to the squared norm of six vectors, one bar an SAE."""
    saes = result.series["saes"]
    figure, axes = _new(2.9)
    width = 0.8 / len(saes)
    lowest = 0.0
    for number, sae in enumerate(saes):
        heights = [result.numbers[f"{sae['name']}/r2_norm/{target}"] for target in NORM_TARGETS]
        lowest = min([lowest, *(height for height in heights if math.isfinite(height))])
        places = [place + (number - (len(saes) - 1) / 2) * width for place in range(len(NORM_TARGETS))]
        axes.bar(places, heights, width=width, color=_SERIES[number % len(_SERIES)], label=f"{sae['d_sae']} latents")
    axes.set_xticks(range(len(NORM_TARGETS)), [NORM_TARGET_LABELS[target] for target in NORM_TARGETS])
    axes.set_ylabel("held-out R²")
    axes.set_ylim(lowest, 1)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_title("How well a linear map of x predicts the squared norm of ...")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "→").replace(" ", "·", 1) if token.strip() == "" else token.strip()


def per_token_error(result: Result) -> Figure:
    """Error of every SAE over a piece of held-out text, token by token, with the nonlinear error of the widest."""
    excerpt = result.series["excerpt"]
    tokens, norms = excerpt["tokens"], excerpt["squared_norm_x"]
    figure, axes = _new(3.2)
    places = range(len(tokens))
    names = [sae["name"] for sae in result.series["saes"]]
    widths = {sae["name"]: sae["d_sae"] for sae in result.series["saes"]}
    for number, name in enumerate(names):
        share = [error / norm for error, norm in zip(excerpt["squared_norms"][name]["error"], norms, strict=True)]
        colour = _SERIES[number % len(_SERIES)]
        axes.plot(places, share, color=colour, linewidth=1.2, label=f"error, {widths[name]} latents")
    last = names[-1]
    nonlinear = [part / norm for part, norm in zip(excerpt["squared_norms"][last]["nonlinear"], norms, strict=True)]
    axes.plot(
        places, nonlinear, color=GREY, linewidth=1, linestyle="--", label=f"nonlinear error,\n{widths[last]} latents"
    )
    axes.set_xticks(places, [_escape(_visible(token)) for token in tokens], rotation=90, fontsize=6)
    axes.set_xlim(0, len(tokens) - 1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("squared norm / squared norm of x")
    axes.set_title("The same tokens are hard for every width")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _escape(text: str) -> str:
    return text.replace("$", r"\$")  # or matplotlib reads it as mathematics


FIGURES: dict[str, dict[str, Callable[[Result], Any]]] = {
    "decomposition": {"fvu": fvu_by_width, "norm_test": norm_test, "per_token": per_token_error},
    "pursuit": {"fvu": fvu_by_width},
}


def save_figures(result: Result, folder: Path, *, kind: str = "png") -> list[Path]:
    """Draw every figure of a result into `folder` as `<experiment>_<figure>.<kind>` (png, pdf or svg).

    Raises ValueError for an experiment without figures.
    """
    import matplotlib

    if result.experiment not in FIGURES:
        raise ValueError(f"RESULT: must be of {', '.join(FIGURES)}, got a result of {result.experiment!r}")
    paths = []
    with matplotlib.rc_context(_STYLE):
        for name, draw in FIGURES[result.experiment].items():
            path = folder / f"{result.experiment}_{name}.{kind}"
            with atomic_file(path) as part:
                draw(result).savefig(part)
            paths.append(path)
    return paths
