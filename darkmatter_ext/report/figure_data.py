"""The data of a figure, read from the figure itself: for the interactive copy in the page, and as CSV.

An experiment draws once, with matplotlib; the contents of its lines, points, bars and images are read back here. So a new
experiment's figures are interactive and downloadable without extra code. Shapes without readable numbers (violins, filled
contours) are left to the picture.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CSV_HEADINGS = ("panel", "series", "x", "x name", "y", "y name", "low", "high", "value")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would execute text that begins like this


@dataclass(frozen=True)
class Series:
    """One set of marks, as columns of equal length."""

    kind: str  # line, point, bar, area, cell (of a matrix), level (a horizontal line across)
    label: str
    colour: str
    x: list[float]
    y: list[float]
    low: list[float | None] = field(default_factory=list)  # bounds of an interval of y
    high: list[float | None] = field(default_factory=list)
    base: list[float] = field(default_factory=list)  # where bars and areas begin
    value: list[float | None] = field(default_factory=list)  # what the colour encodes
    flat: bool = False  # horizontal bars: x and y are swapped


@dataclass(frozen=True)
class Axis:
    label: str
    scale: str  # linear or log
    names: list[tuple[float, str]]  # names of positions, if the axis has names instead of numbers
    falling: bool  # whether the axis runs from high to low
    limits: tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: Axis
    y: Axis
    series: list[Series]
    whole: bool  # whether the series are everything that is drawn

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def panels(figure: Figure) -> list[Panel]:
    """The contents of a figure's axes, without colour bars."""
    return [_panel(axes) for axes in figure.axes if axes.get_label() != "<colorbar>"]


