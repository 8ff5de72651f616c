"""`numbers`: the command on a small model."""

import dataclasses

from cases.models import flags

from darkmatter_ext.estimators.number_fits import FITS
from darkmatter_ext.experiments.numbers import patches, reading, sums, table


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
    assert not any("letters" in name for name in numbers)  # this tokenizer does not tell them apart
    assert "too few to look at" in said


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


def test_sums_letters_and_patches_are_shown_where_there_are_any(finished):
    """What the tests' model does not reach: it adds no numbers, and its tokenizer has no letters."""
    result, more = finished("numbers").result, {}
    names = [f"r2/{name}" for name in ("addends", "sum_digits", "sum_helix", "sum_waves")]
    names += [f"patch/{name}" for name in result.series["patches"]]
    names += ["letters/r2/helix"]
    for site in ("block-0", "block-1"):
        more |= {f"{site}/{name}{end}": 0.25 for name in names for end in ("", "/low", "/high")}
        nulls = ("sum_digits", "sum_helix", "sum_digit_columns")
        more |= {f"{site}/{key}{null}{end}": 0.04 for null in nulls for key, end in (("null/", ""), ("null/", "/high"))}
        more |= {f"{site}/rank/{null}": 0.01 for null in nulls} | {f"{site}/letters/rank/periods": 0.9}
    filled = dataclasses.replace(result, numbers=result.numbers | more)
    said = " ".join(reading(filled))
    assert "digits of the sum explain 0.25 (0.25 to 0.25) (p 0.01 against digits dealt other values)" in said
    assert "as many random columns out of the sum's digits 0.04 (p 0.01)" in said
    assert "for letters by their place in the alphabet the helix has R2 0.25" in said
    assert "Patched after block 0" in said
    assert table(filled).rows[1][-2:] == ["0.25 (0.25 to 0.25)"] * 2
    assert sums(filled) is not None
    assert patches(filled) is not None
    assert sums(result) is None
