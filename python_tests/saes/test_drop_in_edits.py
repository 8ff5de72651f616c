"""accelerate where weights change: every edit is noticed, but those that the documentation names."""

import numpy as np
import pytest
import torch
from cases.saes import D_IN, activations, assert_close, both_looks, only_fast, pair  # noqa: F401  (a fixture)

import darkmatter_ext as dm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _row(sae):
    sae.W_enc.data[3] *= 3


def _column(sae):
    sae.W_enc.data[:, 100] += 1


def _all(sae):
    sae.W_enc.data *= 0.9


def _numpy(sae):
    sae.W_enc.detach().numpy()[:] *= np.float32(0.9)


def _one_bias(sae):
    sae.b_enc.data[7] += 30


def _decoder_row(sae):
    sae.W_dec.data[:, 2] = 5.0


def _new_parameter(sae):
    sae.W_enc = torch.nn.Parameter(sae.W_enc.detach() * 0.9)


def _new_data(sae):
    sae.W_enc.data = sae.W_enc.data * 0.9


def _version(sae):
    with torch.no_grad():
        sae.W_enc[5, 17] += 4.0  # one element, but its version tells


def _optimiser(sae):
    sae(activations(8)).square().sum().backward()
    torch.optim.SGD(sae.parameters(), lr=1e-3).step()
    sae.zero_grad()


def _dtype(sae):
    sae.to(torch.float64)


def _load(sae):
    sae.load_state_dict({name: value * 0.9 for name, value in sae.state_dict().items()})


def _norm(sae):
    sae.fold_W_dec_norm()


def _scale(sae):
    sae.fold_activation_norm_scaling_factor(0.8)


def _whitening(sae):
    sae.fold_activation_whitening(torch.ones(D_IN) * 0.01, torch.eye(D_IN) * 0.8, torch.eye(D_IN) / 0.8)


EDITS = [_row, _column, _all, _numpy, _one_bias, _decoder_row, _new_parameter, _new_data, _version, _optimiser, _dtype]
EDITS += [_load, _norm, _scale, _whitening]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_an_edit_of_the_weights_is_noticed(edit, strided):
    plain, fast = pair("jumprelu")
    if strided:
        for sae in (plain, fast):
            for name in ("W_enc", "W_dec"):
                setattr(sae, name, torch.nn.Parameter(getattr(sae, name).detach().mT.contiguous().mT))
    x = activations(20)
    before = fast(x).detach().double(), fast.encode(x).detach().double()
    for sae in (plain, fast):
        edit(sae)
    after = fast(x), fast.encode(x)
    assert_close(plain(x), after[0], scale=100)
    assert_close(plain.encode(x), after[1], scale=100)
    changed = any(
        not torch.allclose(old, new.detach().double(), atol=1e-4) for old, new in zip(before, after, strict=True)
    )
    assert changed or edit is _dtype, "the edit changes nothing: the test is empty"
    assert only_fast(fast)


def test_what_is_not_noticed_and_refresh():
    plain, fast = pair("jumprelu")
    x = activations(20)
    fast(x)
    for sae in (plain, fast):
        sae.W_enc.data[5, 17] += 50.0  # a single element off the diagonals, through .data: nothing tells
    fast(x)  # the old answer, or one of old and new weights where they are read in place
    assert dm.refresh(fast) is fast
    assert_close(plain(x), fast(x), scale=100)


def test_threshold_and_bias_need_no_packing():
    plain, fast = pair("jumprelu")
    x = activations(20)
    fast(x)
    for sae in (plain, fast):
        sae.threshold.data[:] = 2.4
        sae.b_dec.data += 0.5
    assert_close(plain(x), fast(x), scale=10)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "threshold", "W_dec"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(name, value):
    plain, fast = pair("jumprelu")
    x = activations(4)
    for sae in (plain, fast):
        getattr(sae, name).data.view(-1)[3] = value
    torch.testing.assert_close(plain(x), fast(x), equal_nan=True)
    torch.testing.assert_close(plain.encode(x), fast.encode(x), equal_nan=True)


def test_weights_that_change_at_every_call_are_not_packed_at_every_call():
    plain, fast = pair()
    x = activations(4)
    for _ in range(8):
        with torch.no_grad():
            for sae in (plain, fast):
                sae.W_enc.mul_(0.99)
        assert_close(plain(x), fast(x), scale=10)
    assert "change at every call" in str(dm.stats(fast))
    before = dm.stats(fast).fast["forward"]
    assert_close(plain(x), fast(x), scale=10)
    assert dm.stats(fast).fast["forward"] == before + 1
