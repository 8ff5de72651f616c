"""An accelerated matching pursuit SAE: SAELens' answer without its dense products; with gradients SAELens' own code."""

import pytest
import torch
from cases.saes import D_IN, activations, assert_close
from sae_lens.registry import get_sae_class

import darkmatter_ext as dm


def pair(dtype="float32", **options):
    sae_class, cfg_class = get_sae_class("matching_pursuit")
    made = []
    for _ in range(2):
        sae = sae_class(cfg_class(d_in=D_IN, d_sae=512, dtype=dtype, **({"max_iterations": 12} | options)))
        g = torch.Generator().manual_seed(3)
        sae.W_dec.data = torch.nn.functional.normalize(torch.randn(512, D_IN, generator=g), dim=1).to(sae.dtype)
        sae.b_dec.data = torch.randn(D_IN, generator=g).to(sae.dtype) * 0.1
        made.append(sae)
    return made[0], dm.accelerate(made[1])


OPTIONS = [
    {},
    {"apply_b_dec_to_input": False},
    {"residual_threshold": 3.0},
    {"residual_threshold": 0.0, "stop_on_duplicate_support": False},
    {"normalize_activations": "layer_norm"},
    {"dtype": "float64"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(20,), (2, 3), (0,)], ids=str)
def test_answers_are_those_of_saelens(options, shape):
    plain, fast = pair(**options)
    x = activations(*shape, dtype=plain.dtype)
    with torch.no_grad():
        assert_close(plain(x), fast(x), scale=10)
        theirs, ours = plain.encode(x), fast.encode(x)
        assert_close(theirs, ours, scale=10)
        assert_close(plain.decode(theirs), fast.decode(ours), scale=10)
    assert dm.stats(fast).fast == {"forward": 1, "encode": 1, "decode": 1}


def test_gradients_and_16_bits_are_saelens_own():
    plain, fast = pair()
    gradients = []
    for sae in (plain, fast):
        x = activations(4).requires_grad_()
        sae(x).square().sum().backward()
        gradients.append((x.grad, sae.W_dec.grad))
    torch.testing.assert_close(*gradients)
    assert "no fast gradient" in str(dm.stats(fast))
    plain, fast = pair("bfloat16")
    with torch.no_grad():
        assert torch.equal(plain.encode(activations(4)), fast.encode(activations(4)))


def test_an_edit_of_the_dictionary_is_noticed():
    plain, fast = pair()
    x = activations(9)
    with torch.no_grad():
        before = fast(x)
        for sae in (plain, fast):
            sae.W_dec.data[:, 1] *= -1
        assert_close(plain(x), fast(x), scale=10)
        assert not torch.allclose(before, fast(x))
