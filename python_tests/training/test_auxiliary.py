"""The auxiliary loss against autograd's of its definition in float64, in every form that it is computed in."""

import pytest
import torch

from darkmatter_ext.ops import reference
from darkmatter_ext.training.auxiliary import DENSE_BELOW, OfDead, _acts, _Dense, _Sparse, auxiliary_loss

FORMS = {  # dead latents, k, the form
    "one latent": (1, 1, _Dense),
    "all take part": (40, 40, _Dense),
    "fewer than asked for": (7, 40, _Dense),
    "most take part": (60, 40, _Dense),
    "the most that is dense": (3 * DENSE_BELOW, 3, _Dense),
    "few take part": (3 * DENSE_BELOW + 1, 3, _Sparse),
}


def _problem(n_dead, dtype, n=50, d=24):
    generator = torch.Generator().manual_seed(n_dead)

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return drawn(n, d), drawn(n, d), OfDead(drawn(n_dead, d), drawn(n_dead), drawn(n_dead, d))


def _defined(x, error, dead, k, weight, kind):
    """Loss, and gradients of `weight` times it, in float64. The encoder's choice is among scores rounded to their dtype."""
    wide = torch.float64 if kind is _Dense else x.dtype
    weights = (part.to(wide) for part in (dead.W_enc.mT, dead.b_enc))
    chosen = reference.topk_encode(x.to(wide), *weights, min(k, len(dead.b_enc))).indices
    dead = OfDead(*(part.double().requires_grad_() for part in dead))
    scores = x.double() @ dead.W_enc.mT + dead.b_enc
    acts = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen).relu())
    loss = (acts @ dead.W_dec - error.double()).square().mean() / error.double().var()
    return loss.detach(), OfDead(*torch.autograd.grad(weight * loss, dead))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_the_definitions(form, dtype, rtol):
    n_dead, k, kind = FORMS[form]
    x, error, dead = _problem(n_dead, dtype)
    error = error.to(torch.promote_types(dtype, torch.float32))  # losses are never of 16 bits
    assert isinstance(_acts(x, dead.W_enc, dead.b_enc, k), kind)
    loss, found = auxiliary_loss(x, error, dead, k, 0.25)
    expected, gradients = _defined(x, error, dead, k, 0.25, kind)
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
    for name, own, their in zip(OfDead._fields, found, gradients, strict=True):
        worst = (own.double() - their).abs().max() / their.abs().max()
        assert worst <= rtol, name


@pytest.mark.parametrize("scale", [1e-20, 0.1, 1e3])  # of what the dead latents reconstruct
@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_an_error_that_does_not_vary_has_no_loss(form, value, scale):
    n_dead, k, _ = FORMS[form]
    x, error, dead = _problem(n_dead, torch.float32)
    dead = dead._replace(W_dec=dead.W_dec * scale)
    loss, found = auxiliary_loss(x, torch.full_like(error, value), dead, k, 1.0)
    assert loss == 0
    assert all((part == 0).all() for part in found)
