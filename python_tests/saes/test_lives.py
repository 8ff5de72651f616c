"""Accelerated SAEs live through random edits beside their plain twins: see cases.lives and cases.life_edits."""

import copy

import pytest
import torch
from cases.life_answers import DifferenceError, same_acts
from cases.life_edits import Draw
from cases.lives import ARCHITECTURES, Config, is_hard_to_screen, live, replay

import darkmatter_ext as dm
from darkmatter_ext.saes import drop_in_state, stepping_aside

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

N_EDITS = 25

# The shortest lives that have failed once.
INFERENCE = [("deepcopy_in_inference_mode", 231805), ("dtype_there_and_back", 324086)]
TAKEN_OUT = [("dimension_then_latent", 39400), ("dimension_then_latent", 813331)]
TIED = [("tied", 262657), ("one_element", 831972)]
UNCOUNTED = [("deepcopy_in_inference_mode", 1), ("new_parameter", 14674), ("hidden_element", 923693)]
PURSUIT = {"max_iterations": 4}
SHORT_LIVES = [
    *((architecture, {}, [(edit, 5)]) for architecture in ARCHITECTURES for edit in ("deepcopy", "shallow_copy")),
    ("topk", {"k": 8, "rescale_acts_by_decoder_norm": True}, [("data_rows", 835463)]),
    ("matching_pursuit", PURSUIT | {"normalize_activations": "constant_norm_rescale"}, [("latents_zeroed", 1)] * 4),
    ("matching_pursuit", PURSUIT | {"reshape_activations": "hook_z"}, [("new_parameter", 367384), ("k", 830452)]),
    ("jumprelu_transcoder", {"reshape_activations": "hook_z"}, [("data_rows", 1)]),
    ("jumprelu", {"apply_b_dec_to_input": False}, INFERENCE),
    ("skip_transcoder", {"dtype": "float16", "d_out": 48}, TAKEN_OUT),
    ("jumprelu", {"dtype": "float16"}, [("decoder_not_finite", 1)]),
    ("gated", {"dtype": "bfloat16", "apply_b_dec_to_input": False}, TIED),
    ("jumprelu_transcoder", {"normalize_activations": "constant_norm_rescale", "d_out": 48}, UNCOUNTED),
]


def _config(architecture, options):
    options = {"apply_b_dec_to_input": "transcoder" not in architecture} | options
    return Config(architecture, 32, 256, ({"k": 8} if "topk" in architecture else {}) | options)


@pytest.mark.runs
@pytest.mark.parametrize(("architecture", "options", "edits"), SHORT_LIVES)
def test_short_lives(architecture, options, edits):
    replay(_config(architecture, options), edits)


@torch.no_grad()
@pytest.mark.parametrize("stale", ["row", "element", "threshold"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated", "jumprelu_transcoder"])
def test_one_stale_latent_of_all_is_found(architecture, dtype, stale):
    sae = _config(architecture, {"dtype": dtype}).build()
    x = Draw(1).normal(12, 32).to(sae.dtype)
    theirs = sae.encode(x)
    sae_in, latent = sae.process_sae_in(x), int((theirs != 0).sum(0).argmax())
    same_acts(sae, sae_in, theirs, dm.accelerate(copy.deepcopy(sae)).encode(x))
    edited = copy.deepcopy(sae)
    if stale == "row":
        edited.W_enc[:, latent] = Draw(2).fresh(sae, "W_enc")[:, latent]
    elif stale == "element":
        edited.W_enc[7, latent] += 0.5
    else:
        _silence(edited, latent)
    with pytest.raises(DifferenceError):
        same_acts(edited, sae_in, edited.encode(x), dm.accelerate(sae).encode(x))


def _silence(sae, latent):
    name = "threshold" if "threshold" in sae._parameters else "b_gate" if "b_gate" in sae._parameters else "b_enc"
    getattr(sae, name)[latent] = 10 if name == "threshold" else -10


def test_stepping_aside_without_a_reason_fails(monkeypatch):
    for module in (drop_in_state, stepping_aside):
        monkeypatch.setattr(module, "does_not_pay", lambda tokens, undecided, weights: True)
    with pytest.raises(DifferenceError, match="never fast"):
        replay(_config("jumprelu", {}), [])


def test_what_is_hard_to_screen():
    x = Draw(1).normal(12, 32)
    for architecture in ("topk", "jumprelu", "gated", "standard"):
        sae = _config(architecture, {}).build()
        assert not is_hard_to_screen(sae, x)
        sae.W_enc.data = sae.W_enc.data[:, :1] + 1e-4 * sae.W_enc.data
        sae.W_enc.data *= 10.0  # the active share is one half, or 8 of 256 that are almost equal
        assert is_hard_to_screen(sae, x)
    sae.W_enc.data[:], sae.b_enc.data[:] = sae.W_enc.data[:, :1].clone(), 0.1
    assert not is_hard_to_screen(sae, x)  # equal latents are one


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_some_lives(seed):
    live(seed, N_EDITS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 500))
def test_many_lives(seed):
    live(seed, N_EDITS)
