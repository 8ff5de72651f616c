"""Probes: scikit-learn as the oracle, planted labels with known AUCs, quivers with a known winner's curse."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from darkmatter_ext.estimators import probes
from darkmatter_ext.estimators.probe_scores import Scores, over_tasks, quiver_gains, sign_test
from darkmatter_ext.estimators.probes import (
    NEIGHBOURS,
    STEPS,
    Coordinates,
    arrows,
    auc,
    class_difference,
    dense,
    latents,
    logistic_l1,
    logistic_l2,
    neighbours,
    quiver,
    random_rank,
    validation_folds,
)
from darkmatter_ext.runtime.inputs import InputError


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _arrows(make, x, y, n_fit, labels=None):
    """Arrows fitted on the first rows and tested on the others."""
    fit_labels = (y[:n_fit, None] if labels is None else labels).long()
    folds = validation_folds(y[:n_fit], seed=0)
    return arrows(make, x[:n_fit], fit_labels, x[n_fit:], y[n_fit:], folds)


# ---- estimators against an oracle


def test_auc_is_scikit_learns_with_ties():
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(0, 5, (60, 3)), generator.integers(0, 2, 60)
    found = auc(torch.tensor(scores), torch.tensor(labels))
    assert found.tolist() == pytest.approx([roc_auc_score(labels, column) for column in scores.T])
    two = auc(torch.tensor(scores)[:, None].expand(-1, 2, -1), torch.tensor(labels)[:, None, None].expand(-1, 2, 1))
    assert two[1].tolist() == pytest.approx(found.tolist())
    assert auc(torch.ones(6), torch.tensor([0, 1, 0, 1, 1, 0])) == 0.5  # a constant is no error
    assert math.isnan(auc(torch.arange(3.0), torch.ones(3)))


@pytest.mark.parametrize("shape", [(60, 10), (30, 80)], ids=["many rows", "many features"])
def test_logistic_l2_is_scikit_learns(shape):
    x = _normal(*shape) * torch.linspace(0.1, 3, shape[1]) + 5
    labels = torch.stack([x[:, 0] + 0.3 * _normal(shape[0], seed=1) > 5, x[:, 1] > 5], dim=1).long()
    own = Coordinates.of(x)
    z, penalties = own(x), (1e-3, 0.1, 1.0)
    weight, bias = logistic_l2(z, labels, penalties, tolerance=1e-6)
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    for column in range(2):
        for number, penalty in enumerate(penalties):
            theirs = LogisticRegression(C=penalty, max_iter=5000, tol=1e-8).fit(standard, labels[:, column])
            ours = z @ weight[:, column, number] + bias[column, number]
            np.testing.assert_allclose(ours, theirs.decision_function(standard), atol=2e-3, rtol=2e-3)


def test_logistic_l1_is_scikit_learns():
    x = _normal(80, 12).abs()
    y = (x[:, 0] + 0.5 * x[:, 1] + 0.3 * _normal(80, seed=1) > 1.2).long()
    penalties = (0.05, 0.3, 2.0)
    weight, bias = logistic_l1(x[None], y[:, None], penalties, tolerance=1e-6)

    def objective(w, b, penalty):
        margin = (2 * y - 1) * (x.double() @ w + b)
        return (w.abs().sum() + penalty * torch.nn.functional.softplus(-margin).sum()).item()

    for number, penalty in enumerate(penalties):
        theirs = LogisticRegression(C=penalty, solver="saga", l1_ratio=1, max_iter=20_000, tol=1e-7).fit(x, y)
        own, w = weight[0, :, number].double(), torch.tensor(theirs.coef_[0]).double()
        assert objective(own, bias[0, number], penalty) <= objective(w, theirs.intercept_[0], penalty) + 1e-3
        assert ((own != 0) == (w.abs() > 1e-3)).all()
        np.testing.assert_allclose(own, w, atol=0.05)  # saga stops early in the intercept


@pytest.mark.runs
def test_tolerance_and_the_most_steps_change_no_auc(monkeypatch):
    x = _normal(200, 60) * torch.linspace(0.1, 3, 60)
    y = (x[:, 50] + 2 * _normal(200, seed=1) > 0).long()
    z = Coordinates.of(x[:100])(x)
    for fit, rows in ((logistic_l2, z[:100]), (logistic_l1, x[None, :100])):
        found = []
        for steps, options in ((STEPS, {}), (20_000, {"tolerance": 1e-6})):
            monkeypatch.setattr(probes, "STEPS", steps)
            weight, _ = fit(rows, y[:100, None], **options)
            weight = weight[:, 0] if fit is logistic_l2 else weight[0]
            found.append(auc((z if fit is logistic_l2 else x)[100:] @ weight, y[100:]))
        torch.testing.assert_close(*(own[:-1] for own in found), atol=0.01, rtol=0)
        torch.testing.assert_close(*(own[-1] for own in found), atol=0.05, rtol=0)  # the weakest penalty stops early


def test_fits_made_at_once_are_those_made_alone():
    """Of latents: rows that a fit does not have change neither its choice of latents nor its weights."""
    x = (_normal(90, 40) - 0.5).relu()
    labels = torch.stack([x[:, 3] + 0.2 * _normal(90, seed=1) > 0.1, x[:, 7] > 0.2], dim=1).long()
    rows = torch.ones(3, 90, dtype=torch.bool)
    rows[0, ::4], rows[1, 1::3] = False, False
    make = latents({"few": 2, "more": 12})
    for own, score in zip(rows, make(x, labels, rows), strict=True):
        (alone,) = make(x[own], labels[own], torch.ones(1, int(own.sum()), dtype=torch.bool))
        for name, scores in score(x).items():
            torch.testing.assert_close(scores, alone(x)[name], atol=0.02, rtol=0.03)  # C = 10 stops early


def test_coordinates_leave_out_what_does_not_vary():
    x = _normal(40, 6)
    x[:, 2], x[:, 3] = 4.0, x[:, 0]
    own = Coordinates.of(x)
    assert own.basis.shape == (6, 4)
    z = own(x)
    assert own(x + torch.tensor([0, 0, 9.0, 0, 0, 0])).equal(z)
    gram = z.double().mT @ z.double()
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-3, rtol=0)
    assert (gram.diagonal().diff() <= 0).all()


def test_neighbours_vote():
    x = torch.tensor([[0.0], [1], [2], [10], [11], [12]]).repeat(10, 1)
    y = (x[:, 0] > 5).long()
    every = torch.ones(1, len(x), dtype=torch.bool)
    scores = neighbours("near")(x, torch.stack([y, 1 - y], dim=1), every)[0](torch.tensor([[0.5], [11.5]]))["near"]
    assert scores.shape == (2, 2, len(NEIGHBOURS))
    assert scores[:, 0, 0].tolist() == [0, 1]
    assert scores[:, 1, 0].tolist() == [1, 0]


# ---- folds


@pytest.mark.parametrize(("n", "folds"), [(8, 4), (12, 6), (40, 4), (127, 4), (128, 1), (900, 1)])
def test_folds_hold_back_both_labels(n, folds):
    labels = (torch.arange(n) % 2).long()
    found = validation_folds(labels, seed=3)
    assert len(found) == folds
    rows = torch.cat(found)
    assert len(rows.unique()) == len(rows)
    if folds > 1:
        assert len(rows) == n
    else:
        assert len(rows) == pytest.approx(min(0.2 * n, 100), abs=1)
    for fold in found:
        assert set(labels[fold].tolist()) == {0, 1}
    with pytest.raises(InputError, match="labels: must be of both classes, got 4 of 4 positive"):
        validation_folds(torch.ones(4), seed=0)


# ---- planted truths


def _sparse(n, f=40, active=0.3, seed=0):
    """z [n, F]: sparse nonnegative codes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, f, generator=generator) < active) * (0.5 + torch.rand(n, f, generator=generator))


