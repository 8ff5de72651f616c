"""Discriminants, parallelograms and spectra: planted differences and eigenvalues, scikit-learn as the oracle."""

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import silhouette_score

from darkmatter_ext.estimators.discriminant import (
    discriminant_accuracy,
    discriminant_directions,
    parallelogram_quality,
    silhouette,
)
from darkmatter_ext.estimators.spectrum import (
    eigenvalues,
    galaxy_numbers,
    neighbour_entropy,
    participation_ratio,
    power_slope,
    power_slope_interval,
    same_covariance,
)


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _differences(noise, seed=0, k=6, n=20, d=80, shared=4):
    """Pairs of k relations: d_i = t_r + distractor in `shared` directions all relations share + small noise."""
    labels = torch.arange(k).repeat(n)
    t = torch.zeros(k, d)
    t[:, :40] = _normal(k, 40, seed=seed) / 40**0.5
    found = t[labels] + 0.01 * _normal(k * n, d, seed=seed + 1)
    found[:, 40 : 40 + shared] += noise * _normal(k * n, shared, seed=seed + 2)
    return found, labels


def test_quality_is_its_definition():
    d, labels = _normal(30, 5), torch.arange(30) % 3
    found = parallelogram_quality(d, labels)
    spread = (d - d.mean(0)).square().sum(1).mean()
    for relation in range(3):
        own = d[labels == relation]
        pairs = torch.cdist(own, own).square().sum() / (len(own) * (len(own) - 1))
        assert found[relation].item() == pytest.approx((pairs / (2 * spread)).item(), rel=1e-4)
    assert (
        parallelogram_quality(torch.ones(4, 2) * torch.tensor([[1.0], [1], [2], [2]]), torch.tensor([0, 0, 1, 1])).sum()
        == 0
    )


def test_discriminants_take_distractors_out_of_held_out_pairs():
    """Before: 4 noise^2 of (4 noise^2 + the relations' own variance); after: below 0.1."""
    noise = 1.0
    (fit, labels), (rest, _) = _differences(noise), _differences(noise, seed=0)
    fit, rest = fit[:60], rest[60:]
    before = parallelogram_quality(rest, labels[60:]).mean().item()
    assert before == pytest.approx(4 * noise**2 / (4 * noise**2 + 5 / 6), abs=0.12)
    after = parallelogram_quality(rest.double() @ discriminant_directions(fit, labels[:60]), labels[60:])
    assert after.mean() < 0.1


def test_labels_of_nothing_stay_at_one_on_held_out_pairs_though_they_part_the_fitted_ones():
    """More dimensions than pairs: in-sample discriminants part random labels, which is what is not to be believed."""
    x, labels = _normal(120, 300), torch.arange(120) % 6
    directions = discriminant_directions(x[:60], labels[:60])
    inside, outside = (parallelogram_quality(own.double() @ directions, labels[:60]) for own in (x[:60], x[60:]))
    assert inside.mean() < 0.3
    assert outside.mean().item() == pytest.approx(1, abs=0.1)
    assert silhouette(x[:60].double() @ directions, labels[:60]) > 0.3
    assert abs(silhouette(x[60:].double() @ directions, labels[60:])) < 0.1


def test_directions_are_scikit_learns_where_there_is_much_to_fit():
    x, labels = _normal(900, 6), torch.arange(900) % 3
    x[:, 0] += labels
    x[:, 1] -= 2 * (labels == 1)
    ours = x.double() @ discriminant_directions(x, labels)
    theirs = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.1).fit(x, labels).transform(x)
    both = torch.cat([ours, torch.tensor(theirs)], dim=1).T
    correlation = torch.corrcoef(both)[:2, 2:].abs()
    assert correlation.diagonal().min() > 0.98


def test_silhouette_is_scikit_learns():
    x, labels = _normal(50, 4), torch.arange(50) % 4
    x[:, 0] += 3 * (labels == 2)
    assert silhouette(x, labels) == pytest.approx(silhouette_score(x, labels), abs=1e-5)


def test_accuracy_is_balanced_held_out_and_at_chance_for_nothing():
    x, labels = _normal(600, 8), (torch.arange(600) % 10 == 0).long()  # one in ten
    x[:, 0] += 6 * labels
    train = torch.arange(600) < 400
    drawn = labels[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    found = discriminant_accuracy(x, torch.stack([labels, drawn]), train)
    assert found[0] > 0.97
    assert found[1].item() == pytest.approx(0.5, abs=0.12)


# ---- spectra


def _power(n, d, alpha, seed=0):
    return _normal(n, d, seed=seed).double() * torch.arange(1, d + 1) ** (-alpha / 2)


def test_the_planted_power_law_comes_back():
    values = torch.arange(1, 301, dtype=torch.float64) ** -0.5
    assert power_slope(values, first=10, last=150).item() == pytest.approx(0.5)
    rotation = torch.linalg.qr(_normal(200, 200)).Q.double()
    points = _power(12_000, 200, 0.5) @ rotation
    found = power_slope_interval(points, seed=0, first=10, last=150)
    assert found.value == pytest.approx(0.5, abs=0.02)
    assert found.value == pytest.approx(power_slope(eigenvalues(points), first=10, last=150).item(), abs=1e-6)
    assert found.low < found.value < found.high
    flat = power_slope(eigenvalues(_normal(12_000, 200))).item()
    assert 0 < flat < 0.12  # of a finite sample: not 0, so it stands beside every alpha


def test_directions_that_are_filled():
    assert participation_ratio(torch.ones(7)) == pytest.approx(7)
    assert participation_ratio(torch.tensor([1.0, 0, 0])) == 1


def test_entropy_is_a_gaussians_and_does_not_take_copies_for_clusters():
    """Of standard normal points in 3 dimensions: 3 / 2 log(2 pi e) = 4.257. Clusters have less than their Gaussian cloud."""
    assert neighbour_entropy(_normal(3000, 3), seed=0) == pytest.approx(4.257, abs=0.15)
    clustered = _normal(10, 8)[torch.arange(1000) % 10] + 0.05 * _normal(1000, 8, seed=1)
    assert galaxy_numbers(clustered, seed=0)["entropy_below_gaussian"] > 3
    assert abs(galaxy_numbers(_normal(1000, 8), seed=0)["entropy_below_gaussian"]) < 0.3
    cloud = same_covariance(clustered, seed=0)
    torch.testing.assert_close(torch.cov(cloud.T), torch.cov(clustered.T), atol=0.15, rtol=0.15)
