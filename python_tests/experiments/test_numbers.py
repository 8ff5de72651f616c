"""`numbers`: planted states through all fits, what of a helix is in which part of x; and the command on a small model."""

import pytest
import torch
from cases.models import flags

from darkmatter_ext.activations.number_prompts import Prompts
from darkmatter_ext.estimators.value_fits import digit_columns, waves
from darkmatter_ext.experiments.numbers import FITS, NumbersSettings, fit_numbers, moves_of, part_numbers
from darkmatter_ext.measurement.settings import replaced

SETTINGS = replaced(NumbersSettings(), draws=19)
T, D = 4, 12


def _states(columns, noise=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    signal = columns.double() @ torch.randn(columns.shape[1], D, generator=generator).double()
    signal = (signal - signal.mean(0)) / (signal - signal.mean(0)).square().mean().sqrt()
    return signal[:, None] + noise * torch.randn(90, T, D, generator=generator).double()


def test_a_number_that_is_its_digits_has_no_helix_beyond_them():
    numbers = fit_numbers(_states(digit_columns(SETTINGS.values)), SETTINGS)
    assert numbers["r2/digits"] > 0.85 * numbers["r2/ceiling"]
    assert numbers["r2/beyond_digits"] <= numbers["null/beyond_digits/high"] + 0.01
    assert numbers["rank/permuted"] == 0.05  # 1 of 20: a helix, one would say
    assert numbers["rank/digit_columns"] > 0.05
    assert abs(numbers["null/permuted"]) < 0.05


def test_a_helix_with_a_period_that_digits_do_not_have_is_told():
    own = replaced(SETTINGS, periods=(7.0, 10.0))
    numbers = fit_numbers(_states(waves(own.values, 7)), own)
    truth = 1 / 1.09
    assert numbers["r2/helix"] == pytest.approx(truth, abs=0.02)
    assert numbers["drop/7"] == pytest.approx(truth, abs=0.05)
    assert abs(numbers["drop/10"]) < 0.01
    assert numbers["r2/beyond_digits/low"] > 0.5 > numbers["null/beyond_digits/high"]
    assert numbers["rank/beyond_digits"] == numbers["rank/digit_columns"] == 0.05
    assert numbers["r2/helix/low"] < truth < numbers["r2/helix/high"] + 0.02


def test_shares_of_the_helix_add_up_and_are_where_it_was_put():
    """The wave of period 7 is in the "nonlinear error" alone, a line in Sae(x), a part of it in the linear error."""
    own = replaced(SETTINGS, periods=(7.0,))
    wave, line = _states(waves(own.values, 7), 0.1), _states(own.values[:, None], 0.1, seed=1)
    parts = {"sae": 0.75 * line, "linear": 0.25 * line, "nonlinear": wave}
    numbers = part_numbers(sum(parts.values()), parts, own)
    shares = {part: numbers[f"share/helix_in_{part}"] for part in parts}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-6)
    assert sum(numbers[f"share/all_in_{part}"] for part in parts) == pytest.approx(1, abs=1e-6)
    assert shares["nonlinear"] == pytest.approx(0.5, abs=0.08)  # both have the same energy
    assert shares["sae"] == pytest.approx(0.375, abs=0.08)
    assert numbers["r2/helix_in_nonlinear"] > 0.9
    nothing = parts | {"nonlinear": torch.zeros_like(wave), "sae": 0.75 * line + wave}
    assert part_numbers(sum(nothing.values()), nothing, own)["share/helix_in_nonlinear"] == pytest.approx(0, abs=1e-9)


def test_moves_are_made_without_the_values_they_lie_between():
    """Value 50 is wrong in the states: a fit that has seen it would move there."""
    h = _states(waves(SETTINGS.values, 10), 0.0)
    wrong = h.clone()
    wrong[40] += 100
    prompts = Prompts(*[torch.zeros(1, 1).long()] * 2, 0, torch.tensor([50]), torch.tensor([53]), *[torch.zeros(1)] * 2)
    move = moves_of(h, SETTINGS, prompts)["helix"]
    torch.testing.assert_close(move[0], (h[43] - h[40]).mean(0), rtol=0.05, atol=0.05)
    assert moves_of(wrong, SETTINGS, prompts)["value_mean"].norm() > 100
    assert moves_of(wrong, SETTINGS, prompts)["helix"].norm() < 100


def test_a_run_has_every_fit_and_says_what_was_not_patched(finished):
    _, result, said = finished("numbers")
    numbers = result.numbers
    assert list(result.series["sites"]) == ["embedding", "block-0", "block-1"]
    for site in result.series["sites"]:
        for fit in ("ceiling", "beyond_digits", *FITS):
            assert {f"{site}/r2/{fit}{end}" for end in ("", "/low", "/high")} <= set(numbers)
    # Random weights: the model knows digits and nothing else, and has "a helix" nevertheless.
    assert numbers["block-1/r2/digits"] > 0.95
    assert numbers["block-1/r2/helix"] > 0.3
    assert numbers["block-1/r2/beyond_digits"] < 0.02
    assert "topk-24/share/helix_in_nonlinear" in numbers
    assert numbers["block-1/power/10"] > numbers["block-1/power/band"]
    assert "block-1/power/100" not in numbers  # no period of 90 values
    assert "too few to patch" in said


def test_bad_settings_give_one_line(workplace, tmp_path, refused):
    for more, message in (
        (("--low", "-3"), "--low: must be from 0 to 999, got -3"),
        (("--high", "1000"), "--high: must be from low to 999, got 1000"),
        (("--low", "50", "--high", "60"), "high - low + 1: must be at least 20, got 11"),
        (("--templates", "the a", "of {a}"), "--templates: must hold {a} where the number stands, got 'the a'"),
        (("--periods", "1.5"), "--periods: must be at least 2, got [1.5]"),
        (("--blocks", "1", "3"), "--blocks: must be from 0 to 2 of"),
    ):
        refused(flags(workplace, "--widths", "24", "--out", str(tmp_path), *more, experiment="numbers"), message)
