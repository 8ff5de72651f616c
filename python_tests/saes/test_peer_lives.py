"""Accelerated objects of sparsify and dictionary_learning live through random edits beside their plain twins."""

import pytest
import torch
from cases import lives
from cases.life_answers import DifferenceError
from cases.peer_life_edits import EDITS
from cases.peer_lives import LifeError, assert_alike, live, replay
from cases.peers import KINDS, activations, pair, parts

import darkmatter_ext as dm
from darkmatter_ext.saes import drop_in_state, stepping_aside

pytestmark = pytest.mark.skipif(not lives.SCREENS, reason="no fast path on this processor")

N_EDITS = 15


@pytest.mark.runs
@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_once(kind):
    replay(kind, [(name, 5) for name in EDITS])


@pytest.mark.runs
@pytest.mark.parametrize("seed", range(12))
def test_some_lives(seed):
    live(seed, N_EDITS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_many_lives(seed):
    live(seed, N_EDITS)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_one_stale_latent_is_found(kind):
    plain, fast = pair(kind, f=256)
    x = activations(12)
    acts = assert_alike(plain, fast, x)
    parts(plain).W_enc[:, int((acts != 0).sum(0).argmax())] *= -1
    with pytest.raises(DifferenceError):
        assert_alike(plain, fast, x)


def test_stepping_aside_without_a_reason_fails(monkeypatch):
    for module in (drop_in_state, stepping_aside):
        monkeypatch.setattr(module, "does_not_pay", lambda tokens, undecided, weights: True)
    monkeypatch.setattr("cases.peer_lives.TOO_MANY", "another reason")
    with pytest.raises(LifeError, match="never fast"):
        replay("BatchTopKSAE", [])
    assert dm.is_accelerated(pair("SparseCoder")[1])
