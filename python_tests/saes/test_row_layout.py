"""accelerate(sae, save_memory=True): W_enc and its packed rows are one storage, and nobody who holds it is cut off."""

import copy

import pytest
import torch
from cases.saes import activations, assert_close, only_fast, pair
from sae_lens import SAE

import darkmatter_ext as dm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _packed_weight(sae):
    return sae._fast.encoder._state[1].weight


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated", "transcoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saving_memory_keeps_one_storage_and_everything_else(architecture, dtype, tmp_path):
    plain, fast = pair(architecture, dtype)
    dm.accelerate(fast, save_memory=True)
    x = activations(6, dtype=dtype)
    for sae in (plain, fast):
        sae(x).square().sum().backward()
    assert_close(plain.W_enc.grad, fast.W_enc.grad, scale=100)
    assert _packed_weight(fast).data_ptr() == fast.W_enc.data_ptr()
    assert not fast.W_enc.is_contiguous()
    copied = copy.deepcopy(fast)
    copied(x)
    assert _packed_weight(copied).data_ptr() == copied.W_enc.data_ptr() != fast.W_enc.data_ptr()
    for sae in (plain, fast):
        torch.optim.Adam(sae.parameters(), lr=1e-3).step()
        sae.zero_grad()
    with torch.no_grad():
        assert_close(plain(x), fast(x), scale=100)
        fast.save_model(tmp_path)
        loaded = SAE.load_from_disk(tmp_path)
        assert_close(loaded(x), fast(x), scale=100)
        assert torch.equal(loaded.W_enc, fast.W_enc)
        fast.load_state_dict(plain.state_dict())
        assert_close(plain(x), fast(x), scale=100)
        assert _packed_weight(fast).data_ptr() == fast.W_enc.data_ptr()
    assert dm.deaccelerate(fast).W_enc.is_contiguous()
    assert torch.equal(plain.W_enc, fast.W_enc)
    assert vars(fast).keys() == vars(plain).keys()


def test_a_storage_that_others_hold_keeps_its_layout():
    plain, fast = pair()
    dm.accelerate(fast, save_memory=True)
    x, view = activations(6), fast.W_enc.data[3]
    assert_close(plain(x), fast(x), scale=10)
    view.mul_(2)
    with torch.no_grad():
        plain.W_enc[3] *= 2
    assert_close(plain(x), fast(x), scale=10)
    assert fast.W_enc.is_contiguous()
    assert only_fast(fast)


# Who holds the storage


def _as_one_storage(architecture="jumprelu"):
    plain, fast = pair(architecture)
    for sae in (plain, fast):
        sae.requires_grad_(False)
    dm.accelerate(fast, save_memory=True)
    fast(activations(6))
    assert not fast.W_enc.is_contiguous()
    return plain, fast


def _edit_by_a_view(sae):
    return sae.W_enc.data[3]


def _edit_by_a_tied_parameter(sae):
    return torch.nn.Parameter(sae.W_enc.data.mT, requires_grad=False).data[:, 3]


def _edit_by_a_state_dict(sae):
    return sae.state_dict()["W_enc"][3]


@pytest.mark.parametrize("hold", [_edit_by_a_view, _edit_by_a_tied_parameter, _edit_by_a_state_dict])
@pytest.mark.parametrize("call", ["state_dict", "deaccelerate", "save_model"])
def test_who_holds_w_enc_still_reaches_it(hold, call, tmp_path):
    plain, fast = _as_one_storage()
    x, held = activations(6), [hold(sae) for sae in (plain, fast)]
    if call == "state_dict":
        fast.state_dict()
    elif call == "save_model":
        fast.save_model(tmp_path)
        assert torch.equal(SAE.load_from_disk(tmp_path).W_enc, plain.W_enc)
    else:
        dm.deaccelerate(fast)
    for view in held:
        view.mul_(3)
    assert torch.equal(plain.W_enc, fast.W_enc)
    assert_close(plain(x), fast(x), scale=10)


def test_checkpoints_between_steps_of_a_fused_optimiser():
    """Its averages have the layout W_enc had at its first step: a state_dict in between may not change that."""
    plain, fast = pair("jumprelu")
    dm.accelerate(fast, save_memory=True)
    x = activations(6)
    fast(x)
    steps = [torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True) for sae in (plain, fast)]
    for _ in range(4):
        for sae, optimiser in zip((plain, fast), steps, strict=True):
            optimiser.zero_grad()
            sae(x).square().sum().backward()
            sae.state_dict()
            optimiser.step()
            optimiser.zero_grad()
    assert_close(plain(x), fast(x), scale=1000)
    torch.testing.assert_close(plain.W_enc, fast.W_enc, rtol=0, atol=1e-3)
