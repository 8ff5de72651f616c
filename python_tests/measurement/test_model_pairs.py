"""Two models' activations side by side: scales, tokens, and what reconstructions and errors say, on planted pairs."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from darkmatter_ext.activations.store import ActivationCache
from darkmatter_ext.measurement.model_pairs import (
    Errors,
    OwnSae,
    Trained,
    covered_numbers,
    dark_numbers,
    energy_numbers,
    latent_numbers,
)
from darkmatter_ext.measurement.paired_tokens import PairedTokens, usual_in_all
from darkmatter_ext.measurement.stored_tokens import StoredTokens
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT, SAE_TRAINING, UNUSED, LeftOut
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.crosscoder import LatentKinds, LatentSums
from darkmatter_ext.saes.encoders import Encoded

D, N = 6, 4000


def _normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _cache(folder, x):
    """Activations x [C, L, d] of contexts that are a document each."""
    folder.mkdir()
    content = {
        "activations": x.contiguous(), "norms": x.norm(dim=-1), "tokens": torch.zeros(x.shape[:2], dtype=torch.int64),
        "documents": torch.arange(len(x)),
    }  # fmt: skip
    save_file(content, folder / "shard_00000.safetensors")
    meta = {"d_in": x.shape[-1], "n_contexts": len(x), "context_length": x.shape[1]}
    (folder / "meta.json").write_text(json.dumps(meta))
    return ActivationCache(folder, meta)


@pytest.fixture
def pair(tmp_path):
    """The first model's tokens and the second's cache; one token of each has a norm that is not usual."""
    first, second = 3 + _normal(30, 8, D, seed=0), 100 - 20 * _normal(30, 8, D, seed=1)
    second[4, 5] *= 1000
    roles = torch.tensor([SAE_TRAINING, FIT, HELD_OUT]).repeat(10)[:, None].repeat(1, 8).to(torch.uint8)
    roles[:, 0] = UNUSED
    tokens = StoredTokens(_cache(tmp_path / "a", first), roles, LeftOut(), 1.0, 1.0, 0.0)
    return tokens, _cache(tmp_path / "b", second)


def test_tokens_unusual_in_one_model_are_left_out_of_both(pair):
    tokens, other = pair
    found = usual_in_all(tokens, [other], 10.0)
    assert (found.roles != tokens.roles).nonzero().tolist() == [[4, 5]]
    assert found.roles[4, 5] == UNUSED
    assert torch.equal(usual_in_all(tokens, [other], 0.0).roles, tokens.roles)


def test_each_half_has_variance_one_a_dimension_and_the_same_tokens(pair):
    tokens, other = pair
    paired = PairedTokens.of(usual_in_all(tokens, [other], 10.0), other)
    v = paired.with_role(SAE_TRAINING)
    for half in v.chunk(2, dim=1):
        assert half.double().var(0, correction=0).mean().item() == pytest.approx(1, rel=1e-5)
    assert paired.scales[1] == pytest.approx(20, rel=0.1)
    raw = paired.second.with_role(HELD_OUT)
    torch.testing.assert_close(paired.with_role(HELD_OUT)[:, D:], raw / paired.scales[1])
    stranger = PairedTokens.of(paired.first, other, permuted=0).with_role(HELD_OUT)
    assert torch.equal(stranger[:, :D], paired.with_role(HELD_OUT)[:, :D])
    assert not (stranger[:, D:] == paired.with_role(HELD_OUT)[:, D:]).all(1).any()
    torch.testing.assert_close(stranger[:, D:].sum(0), paired.with_role(HELD_OUT)[:, D:].sum(0))


def test_models_of_two_widths_give_one_line(pair, tmp_path):
    wider = _cache(tmp_path / "wide", _normal(30, 8, D + 1, seed=2))
    with pytest.raises(InputError, match="other: must have width 6 at the hook point, as the model, got 7"):
        PairedTokens.of(pair[0], wider)


def test_energies_are_of_each_half_and_of_the_difference():
    """Errors of known energy: FVU 0.04 and 0.09 of variance 1; the difference of the models is found but for both."""
    documents = torch.arange(N) // 100
    v = torch.cat([5 + _normal(N, D, seed=0), _normal(N, D, seed=1)], dim=1)
    noise = torch.cat([0.2 * _normal(N, D, seed=2), 0.3 * _normal(N, D, seed=3)], dim=1)
    numbers = energy_numbers(v, [v + noise, v - noise], (2.0, 1.0), documents, seed=0)
    assert numbers["fvu/A"] == pytest.approx(0.04, rel=0.05)
    assert numbers["fvu/B"] == pytest.approx(0.09, rel=0.05)
    # x_B - x_A has variance 1 + 4, its error 0.09 + 4 x 0.04
    assert numbers["change_explained"] == pytest.approx(1 - 0.25 / 5, abs=0.005)
    for name in ("fvu/A", "fvu/B", "change_explained"):
        assert numbers[f"{name}/low"] < numbers[name] < numbers[f"{name}/high"]
    same = torch.cat([v[:, :D], v[:, :D]], dim=1)
    assert math.isnan(energy_numbers(same, [same + noise], (1.0, 1.0), documents, seed=0)["change_explained"])


def _errors(linear, nonlinear, x):
    error = x @ linear + nonlinear
    half = len(x) // 2
    return Errors(x[:half], error[:half], x[half:], error[half:])


def test_dark_matter_that_is_shared_is_told_from_dark_matter_that_is_linear_in_both():
    """The nonlinear errors are the same up to a rotation and noise of half its size: 1 / 1.25. Independent ones: 0, though
    the whole errors share what is linear in the same x."""
    x, dark, own = _normal(N, D, seed=0), _normal(N, D, seed=1), _normal(N, D, seed=2)
    rotation = torch.linalg.qr(_normal(D, D, seed=3)).Q
    documents = torch.arange(N // 2) // 50
    first = _errors(0.5 * torch.eye(D), dark, x)
    shared = dark_numbers(first, _errors(rotation, dark @ rotation + 0.5 * own, x), documents, seed=0)
    assert shared["r2_nonlinear"] == pytest.approx(0.8, abs=0.02)
    assert shared["r2_nonlinear/low"] < 0.81
    assert shared["r2_nonlinear/high"] > 0.79
    apart = dark_numbers(_errors(3 * torch.eye(D), dark, x), _errors(3 * rotation, own, x), documents, seed=0)
    assert abs(apart["r2_nonlinear"]) < 0.02
    assert apart["r2_error"] > 0.7
    permuted = dark_numbers(first, _errors(rotation, own, x.roll(7, 0)), documents, seed=0)
    assert abs(permuted["r2_error"]) < 0.02


def _planted_sae(W_dec):
    """An "SAE" whose latents are the first coordinates of v, where they are above 0."""

    class _Sae(OwnSae):
        encode = property(lambda self: self._encode)
        W_dec = property(lambda self: rows)

    rows, n_latents = W_dec, len(W_dec)

    def encode(v):
        acts = SparseActs.from_dense(v[:, :n_latents].relu())
        return Encoded(acts.to_dense() @ rows, acts.l0(), acts)

    found = _Sae(None, None)
    object.__setattr__(found, "_encode", encode)
    return found


def test_counts_have_intervals_over_crosscoders_and_the_share_of_a_behaviour_is_of_the_latents_asked_about():
    rows = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0.0]])
    masks = {name: torch.tensor(mask) for name, mask in {
        "used": [True, True, True], "shared": [True, False, False], "first_by_norm": [False, False, True],
        "second_by_norm": [False, True, False], "first_by_scaling": [False, False, True],
        "second_by_scaling": [False, True, False],
    }.items()}  # fmt: skip
    own = Trained(_planted_sae(rows), LatentSums(rows), LatentKinds(**masks))
    none = masks | {"second_by_scaling": torch.zeros(3, dtype=torch.bool)}
    other = Trained(own.sae, LatentSums(rows), LatentKinds(**none))
    twin = own._replace(sums=LatentSums(rows))
    numbers = latent_numbers([own, twin])
    assert numbers["latents/b_only_by_nu"] == numbers["latents/b_only_by_nu/low"] == 1
    assert (numbers["latents/b_only_found_again"], numbers["shared/cosine"]) == (1, 1)
    assert numbers["rho/mean"] == pytest.approx(0.5)
    apart = latent_numbers([own, other])
    assert apart["latents/b_only_by_nu"] == 0.5
    assert math.isnan(latent_numbers([own])["latents/used/low"])

    v = torch.tensor([[1.0, 4, 0, 0], [1, 0, 0, 0], [9, 2, 0, 0], [0, 2, 1, 0]])
    covered, documents = torch.tensor([True, False, True, False]), torch.tensor([0, 0, 1, 1])
    share = covered_numbers(own, v, covered, documents, seed=0)
    assert share["behaviour/share_of_b_only"] == pytest.approx(6 / 8)
    assert share["behaviour/share_of_tokens"] == pytest.approx(0.5)
