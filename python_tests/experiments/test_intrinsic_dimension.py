"""`intrinsic-dimension`: its numbers are those of the estimator on the stored tokens, and what few layers can tell."""

import math

import pytest
import torch
from cases.models import flags

from darkmatter_ext import cli
from darkmatter_ext.experiments.intrinsic_dimension import dimension_numbers, rank_correlation, reading


@pytest.mark.runs
def test_a_planted_sheet_is_two_dimensional_at_every_scale_and_its_control_is_not():
    """A sheet wound through 12 dimensions."""
    u = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    waves = torch.arange(1, 4)
    sheet = torch.cat([f(6.28 * part[:, None] * waves) for part in u.unbind(1) for f in (torch.sin, torch.cos)], dim=1)
    numbers = dimension_numbers(sheet, torch.arange(4000), seed=0)
    for end in ("", "_2"):
        assert numbers[f"dimension{end}"] == pytest.approx(2, rel=0.12)
        assert numbers[f"gaussian{end}"] > 3 * numbers[f"dimension{end}"]
    assert numbers["participation_ratio"] == pytest.approx(12, rel=0.02)
    assert numbers["points"] == 4000


def test_rank_correlations_count_every_order():
    assert rank_correlation([1, 2, 3, 4], [2, 4, 6, 9]) == (1, 2 / 24)
    assert rank_correlation([1, 2, 3, 4], [9, 6, 4, 2]) == (-1, 2 / 24)
    rho, p = rank_correlation([1, 2, 3, 4, 5], [2, 1, 3, 5, 4])
    assert rho == pytest.approx(0.8)
    assert p == pytest.approx(16 / 120)
    assert all(
        math.isnan(value) for value in (*rank_correlation([1, 2], [1, 2]), *rank_correlation([1, 1, 1], [1, 2, 3]))
    )
    many = rank_correlation(list(range(20)), list(range(20)))
    assert many[1] < 1e-6


@pytest.mark.runs
def test_the_command_measures_every_layer(finished):
    run = finished("intrinsic-dimension")
    numbers, hooks = run.result.numbers, run.result.series["hooks"]
    assert len(hooks) == 2
    for hook in hooks:
        assert numbers[f"{hook}/dimension/low"] < numbers[f"{hook}/dimension"] < numbers[f"{hook}/dimension/high"]
        assert numbers[f"{hook}/points"] == 400
        assert numbers[f"{run.result.series['widest'][hook]}/fvu_nonlinear"] > 0
    assert math.isnan(numbers["rank_correlation/fvu/dimension"])
    assert any("too few layers" in line for line in reading(run.result))


def test_too_few_points_are_refused(workplace, capsys):
    assert cli.main(flags(workplace, "--points", "10", experiment="intrinsic-dimension")) != 0
    assert "points" in capsys.readouterr().err
