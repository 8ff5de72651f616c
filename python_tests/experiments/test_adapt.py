"""`adapt`: what is closed and repaired, on planted losses; and the command on a small model."""

import math

import pytest
import torch
from cases.models import flags

from darkmatter_ext.activations.splicing import TokenLosses
from darkmatter_ext.experiments.adapt import COMPARED_NULLS, CONTROLS, AdaptSettings, gap_numbers, repair_numbers
from darkmatter_ext.measurement.loss_sums import LossSums

N, DOCUMENTS = 600, torch.arange(600) // 30


def _sums(factors, original=None):
    """KL of every pass as a factor of one positive noise, CE beside it."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.5 + torch.rand(N, generator=generator)
    original = 2 + torch.rand(N, generator=generator) if original is None else original
    kl = {name: factor * noise for name, factor in factors.items()}
    return LossSums(TokenLosses(original, {n: original + k for n, k in kl.items()}, kl), DOCUMENTS, seed=0)


def test_the_gap_closed_is_a_share_of_the_sae_s_own_cost():
    sums = _sums({"sae": 0.8, "a/with": 0.2, "a/without": 0.1, "b/with": 0.4, "b/without": 0.1})
    one = gap_numbers(sums, "one", ["a"], "sae")
    assert one["one/ce_gap_closed"] == pytest.approx(75, abs=1e-3)
    assert one["one/kl_closed"] == pytest.approx(75, abs=1e-3)
    assert one["one/kl_without_sae"] == pytest.approx(one["one/kl"] / 2, rel=1e-4)
    assert one["one/ce_without_sae"] == pytest.approx(one["one/kl_without_sae"], rel=1e-3)
    both = gap_numbers(sums, "both", ["a", "b"], "sae")
    assert both["both/kl_closed"] == pytest.approx(62.5, abs=1e-3)  # the mean of the seeds
    assert both["b/kl_closed"] == pytest.approx(50, abs=1e-3)
    half = 12.706 * 25 / 2**0.5 / 2**0.5  # Student's t of two seeds
    assert both["both/kl_closed_over_seeds/high"] == pytest.approx(62.5 + half, abs=0.1)


def test_a_gap_that_may_be_none_is_not_a_number():
    generator = torch.Generator().manual_seed(1)
    original = 2 + torch.rand(N, generator=generator)
    noise = torch.randn(20, generator=generator)[DOCUMENTS]
    ce = {"sae": original + noise, "a/with": original + 0.1 * noise, "a/without": original}
    sums = LossSums(
        TokenLosses(original, ce, {name: (c - original).abs() for name, c in ce.items()}), DOCUMENTS, seed=0
    )
    numbers = gap_numbers(sums, "a", ["a"], "sae")
    assert math.isnan(numbers["a/ce_gap_closed"])
    assert numbers["a/kl_closed"] == pytest.approx(90, abs=0.1)


def test_no_sae_and_no_training_close_nothing():
    """The null: an adapter that does nothing."""
    sums = _sums({"sae": 0.8, "a/with": 0.8, "a/without": 0.0})
    numbers = gap_numbers(sums, "a", ["a"], "sae")
    assert numbers["a/kl_closed"] == pytest.approx(0, abs=1e-4)
    assert numbers["a/kl_without_sae"] == 0


def test_a_part_is_repaired_as_far_as_putting_it_back_wins_nothing_any_more():
    """Before: linear wins 0.6, nonlinear 0.4. After: linear 0.15, nonlinear 0.4, all nulls as they were."""
    factors = {"sae": 1.0, "linear": 0.4, "nonlinear": 0.6, "a/with": 0.5, "a/linear": 0.35, "a/nonlinear": 0.1}
    factors |= dict.fromkeys(COMPARED_NULLS, 0.5) | {f"a/{null}": 0.5 for null in COMPARED_NULLS}
    factors["a/random"] = 0.25
    numbers = repair_numbers(_sums(factors), "rank-4", "a")
    assert numbers["rank-4/linear/repaired"] == pytest.approx(75, abs=1e-3)
    assert numbers["rank-4/nonlinear/repaired"] == pytest.approx(0, abs=1e-3)
    assert numbers["rank-4/random/kl_closed"] == pytest.approx(50, abs=1e-3)
    assert numbers["rank-4/mixture/kl_closed"] == pytest.approx(0, abs=1e-3)
    assert numbers["mixture/kl_ratio"] == pytest.approx(2, abs=1e-3)
    assert numbers["rank-4/mixture/kl_ratio"] == pytest.approx(1, abs=1e-3)


def test_the_released_code_has_a_recipe_of_its_own():
    from darkmatter_ext.measurement.settings import replaced

    own = replaced(AdaptSettings(), parity="released-code").method
    assert (own.learning_rates, own.dropout, own.recipe.summed, own.recipe.loss_share) == ((5e-5,), 0.1, True, 1.0)
    assert AdaptSettings().method.recipe.loss_share == 0.25


def test_a_run_has_every_adapter_and_finds_them_again(finished, workplace):
    _, result, said = finished("adapt")
    numbers = result.numbers
    assert set(result.series["controls"]) == set(CONTROLS)
    for name in ("rank-1", "rank-4", *(f"controls/{name}" for name in CONTROLS)):
        for key in ("ce_gap_closed", "kl_closed", "kl", "kl_without_sae", "ce_without_sae"):
            assert {f"topk-24/{name}/{key}{end}" for end in ("", "/low", "/high")} <= set(numbers)
    assert "topk-24/rank-4/kl_closed_over_seeds/low" in numbers
    assert numbers["topk-24/controls/no-sae/kl_without_sae"] < numbers["topk-24/controls/next-token/kl_without_sae"]
    assert numbers["topk-24/learning_rate"] == min(
        (0.01, 0.03), key=lambda rate: numbers[f"topk-24/learning_rate/{rate:g}/kl"]
    )
    assert numbers["adapted_tokens"] == 512
    assert "closes" in said
    folder = workplace / "cache" / "adapters"
    saved = result.series["adapters"]["topk-24"]["rank-4/seed-1"]
    assert saved.startswith(str(folder))
    assert (folder / saved / "adapter_config.json").exists()


def test_bad_settings_give_one_line(workplace, tmp_path, refused):
    for more, message in (
        (("--ranks", "17"), "--ranks: must be from 1 to 8, the width of model.layers.2.self_attn.k_proj, got 17"),
        (("--ranks", "0"), "--ranks: must be numbers above 0, got [0]"),
        (("--adapt-seeds", "0"), "--adapt-seeds: must be at least 1, got 0"),
        (("--loss-share", "0"), "--loss-share: must be above 0 and at most 1, got 0"),
        (("--contexts", "1"), "--contexts: must be at least 2"),
        (("--hook", "blocks.2.hook_resid_post"), "--hook: must have a block after it to adapt, got block 2, the last"),
    ):
        refused(flags(workplace, "--out", str(tmp_path), *more, experiment="adapt"), message)


@pytest.mark.runs
def test_more_than_there_are_gives_one_line(finished, workplace, tmp_path, refused):
    finished("adapt")  # its SAEs and activations are found
    for more, message in (
        (("--adapt-tokens", "31"), "--adapt-tokens: must be at least a context of 32, got 31"),
        (("--adapt-tokens", "16000"), " fit contexts of 32 tokens, got 500"),
        (("--adapt-tokens", "512", "--choose-contexts", "4000"), "--choose-contexts: must be at most the"),
    ):
        own = ("--widths", "24", "--ranks", "1", "--out", str(tmp_path), *more)
        refused(flags(workplace, *own, experiment="adapt"), message)
