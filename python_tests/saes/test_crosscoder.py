"""Crosscoders on two planted models: latents that both have, that one has alone, and that a shrunken decoder makes look so."""

import functools
import math
from typing import NamedTuple

import pytest
import torch

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.crosscoder import (
    LatentKinds,
    LatentSums,
    activation_of,
    found_again,
    half_cosine,
    halves,
    matched_latents,
    relative_norm,
    written,
)
from darkmatter_ext.saes.encoders import as_encoder
from darkmatter_ext.training.config import StreamConfig, TrainingConfig
from darkmatter_ext.training.train import train

D, N = 48, 12_000
SHARED, FIRST, SECOND, SHRUNKEN = (slice(0, 60), slice(60, 70), slice(70, 80), slice(80, 90))
LATENTS, ACTIVE, SHRINKING = 90, 4, 0.2
UNIQUE = 0.9


class Planted(NamedTuple):
    """Two models' activations v [N, 2 D], the latents z [N, LATENTS] behind them, and the true rows [LATENTS, 2 D]."""

    v: torch.Tensor
    z: torch.Tensor
    rows: torch.Tensor


@functools.cache
def planted(*, second_alone=True, rotated=False, seed=0):
    """Sparse latents with a direction in each model; of a shrunken one the first model has SHRINKING times the second's."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.nn.functional.normalize(torch.randn(LATENTS, D, generator=generator), dim=1)
    second = first.clone()
    first[SECOND], second[FIRST] = 0, 0
    first[SHRUNKEN] *= SHRINKING
    if rotated:
        second = second @ torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    z = (0.5 + torch.rand(N, LATENTS, generator=generator)) * (
        torch.rand(N, LATENTS, generator=generator) < ACTIVE / LATENTS
    )
    if not second_alone:
        z[:, SECOND] = 0
    rows = torch.cat([first, second], dim=1)
    v = z @ rows + 0.01 * torch.randn(N, 2 * D, generator=generator)
    return Planted(v, z, rows)


def _members(part):
    return torch.isin(torch.arange(LATENTS), torch.arange(LATENTS)[part])


def _kinds(data, W_dec):
    """Of a dictionary with the true latents, as a crosscoder that found them would have."""
    acts, sums = SparseActs.from_dense(data.z), LatentSums(W_dec)
    for part in range(0, N, 5000):
        own = SparseActs.from_dense(data.z[part : part + 5000])
        sums.update(own, data.v[part : part + 5000] - own.to_dense() @ W_dec)
    assert sums.count.tolist() == (data.z > 0).sum(0).tolist()
    assert acts.n_tokens == N
    return sums, LatentKinds.of(sums, unique=UNIQUE, least=10)


def test_latent_scaling_rejects_what_a_shrunken_decoder_makes_unique():
    """The smaller half of the shrunken family is set to 0: the relative norm calls it unique, the error knows better."""
    data = planted()
    W_dec = data.rows.clone()
    W_dec[SHRUNKEN, :D] = 0
    sums, kinds = _kinds(data, W_dec)
    assert torch.equal(kinds.second_by_norm, _members(SECOND) | _members(SHRUNKEN))
    assert torch.equal(kinds.second_by_scaling, _members(SECOND))
    assert torch.equal(kinds.first_by_scaling, _members(FIRST))
    nu = sums.scaling_ratio()
    torch.testing.assert_close(nu[SHRUNKEN], torch.full((10,), SHRINKING, dtype=nu.dtype), atol=0.03, rtol=0)
    torch.testing.assert_close(nu[SECOND], torch.zeros(10, dtype=nu.dtype), atol=0.03, rtol=0)
    torch.testing.assert_close(nu[SHARED], torch.ones(60, dtype=nu.dtype), atol=0.03, rtol=0)


def test_the_scaling_ratio_is_the_least_squares_it_says():
    """Against beta by its definition, latent by latent, from the error with the latent taken out of the reconstruction."""
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.randn(7, 10, generator=generator)
    z = torch.rand(200, 7, generator=generator) * (torch.rand(200, 7, generator=generator) < 0.4)
    v = torch.randn(200, 10, generator=generator) + z @ W_dec
    sums = LatentSums(W_dec)
    sums.update(SparseActs.from_dense(z), v - z @ W_dec)
    for latent, found in enumerate(sums.scaling_ratio()):
        without = (v - z @ W_dec + z[:, latent, None] * W_dec[latent]).double()
        rows = torch.stack(halves(W_dec[latent].double()))
        larger = int(rows[1].norm() > rows[0].norm())
        direction = rows[larger] / rows[larger].norm()
        along = (z[:, latent, None].double() * direction).flatten()[:, None]
        beta = [
            torch.linalg.lstsq(along, half.flatten()[:, None], driver="gelsd").solution.item()
            for half in halves(without)
        ]
        assert found.item() == pytest.approx(beta[1 - larger] / beta[larger], rel=1e-4)


@functools.cache
def _trained(seed=0, **how):
    data = planted(**how)
    config = TrainingConfig(
        d_sae=150, k=6, steps=500, batch_size=512, learning_rate=3e-3, dead_after_tokens=5000, seed=seed
    )
    sae = train(data.v, config, stream=StreamConfig(held_out_share=0)).sae
    encode = as_encoder(sae)
    sums = LatentSums(sae.W_dec.detach())
    found = encode(data.v)
    sums.update(found.acts, data.v - found.x_hat)
    # Noise and splits give a few latents that are hardly used: counted is what has a fifth of a planted one's tokens.
    kinds = LatentKinds.of(sums, unique=UNIQUE, least=N * ACTIVE // LATENTS // 5)
    return data, sums, kinds, data.v - found.x_hat


def _matches(rows, planted_rows):
    """For each row the planted one of the same direction, -1 for none."""
    unit = torch.nn.functional.normalize
    best = (unit(rows, dim=1) @ unit(planted_rows, dim=1).mT).max(1)
    return torch.where(best.values > 0.9, best.indices, -1)


@pytest.mark.slow
def test_a_trained_crosscoder_finds_the_latents_of_each_model_alone():
    """Recall and precision of both families by norm and scaling at least 0.9; a shrunken one is of neither."""
    data, sums, kinds, _ = _trained()
    which = _matches(sums.W_dec, data.rows)
    for chosen, family in ((kinds.second_by_scaling, SECOND), (kinds.first_by_scaling, FIRST)):
        wanted = set(range(LATENTS)[family])
        found = which[chosen].tolist()
        assert len(wanted & set(found)) >= 0.9 * len(wanted)
        assert sum(latent in wanted for latent in found) >= 0.9 * len(found)
    assert not set(which[kinds.second_by_norm].tolist()) & set(range(LATENTS)[SHRUNKEN])
    assert len(set(range(LATENTS)[SHARED]) & set(which[kinds.shared].tolist())) >= 0.9 * 60
    again = found_again(sums.W_dec[kinds.second_by_scaling], [_trained(seed=1)[1].W_dec])
    assert again >= 0.9


@pytest.mark.slow
def test_without_the_family_nothing_is_of_the_second_model_alone():
    _, _, kinds, _ = _trained(second_alone=False)
    assert int(kinds.second_by_scaling.sum()) == 0
    assert int(kinds.first_by_scaling.sum()) >= 9


@pytest.mark.slow
def test_a_rotated_second_model_shares_its_latents_at_any_cosine():
    """rho stays at 0.5 and the FVU is the same; the cosine is of the basis alone."""
    _, plain, kinds, error = _trained()
    data, sums, turned, rotated = _trained(rotated=True)
    assert abs(int(turned.shared.sum()) - int(kinds.shared.sum())) <= 6
    assert relative_norm(sums.W_dec)[turned.shared].mean().item() == pytest.approx(0.5, abs=0.01)
    assert half_cosine(plain.W_dec)[kinds.shared].mean() > 0.95
    assert half_cosine(sums.W_dec)[turned.shared].abs().mean() < 0.3
    total = data.v.square().sum()
    assert (rotated.square().sum() / total).item() == pytest.approx((error.square().sum() / total).item(), abs=0.01)


def test_norms_and_cosines_by_hand():
    rows = torch.tensor([[3.0, 4, 0, 0], [0, 0, 0, 2], [1, 0, 3, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
    assert relative_norm(rows)[:4].tolist() == [0, 1, 0.75, 0.5]
    assert math.isnan(relative_norm(rows)[4])
    assert half_cosine(rows).tolist() == [0, 0, 1, 0, 0]
    with pytest.raises(InputError, match="rows: must be of two halves of one width, got"):
        halves(torch.zeros(2, 3))


def test_what_latents_write_and_how_strong_they_are():
    z = torch.tensor([[1.0, 0, 2], [0, 3, 0], [0, 0, 0]])
    rows = torch.tensor([[1.0, 0], [0, 1], [2, 2]])
    chosen = torch.tensor([True, False, True])
    for acts in (SparseActs.from_dense(z), SparseActs.fixed(*z.topk(2), 3)):
        assert written(acts, rows, chosen).tolist() == [[5, 4], [0, 0], [0, 0]]
        assert activation_of(acts, chosen).tolist() == [3, 0, 0]


def test_latents_found_again_are_those_with_a_near_direction_in_the_other_set():
    rows = torch.eye(4)[:3]
    near = torch.tensor([[0.9, 0.1, 0, 0], [0, 0, 0.6, 0.8]])
    assert found_again(rows, [near, rows]) == pytest.approx((1 / 3 + 1) / 2)
    assert found_again(rows, [rows[:0]]) == 0
    assert math.isnan(found_again(rows[:0], [rows]))
    assert math.isnan(found_again(rows, []))


def test_matched_latents_are_near_and_none_is_taken_twice():
    features = torch.tensor([[0.0], [5], [0.1], [0.2], [5.1], [9]])
    found = matched_latents(torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5]), features, seed=0, among=1)
    assert found.tolist() == [2, 4]
    both = matched_latents(torch.tensor([0, 1]), torch.tensor([2]), features, seed=0)
    assert both.tolist() == [2]
    drawn = {
        tuple(matched_latents(torch.tensor([0]), torch.tensor([2, 3]), features, seed=s).tolist()) for s in range(9)
    }
    assert drawn == {(2,), (3,)}
