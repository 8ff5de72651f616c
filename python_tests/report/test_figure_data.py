"""What is read back from a figure is what was drawn."""

import csv
import io

import pytest
from cases.explored import lines
from matplotlib.figure import Figure

from darkmatter_ext.report.figure_data import CSV_HEADINGS, as_csv, panels


def _axes():
    figure = Figure()
    return figure, figure.subplots()


def test_lines_with_intervals_levels_and_names():
    (panel,) = panels(lines(None))
    assert (panel.title, panel.y.label, panel.whole) == ("The law", "FVU", True)
    assert panel.x.names == [(1.0, "one"), (2.0, "<b>two</b>"), (4.0, "\u202efour")]
    line, level = panel.series
    assert (line.kind, line.label, line.colour) == ("line", "L0 32", "#0072b2")
    assert (line.x, line.y) == ([1, 2, 4], [0.5, 0.25, 0.125])
    assert line.low == pytest.approx([0.4, 0.15, 0.025])
    assert line.high == pytest.approx([0.7, 0.45, 0.325])
    assert (level.kind, level.label, level.y) == ("level", "", [0.1])


def test_bars_drawn_one_by_one_are_series_by_their_colour():
    figure, axes = _axes()
    for place in range(2):
        axes.bar(place, 1.0, color="red", label="low" if place == 0 else None)
        axes.bar(place, 2.0, bottom=1.0, color="blue", label="high" if place == 0 else None)
    low, high = panels(figure)[0].series
    assert (low.kind, low.label, low.x, low.y, low.base) == ("bar", "low", [0, 1], [1, 1], [0, 0])
    assert (high.label, high.x, high.y, high.base) == ("high", [0, 1], [3, 3], [1, 1])
    figure, axes = _axes()
    axes.barh([0, 1], [5, 6], left=1)
    (lying,) = panels(figure)[0].series
    assert (lying.flat, lying.x, lying.y, lying.base) == (True, [0, 1], [6, 7], [1, 1])


def test_points_cells_and_areas():
    figure, axes = _axes()
    axes.scatter([1, 2], [3, 4], c=[5.0, 6.0])
    axes.stackplot([1, 2], [1, 1], [2, 3], labels=["a", "b"])
    axes.set_xscale("log")
    figure.colorbar(axes.collections[0])
    (panel,) = panels(figure)  # the colour bar is none
    first, second, points = panel.series
    assert (first.kind, first.label, first.base, first.y) == ("area", "a", [0, 0], [1, 1])
    assert (second.label, second.base, second.y) == ("b", [1, 1], [3, 4])
    assert (points.kind, points.x, points.y, points.value) == ("point", [1, 2], [3, 4], [5, 6])
    assert (panel.x.scale, panel.whole) == ("log", True)
    figure, axes = _axes()
    axes.imshow([[1.0, float("nan")]])
    (cells,) = panels(figure)[0].series
    assert (cells.kind, cells.x, cells.y, cells.value) == ("cell", [0, 1], [0, 0], [1.0, None])


def test_what_holds_no_numbers_is_left_to_the_picture():
    figure, axes = _axes()
    axes.violinplot([[1, 2, 3]])
    assert not panels(figure)[0].whole


def test_csv_has_a_row_a_point_and_no_formula():
    found = panels(lines(None))
    rows = list(csv.reader(io.StringIO(as_csv(found))))
    assert tuple(rows[0]) == CSV_HEADINGS
    assert rows[1] == ["The law", "L0 32", "1", "one", "0.5", "", "0.4", "0.7", ""]
    figure, axes = _axes()
    axes.plot([1], [-2], label="=HYPERLINK(1)")
    assert list(csv.reader(io.StringIO(as_csv(panels(figure)))))[1][1:5] == ["'=HYPERLINK(1)", "1", "", "-2"]
