"""`geometry`: planted atoms, and the command on a small model."""

import pytest
import torch
from cases.models import flags

from darkmatter_ext.experiments.geometry import atom_numbers
from darkmatter_ext.measurement.word_pairs import read_pairs


def test_parallel_pairs_in_a_distractor_are_found_and_shuffled_relations_are_not():
    """d = t_r + distractor: discriminants take it out of pairs they have not seen; of shuffled relations they do not."""
    pairs = read_pairs()
    generator = torch.Generator().manual_seed(0)
    t = torch.zeros(12, 100)
    t[:, :50] = torch.randn(12, 50, generator=generator) / 50**0.5
    differences = t[pairs.labels] + 0.02 * torch.randn(240, 100, generator=generator)
    differences[:, 50:54] += torch.randn(240, 4, generator=generator)
    numbers = atom_numbers(differences, pairs, seed=0)
    assert numbers["atoms/quality/before"] > 0.7
    assert numbers["atoms/quality/after"] < 0.1
    assert numbers["atoms/quality/after/low"] <= numbers["atoms/quality/after"] <= numbers["atoms/quality/after/high"]
    assert numbers["atoms/quality/shuffled"] > 0.3  # what dividing by the variance alone takes out of the distractor
    assert numbers["atoms/silhouette/after"] > numbers["atoms/silhouette/before"] + 0.3
    nothing = atom_numbers(torch.randn(240, 100, generator=generator), pairs, seed=0)
    for key in ("before", "after", "shuffled"):
        assert nothing[f"atoms/quality/{key}"] == pytest.approx(1, abs=0.06)


def test_a_run_has_every_scale_and_null(finished):
    out, result, said = finished("geometry")
    assert [sae["hook"] for sae in result.series["saes"]] == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    numbers = result.numbers
    for sae in result.series["saes"]:
        name = sae["name"]
        assert 0 < numbers[f"{name}/latents_used"] <= 24
        for measure in ("phi", "jaccard", "dice", "overlap", "simple"):
            assert -1 <= numbers[f"{name}/ami/{measure}/2"] <= 1
        for null in ("permuted", "frequency", "gaussian"):
            assert f"{name}/ami_null/{null}/4/sd" in numbers
        assert numbers[f"{name}/alpha/low"] <= numbers[f"{name}/alpha"] <= numbers[f"{name}/alpha/high"]
        assert 0 < numbers[f"{name}/dark/largest_lobe"] <= 1 + 1e-9
        assert -1 <= numbers[f"{name}/ami_random_directions/4"] <= 1
    assert numbers["blocks.1.hook_resid_post/the/quality/before"] >= 0
    assert "AMI" in said
    assert {path.name for path in out.glob("*.png")} == {
        f"geometry_{name}.png" for name in ("lobes", "agreement", "spectrum", "parallelograms")
    }


def test_bad_input_gives_one_line(workplace, tmp_path, refused):
    empty = tmp_path / "empty.csv"
    empty.write_text("relation,a,b\n")
    for more, message in (
        (("--pairs", str(empty)), "--pairs: must have rows with the columns relation, a and b, got no pairs"),
        (("--clusters", "1"), "--clusters: must be at least 2, got 1"),
        (("--measures", "dice"), "--measures: must have phi among them, got dice"),
        (("--measures", "phi", "x"), "--measures: must be one of phi, jaccard"),
        (("--chunk", "1"), "--chunk: must be at least 2, got 1"),
    ):
        refused(flags(workplace, *more, "--out", str(tmp_path / "no"), experiment="geometry"), message)
