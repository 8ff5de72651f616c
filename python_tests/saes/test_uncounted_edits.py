"""Edits of an accelerated SAE's weights that torch does not count for the tensor that was packed."""

import contextlib
import copy

import pytest
import torch
from cases.saes import activations, both_looks, make_sae  # noqa: F401  (a fixture)

import darkmatter_ext as dm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LATENT, DIMENSION = 17, 5  # of an element off those that are compared
OPTIONS = {"topk": {"rescale_acts_by_decoder_norm": True}, "jumprelu": {}}


@pytest.mark.parametrize("edited", ["W_enc", "W_dec"])
@pytest.mark.parametrize("moved", ["W_enc", "W_dec"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", OPTIONS)
def test_an_edit_of_a_tied_weight_is_noticed(architecture, dtype, moved, edited):
    """One storage, two parameters: torch counts an edit for the parameter alone that it was made through."""
    sae = dm.accelerate(make_sae(architecture, dtype, **OPTIONS[architecture]))
    getattr(sae, moved).data = getattr(sae, "W_dec" if moved == "W_enc" else "W_enc").data.T
    x = activations(40, dtype=dtype)
    before = sae(x)
    sae.decode(sae.encode(x))
    with torch.no_grad():
        getattr(sae, edited)[(DIMENSION, LATENT) if edited == "W_enc" else (LATENT, DIMENSION)] += 8.0
    anew = dm.accelerate(copy.deepcopy(sae))
    acts = anew.encode(x)
    assert torch.equal(acts, sae.encode(x))
    assert torch.equal(anew.decode(acts), sae.decode(acts))
    assert torch.equal(anew(x), sae(x))
    assert bool(acts[:, LATENT].any()), "the edit changes nothing: the test is empty"
    assert not torch.equal(before, sae(x)), "the edit changes nothing: the test is empty"
    assert not dm.stats(sae).fallback


def _data_made(architecture):
    """Parameters that keep their count of edits, and count none."""
    with torch.inference_mode(False):
        sae = make_sae(architecture)
    for parameter in sae.parameters():
        parameter.data = parameter.data * 1
    return sae


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("build", [make_sae, _data_made])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated"])
def test_weights_made_in_inference_mode_go_to_saelens(architecture, build, mode):
    """Of these torch counts no edits. Outside inference mode it makes them, and then raises."""
    with torch.inference_mode():
        plain, sae = build(architecture), dm.accelerate(build(architecture))
    x = activations(40)
    with mode():
        sae(x), sae.encode(x)
        for each in (plain, sae):
            with contextlib.nullcontext() if mode is torch.inference_mode else pytest.raises(RuntimeError):
                each.W_enc[DIMENSION, LATENT] += 8.0
        assert bool(plain.encode(x)[:, LATENT].any()), "the edit changes nothing: the test is empty"
        assert torch.equal(plain.encode(x), sae.encode(x))
        assert torch.equal(plain(x), sae(x))
    assert not dm.stats(sae).fast
    reasons = [reason for each in dm.stats(sae).fallback.values() for reason in each]
    assert all("inference mode" in reason for reason in reasons)