def test_the_latent_a_label_is_made_of_is_chosen():
    z = _sparse(1200)
    y = (z[:, 7] > 0).long()
    make = latents({"latents-1": 1, "latents-4": 4})
    assert class_difference(z[:400], y[:400, None])[:, 0].argmax() == 7
    found = _arrows(make, z, y, 400)
    assert found["latents-1"].test.item() == 1
    assert found["latents-1"].validation.item() == 1
    control = _arrows(latents({"random": 1}, rank=random_rank(1)), z, y, 400)["random"]
    assert abs(control.test.item() - 0.5) < 0.06


def test_rare_latents_count_as_much_as_frequent_ones_of_the_same_value_ratio():
    """Division by the mean active value: a tenfold unit changes no choice."""
    z = _sparse(500)
    y = (z[:, 7] > 0).long()[:, None]
    scaled = z * torch.logspace(-2, 2, 40)
    torch.testing.assert_close(class_difference(z, y), class_difference(scaled, y), rtol=1e-4, atol=1e-6)
    z[:, 3] = 0
    assert class_difference(z, y)[3] == 0  # silent


def test_a_dense_direction_is_seen_by_k_latents_as_far_as_the_theory_says():
    """y = sign of a sum of m equal Gaussians, k of them read: the score correlates by rho = sqrt(k / m) with the sum, and
    AUC = E Phi(rho (|T1| + |T2|) / sqrt(2 (1 - rho^2)))."""
    m, k, n = 24, 6, 7000
    z = _normal(n, m, seed=1) + 8  # always active
    y = (z.sum(1) > 8 * m).long()
    rho = math.sqrt(k / m)

    a = torch.linspace(0, 6, 400, dtype=torch.float64)
    density = torch.exp(-a.square() / 2)
    won = torch.special.ndtr(rho * (a[:, None] + a) / math.sqrt(2 * (1 - rho**2)))
    expected = (density @ won @ density / density.sum() ** 2).item()
    few = _arrows(latents({"k": k}), z, y, 1500)["k"].test.item()
    every = _arrows(dense("x"), z, y, 1500)["x"].test.item()
    assert few == pytest.approx(expected, abs=0.02)
    assert expected < 0.75
    assert every > 0.99