def as_csv(found: Sequence[Panel]) -> str:
    """All points of a figure, one row each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADINGS)
    for panel in found:
        names = dict(panel.x.names), dict(panel.y.names)
        for series in panel.series:
            for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
                more = [column[i] if column else None for column in (series.low, series.high, series.value)]
                row = (panel.title, series.label, x, names[0].get(x, ""), y, names[1].get(y, ""), *more)
                writer.writerow(["" if value is None else _cell(value) for value in row])
    return text.getvalue()


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        text = " ".join(value.split())
        return f"'{text}" if value.startswith(_FORMULA) else text
    return f"{value:.9g}"


def _panel(axes: Axes) -> Panel:
    series = [*_areas(axes), *_bars(axes), *_errorbars(axes), *_lines(axes), *_points(axes), *_cells(axes)]
    drawn = {id(part) for container in axes.containers for part in _parts(container)}
    others = [each for each in axes.collections if not (_is_read(each) or id(each) in drawn)]
    title = next((text for place in ("left", "center", "right") if (text := axes.get_title(place))), "")
    return Panel(_plain(title), _axis(axes, "x"), _axis(axes, "y"), _merged(_labelled(series)), whole=not others)


def _plain(text: str) -> str:
    return " ".join(text.replace(r"\$", "$").split())


def _axis(axes: Axes, which: str) -> Axis:
    from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter

    axis = getattr(axes, f"{which}axis")
    formatted = isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter)
    named = formatted and isinstance(axis.get_major_locator(), FixedLocator)
    texts = [text.get_text() for text in axis.get_majorticklabels()] if named else []
    places = [float(place) for place in axis.get_majorticklocs()] if named else []
    names = [(place, _plain(text)) for place, text in zip(places, texts, strict=False)]
    low, high = sorted(map(float, axis.get_view_interval()))
    return Axis(_plain(axis.get_label_text()), axis.get_scale(), names, bool(axis.get_inverted()), (low, high))


def _parts(container: Any) -> Iterator[Any]:
    """The artists of a container: bars, or the line, caps and bars of an errorbar."""
    for part in container:
        yield from part if isinstance(part, list | tuple) else (part,)


def _is_area(part: Any) -> bool:
    """Whether the artist is filled between two curves over x; a violin is filled over y."""
    return type(part).__name__ == "FillBetweenPolyCollection" and part.t_direction == "x" and len(part.get_paths()) == 1


def _is_read(part: Any) -> bool:
    from matplotlib.collections import PathCollection

    return isinstance(part, PathCollection) or _is_area(part)


def _colour(value: Any) -> str:
    from matplotlib.colors import to_hex

    return to_hex(value)


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in values]


def _ends(values: Any) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def _areas(axes: Axes) -> Iterator[Series]:
    for part in filter(_is_area, axes.collections):
        corners: Any = part.get_paths()[0].vertices
        x = sorted(set(_numbers(corners[:, 0])))
        ends = [[float(y) for at, y in corners if at == place] for place in x]
        colour = _colour(part.get_facecolor()[0])
        yield Series(
            "area", str(part.get_label()), colour, x, [max(own) for own in ends], base=[min(own) for own in ends]
        )


def _bars(axes: Axes) -> Iterator[Series]:
    from matplotlib.container import BarContainer

    for container in axes.containers:
        if not isinstance(container, BarContainer) or not container.patches:
            continue
        flat = container.orientation == "horizontal"
        boxes = [(bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()) for bar in container.patches]
        if flat:
            boxes = [(y, x, height, width) for x, y, width, height in boxes]
        middle = _numbers(round(x + width / 2, 12) for x, _, width, _ in boxes)
        tops, base = _numbers(y + height for _, y, _, height in boxes), _numbers(y for _, y, _, _ in boxes)
        colour = _colour(container.patches[0].get_facecolor())
        yield Series("bar", str(container.get_label()), colour, middle, tops, base=base, flat=flat)


def _errorbars(axes: Axes) -> Iterator[Series]:
    from matplotlib.container import ErrorbarContainer

    for container in axes.containers:
        if not isinstance(container, ErrorbarContainer):
            continue
        line, _, ends = container.lines
        segments = [part.get_segments() for part in ends]
        if line is None or len(segments) != 1 or not container.has_yerr:
            continue
        x, y = _numbers(line.get_xdata()), _numbers(line.get_ydata())
        low, high = (_ends(segment[end][1] if len(segment) else math.nan for segment in segments[0]) for end in (0, 1))
        kind = "point" if line.get_linestyle() in ("None", "none", "") else "line"
        known = len(low) == len(x)
        yield Series(
            kind,
            str(container.get_label()),
            _colour(line.get_color()),
            x,
            y,
            low if known else [],
            high if known else [],
        )


def _lines(axes: Axes) -> Iterator[Series]:
    in_errorbars = {id(part) for container in axes.containers for part in _parts(container)}
    for line in axes.lines:
        if id(line) in in_errorbars:
            continue
        x, y = _numbers(line.get_xdata()), _numbers(line.get_ydata())
        if line.get_transform() == axes.get_yaxis_transform():  # axhline: its x values are fractions of the axes
            yield Series("level", str(line.get_label()), _colour(line.get_color()), [math.nan], y[:1])
        elif line.get_transform() == axes.transData and x:
            kind = "point" if line.get_linestyle() in ("None", "none", "") else "line"
            yield Series(kind, str(line.get_label()), _colour(line.get_color()), x, y)


def _points(axes: Axes) -> Iterator[Series]:
    from matplotlib.collections import PathCollection

    for points in axes.collections:
        if not isinstance(points, PathCollection):
            continue
        places: Any = points.get_offsets()
        array = points.get_array()
        faces: Any = points.get_facecolor()
        colour = _colour(faces[0]) if len(faces) else "#000000"
        value = [] if array is None else _ends(array)
        x, y = _numbers(places[:, 0]), _numbers(places[:, 1])
        yield Series("point", str(points.get_label()), colour, x, y, value=value)


def _cells(axes: Axes) -> Iterator[Series]:
    for image in axes.images:
        matrix: Any = image.get_array()
        if matrix is None or matrix.ndim != 2:
            continue
        rows, columns = matrix.shape
        values = [None if _hidden(value) else float(value) for value in matrix.flatten()]
        x = [float(column) for _ in range(rows) for column in range(columns)]
        y = [float(row) for row in range(rows) for _ in range(columns)]
        yield Series("cell", "", "#000000", x, y, value=values)


def _hidden(value: Any) -> bool:
    import numpy as np

    return bool(np.ma.is_masked(value)) or not math.isfinite(float(value))


def _labelled(series: list[Series]) -> list[Series]:
    """Give marks without a label that of others in the same colour, as a reader of the legend would."""
    known = {one.colour: one.label for one in reversed(series) if not one.label.startswith("_")}
    labels = [
        _plain(one.label) if not one.label.startswith("_") else _plain(known.get(one.colour, ""))
        for one in series
    ]  # fmt: skip
    return [replace(one, label=label) for one, label in zip(series, labels, strict=True)]


def _merged(series: list[Series]) -> list[Series]:
    """Merge bars drawn one by one into one series."""
    found: dict[tuple[Any, ...], Series] = {}
    for number, one in enumerate(series):
        key = (one.label, one.colour, one.flat) if one.kind == "bar" else (number,)
        before = found.get(key)
        columns = ("x", "y", "low", "high", "base", "value")
        found[key] = (
            one if before is None else replace(before, **{c: getattr(before, c) + getattr(one, c) for c in columns})
        )
    return list(found.values())
