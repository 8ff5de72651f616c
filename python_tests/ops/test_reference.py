"""The twins themselves: answers by hand, and SAELens' own SAEs as a second opinion."""

import inspect
import math

import pytest
import torch

import darkmatter_ext as dm
from darkmatter_ext.ops import reference


def test_pre_activations_by_hand():
    h = reference.pre_activations(
        torch.tensor([[2.0, 1.0]]),
        torch.tensor([[1.0, 0.0], [1.0, 2.0]]),
        torch.tensor([0.5, 0.0]),
        b_dec=torch.ones(2),
    )
    assert h.tolist() == [[1.5, 0.0]]


def test_topk_by_hand():
    acts = reference.topk_encode(torch.ones(1, 1), torch.tensor([[1.0, 3.0, -1.0, 3.0]]), torch.zeros(4), 4)
    assert acts.indices.tolist() == [[1, 3, 0, 2]]
    assert acts.values.tolist() == [[3.0, 3.0, 1.0, 0.0]]


def test_topk_puts_nan_first():
    acts = reference.topk_encode(
        torch.tensor([[1.0, math.inf]]), torch.tensor([[5.0, 1.0], [1.0, 0.0]]), torch.zeros(2), 1
    )
    assert acts.indices.tolist() == [[1]]  # Inf * 0 is NaN, which is above Inf
    assert acts.values.isnan().all()


def test_threshold_by_hand():
    acts = reference.threshold_encode(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.5]]), torch.zeros(2), 1.0)
    assert acts.crow_indices.tolist() == [0, 0, 1]
    assert acts.col_indices.tolist() == [0]
    assert acts.values.tolist() == [2.0]


def test_decode_by_hand():
    acts = reference.topk_encode(torch.ones(1, 1), torch.tensor([[1.0, 3.0]]), torch.zeros(2), 2)
    x_hat = reference.sparse_decode(acts, torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([10.0, 20.0]))
    assert x_hat.tolist() == [[17.0, 23.0]]


@pytest.mark.parametrize("name", ["topk_encode", "threshold_encode", "sparse_decode"])
def test_every_public_op_has_a_twin_of_the_same_signature(name):
    ours = inspect.signature(getattr(dm, name)).parameters
    twin = inspect.signature(getattr(reference, name)).parameters
    shared = [p for p in twin if p != "gain"]  # ours is part of `prepared`
    assert [p for p in ours if p != "prepared"] == shared
    assert [ours[p].default for p in shared] == [twin[p].default for p in shared]


def sae_lens_sae(architecture):
    """A small SAELens SAE in float64, where its dense answer and the exact one agree to 1e-12."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    common = {"d_in": 12, "d_sae": 40, "dtype": "float64", "device": "cpu", "apply_b_dec_to_input": True}
    sae = TopKSAE(TopKSAEConfig(k=6, **common)) if architecture == "topk" else JumpReLUSAE(JumpReLUSAEConfig(**common))
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if architecture == "jumprelu":
        sae.threshold.data = sae.threshold.data.abs()
    return sae.requires_grad_(False)


@pytest.mark.parametrize("module", [reference, dm], ids=["twin", "op"])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_sae_lens_agrees(architecture, module):
    sae = sae_lens_sae(architecture)
    x = torch.randn(9, 3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if architecture == "topk":
        acts = module.topk_encode(x, sae.W_enc, sae.b_enc, 6, b_dec=sae.b_dec)
    else:
        acts = module.threshold_encode(x, sae.W_enc, sae.b_enc, sae.threshold, b_dec=sae.b_dec)
    torch.testing.assert_close(acts.to_dense(), sae.encode(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.sparse_decode(acts, sae.W_dec, sae.b_dec), sae(x), rtol=1e-11, atol=1e-11)
