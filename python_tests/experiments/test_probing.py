"""`probing`: a label that a token carries, controls at chance, the command's numbers, bad input."""

import csv

import pytest
import torch
from cases.models import flags

from darkmatter_ext.activations.text_sites import text_sites
from darkmatter_ext.experiments.probing import ProbingSettings, kinds, probe, regime_numbers
from darkmatter_ext.measurement.probe_tasks import Task
from darkmatter_ext.measurement.settings import Saes

N, D, F = 320, 12, 30


def _planted(label_of, seed=0):
    """One task of N texts on features: x [N, D] of sparse codes z [N, F], the error pure noise."""
    generator = torch.Generator().manual_seed(seed)
    z = (torch.rand(N, F, generator=generator) < 0.3) * (1 + torch.rand(N, F, generator=generator))
    error = 0.3 * torch.randn(N, D, generator=generator)
    sae = z @ torch.randn(F, D, generator=generator)
    own = {"x": sae + error, "sae": sae, "latents": z, "error": error, "linear": 0 * error, "nonlinear": error}
    y = label_of(z, error, generator).long()
    task = Task("planted", tuple(map(str, range(N))), y, torch.arange(N) // 2, torch.full((N,), -1))
    return task, own


def _numbers(label_of, regimes=("normal",), **more):
    settings = ProbingSettings(
        saes=Saes(widths=(64,)), regimes=regimes, probe_ks=(1, 4), train_sizes=(8, 128), probe_seeds=2, **more
    )
    task, own = _planted(label_of)
    true, permuted = probe([task], [torch.arange(N)], own, settings)
    numbers = {}
    for regime in regimes:
        numbers |= regime_numbers(regime, true, permuted, seed=0)
    return numbers, true, permuted


@pytest.mark.runs
def test_a_label_of_one_latent_is_the_latents_gain():
    numbers, _, permuted = _numbers(lambda z, error, _: z[:, 7] > 0, ("normal", "scarcity"))
    assert numbers["normal/latents-1/auc"] > 0.99
    assert numbers["normal/x/auc"] < 0.95
    assert abs(numbers["normal/nonlinear/auc"] - 0.5) < 0.15
    assert numbers["normal/quiver_gain/sae"] > 0.03
    assert numbers["normal/quiver_gain/sae"] == pytest.approx(1 - numbers["normal/quiver/baseline"], abs=0.02)
    assert abs(numbers["normal/quiver_gain_null/sae"]) < 0.01
    assert numbers["scarcity/x/auc"] < numbers["normal/x/auc"]
    assert abs(permuted.test["normal"].mean() - 0.5) < 0.1
    assert numbers["normal/latents-1/win_rate"] == 1


@pytest.mark.runs
def test_a_label_of_the_error_is_the_dark_matters_gain():
    """x holds it under all latents; the error alone holds nothing else."""
    numbers, _, _ = _numbers(lambda z, error, _: error[:, 0] > 0)
    assert numbers["normal/nonlinear/auc"] > 0.95
    assert numbers["normal/x/auc"] < 0.85
    assert numbers["normal/quiver_gain/dark_matter"] > 0.1
    assert abs(numbers["normal/quiver_gain/sae"]) < 0.1
    assert numbers["normal/dark_matter_share"] != numbers["normal/dark_matter_share"]  # one task: no interval, no ratio


@pytest.mark.runs
def test_a_label_of_nothing_is_at_chance():
    numbers, true, _ = _numbers(lambda z, error, g: torch.rand(N, generator=g) < 0.5, ("normal", "noise"))
    assert abs(true.test["normal"].mean() - 0.5) < 0.08
    assert abs(numbers["normal/x/auc"] - 0.5) < 0.15


def test_all_kinds_are_there_where_their_features_are():
    assert [name for name, _ in kinds(["x", "latents"], (1, 4), seed=0)] == ["x", "x", "latents", "latents"]
    assert "frozen" in [name for name, _ in kinds(["x", "frozen"], (1, 4), seed=0)]


def test_texts_are_read_as_if_alone(workplace, tmp_path):
    """Padding changes nothing: each text's last state is that of the text by itself; the mean leaves the first out."""
    texts = ["the sparse code", "it", "a model explains most of what it represents but never all"]
    options = {"hooks": ["blocks.1.hook_resid_post"], "bos": True}
    hook, model = "blocks.1.hook_resid_post", str(workplace / "model")
    together = text_sites(model, texts=texts, **options)
    assert together.texts.tolist() == [0, 1, 2]
    for number, text in enumerate(texts):
        alone = text_sites(model, texts=[text], **options)
        torch.testing.assert_close(together.x[hook][number], alone.x[hook][0], rtol=1e-4, atol=1e-5)
        assert together.tokens[number] == alone.tokens[0]
    every = text_sites(model, texts=texts, pool="mean", first=2, **options)
    assert torch.bincount(every.texts).tolist() == [2, 1, 10]  # with BOS: 4, 2 and 12 tokens, the first two left out
    torch.testing.assert_close(every.x[hook][-1], together.x[hook][2])
    torch.testing.assert_close(every.pooled(every.x[hook])[0], every.x[hook][:2].mean(0))


def test_a_run_has_every_regime_and_control(finished):
    out, result, said = finished("probing")
    numbers, series = result.numbers, result.series
    assert series["regimes"] == ["normal", "scarcity", "imbalance", "noise", "shift"]
    assert series["tasks"] == {"has sparse": 80, "has model": 80}
    for name in (
        "x",
        "pca-4",
        "latents-1",
        "nonlinear",
        "random_latents-4",
        "random_directions-4",
        "frozen-4",
        "words",
    ):
        assert name in series["arrows"]
        low, value, high = (numbers[f"normal/{name}/auc{end}"] for end in ("/low", "", "/high"))
        assert 0 <= value <= 1
        assert low <= value <= high
    assert numbers["normal/x/auc"] > 0.95  # the last token tells
    # Two tasks that one direction tells: a probe of permuted labels is along it or against it, chance is their mean only.
    assert numbers["permuted/x/auc"] < numbers["normal/x/auc"] - 0.2
    assert numbers["noise/x/auc"] < numbers["normal/x/auc"]
    assert result.arrays["test/true/normal"].shape == (2, 1, len(series["arrows"]))
    assert "Logistic regression on x has a mean AUC of" in said
    assert {path.name for path in out.glob("*.png")} == {
        "probing_sizes.png", "probing_quivers.png", "probing_tasks.png",
    }  # fmt: skip


def test_bad_input_gives_one_line(workplace, tmp_path, refused):
    rows = list(csv.reader((workplace / "tasks.csv").open()))
    one_class = tmp_path / "one.csv"
    one_class.write_text("\n".join(",".join(row) for row in rows if row[1] != "1"))
    no_columns = tmp_path / "columns.csv"
    no_columns.write_text("text,label\na,1\n")
    few = tmp_path / "few.csv"
    few.write_text("prompt,target\n" + "\n".join(f"the code,{i % 2}" for i in range(12)))
    named = tmp_path / "noise.csv"
    named.write_text("\n".join(["prompt,target", *(f"the code {i},{i % 2}" for i in range(80))]))
    for more, message in (
        (("--tasks", str(named)), "--tasks: must not have the name of a regime, got 'noise'"),
        (("--tasks", str(one_class)), "--tasks: must have two values of target in every task, got 0 in 'has sparse'"),
        (("--tasks", str(no_columns)), "--tasks: must have rows with the columns prompt and target"),
        (("--tasks", str(few)), "--tasks: must have at least 8 rows of each label on both sides"),
        (("--regimes", "shift"), "--regimes: must have normal among them, got shift"),
        (("--probe-ks", "0"), "--probe-ks: must be at least 1, got 0"),
        (("--widths", "24", "48"), "--sae, --widths: must name one SAE, got 2"),
        (("--pool", "first"), "--pool: must be last or mean, got 'first'"),
    ):
        own = ["--widths", "24", *more] if "--widths" not in more else more
        refused(flags(workplace, *own, "--out", str(tmp_path / "no"), experiment="probing"), message)
