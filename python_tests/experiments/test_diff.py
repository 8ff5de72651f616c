"""`diff`: the command on a small model, its variants and controls; bad input in one line."""

import math

import pytest
from cases.models import flags, save_model, word_tokenizer
from cases.runs import SETTINGS

from darkmatter_ext.experiments.diff import CONTROLS, PAIRS


def test_a_run_has_every_pair_and_every_control(finished):
    out, result, said = finished("diff")
    assert list(result.series["pairs"]) == ["tuned", *CONTROLS]
    numbers = result.numbers
    for name in result.series["pairs"]:
        for key in ("fvu/A", "fvu/B", "dark/r2_error", "dark/r2_nonlinear"):
            low, value, high = (numbers[f"{name}/{key}{end}"] for end in ("/low", "", "/high"))
            assert low <= value <= high
        assert 0 < numbers[f"{name}/latents/used"] <= 24
        assert len(result.arrays[f"{name}/rho"]) == 24
        assert sum(result.series["rho"][name]) == pytest.approx(numbers[f"{name}/latents/used"])
        assert PAIRS[name] in said or name == "tuned"
    assert {path.name for path in out.iterdir()} == {
        "diff.json", "diff.npz", "diff_norms.png", "diff_scaling.png", "diff_effects.png", "report.html",
    }  # fmt: skip


@pytest.mark.slow
def test_a_model_against_itself_is_one_model(finished):
    """Nothing changed, so nothing of it is explained; both halves have one scale."""
    numbers = finished("diff").result.numbers
    assert numbers["same/scale/A"] == numbers["same/scale/B"]
    assert math.isnan(numbers["same/change_explained"])
    assert numbers["tuned/scale/A"] == numbers["same/scale/A"]
    assert numbers["tuned/scale/B"] != numbers["same/scale/A"]


def test_at_other_tokens_nothing_of_the_models_error_is_known(finished):
    numbers = finished("diff").result.numbers
    assert numbers["permuted/dark/r2_nonlinear"] < numbers["same/dark/r2_nonlinear"] - 0.3
    assert math.isnan(numbers["permuted/latents/used/low"])  # one crosscoder: no interval


def test_effects_and_behaviour_are_of_whole_contexts(finished):
    result = finished("diff").result
    numbers = result.numbers
    assert numbers["tuned/spliced_contexts"] == 6
    assert len(result.arrays["context"]) == 6 * (32 - 8 - 1)
    for state in ("b", "a", "ablated/b_only", "ablated/random", "added/b_only", "added/random"):
        assert 0 <= numbers[f"tuned/behaviour/{state}"] <= 1
    assert numbers["tuned/causal/remove/b_only/0/kl"] >= 0
    assert 0 < numbers["tuned/behaviour/share_of_tokens"] < 0.5


def _other(workplace, tmp_path, *more):
    own = [*SETTINGS["diff"], "--controls", "same", "--out", str(tmp_path / "out"), *more]
    return flags(workplace, *own, experiment="diff")


@pytest.mark.slow
def test_another_model_is_compared_on_the_text_as_it_is(workplace, tmp_path, capsys):
    from darkmatter_ext import cli
    from darkmatter_ext.report.result import load_result

    save_model(tmp_path / "other")
    assert cli.main(_other(workplace, tmp_path, "--other", str(tmp_path / "other"))) == 0
    result = load_result(tmp_path / "out" / "diff.json")
    assert list(result.series["pairs"]) == ["other", "same"]
    assert result.numbers["other/fvu/A"] == pytest.approx(result.numbers["same/fvu/A"], rel=0.2)
    assert not [name for name in result.numbers if "behaviour" in name]
    capsys.readouterr()


def test_bad_input_gives_one_line(workplace, tmp_path, refused):
    changed = word_tokenizer()
    changed.add_tokens(["dark"])
    save_model(tmp_path / "words")
    changed.save_pretrained(tmp_path / "words")
    cases = [
        (["--other", str(tmp_path / "words")], "--other: must have the tokenizer of"),
        (["--unique", "0.3"], "--unique: must be from 0.6 to below 1, got 0.3"),
        (["--controls", "twin"], "--controls: must be one of requantised, same, permuted, got 'twin'"),
        (["--bits", "9"], "--bits: must be from 1 to 8, got 9"),
        (["--widths", "24", "48"], "must name one kind of SAE, got 2"),
        (["--contexts", "1"], "--contexts: must be at least 2"),
        (["--phrase", ""], "--phrase: must be tokens of their own behind the marker"),
        (["--spacing", "1"], "--spacing: must be at least 2, got 1"),
        (["--sae", str(tmp_path)], "--sae: must be left out, crosscoders are trained here"),
        (["--hook", "blocks.1.hook_mlp_out"], "--hook: must be a hook_resid_post"),
    ]
    for more, message in cases:
        refused(_other(workplace, tmp_path, *more), message)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