def test_principal_components_see_what_they_hold():
    """The label is in the second of three directions of unequal variance; scaling is undone by equal columns' mixing."""
    rotation = torch.linalg.qr(_normal(30, 30, seed=2)).Q
    x = (_normal(900, 30) * torch.tensor([9.0, 5.0] + [0.1] * 28)) @ rotation
    y = (x @ rotation.mT[:, 1] > 0).long()
    found = _arrows(dense("x", {"pca-1": 1, "pca-4": 4}), x, y, 400)
    assert found["x"].test.item() > 0.98
    assert found["pca-4"].test.item() > 0.95
    assert found["pca-1"].test.item() < 0.9


def test_wrong_labels():
    """Half of the labels wrong: nothing is left to find, on average over draws, for no kind of probe. None wrong: all of it."""
    n, n_fit, count = 900, 300, 16
    x = _sparse(n, 20)
    y = (x[:, 0] > 0).long()
    wrong = torch.rand(n_fit, count, generator=torch.Generator().manual_seed(5)) < 0.5
    wrong[:, 0] = False
    labels = torch.where(wrong, 1 - y[:n_fit, None], y[:n_fit, None])
    for make in (dense("x"), latents({"x": 4}), neighbours("x")):
        found = _arrows(make, x, y, n_fit, labels)["x"].test
        assert found[0] > 0.75
        assert abs(found[1:].mean() - 0.5) < 3 * found[1:].std() / (count - 1) ** 0.5


def test_label_vectors_do_not_know_of_each_other():
    x = _normal(500, 12)
    y = (x[:, 0] > 0).long()
    other = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    both = torch.stack([y, other], dim=1)[:300]
    for make in (dense("x"), latents({"x": 3}), neighbours("x")):
        together, alone = _arrows(make, x, y, 300, both)["x"], _arrows(make, x, y, 300)["x"]
        assert together.test[0].item() == pytest.approx(alone.test[0].item(), abs=1e-3)
        assert abs(together.test[1].item() - 0.5) < 0.15


# ---- quivers


def test_a_quiver_takes_the_best_validated_arrow():
    validation = torch.tensor([[0.6, 0.9, 0.7], [0.8, 0.8, 0.1]])
    test = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    assert quiver(validation, test).tolist() == pytest.approx([0.2, 0.4])  # of equal ones the first


def _planted_scores(true_auc, noise, splits=4000, seed=0):
    """Arrows of known AUC, whose validation AUC is that with noise."""
    test = torch.tensor(true_auc, dtype=torch.float64).expand(2, splits, -1)
    validation = test + noise * torch.randn(test.shape, generator=torch.Generator().manual_seed(seed)).double()
    return Scores([str(i) for i in range(len(true_auc))], {"normal": validation}, {"normal": test})


def test_twenty_null_arrows_lower_a_quiver_by_the_winners_curse():
    """Baseline at 0.6, twenty at 0.5, validation noise 0.1: the chance c that the best of twenty beats it is an integral,
    and the gain is -0.1 c."""
    noise, n = 0.1, 20

    def beaten(v):
        return stats.norm.pdf(v) * (1 - stats.norm.cdf(v + (0.6 - 0.5) / noise) ** n)

    expected = -0.1 * integrate.quad(beaten, -8, 8)[0]
    true = _planted_scores([0.6, *[0.5] * n], noise)
    gains = quiver_gains(
        ["normal"], true, _planted_scores([0.6, *[0.5] * n], noise, seed=1), [0], list(range(1, n + 1))
    )
    assert expected < -0.05
    assert gains["gain"].mean().item() == pytest.approx(expected, abs=0.003)
    assert gains["null"].mean().item() == pytest.approx(expected, abs=0.003)
    assert gains["baseline"].tolist() == pytest.approx([0.6, 0.6])


def test_arrows_that_know_more_gain_beyond_their_null():
    true = _planted_scores([0.7, 0.9, 0.6], 0.02)
    null = _planted_scores([0.7, 0.5, 0.5], 0.02, seed=1)
    gains = quiver_gains(["normal"], true, null, [0], [1, 2])
    assert gains["gain"].tolist() == pytest.approx([0.2, 0.2], abs=1e-3)
    assert gains["null"].tolist() == pytest.approx([0, 0], abs=1e-3)


def test_sign_test_and_interval_over_tasks():
    difference = torch.tensor([0.1] * 9 + [-0.1, 0.0, math.nan])
    assert sign_test(difference) == {"win_rate": 0.9, "win_p": pytest.approx(stats.binomtest(9, 10).pvalue)}
    assert math.isnan(sign_test(torch.zeros(3))["win_p"])
    own = over_tasks(torch.tensor([0.5, 0.7, 0.9, math.nan], dtype=torch.float64), seed=0)
    assert own.value == pytest.approx(0.7)
    assert own.low < 0.7 < own.high
