"""darkmatter check-sae: says "same" where it is the same, notices what is not, and refuses what it cannot read."""

import dataclasses

import numpy as np
import pytest
import torch
from cases.saes import ARCHITECTURES, D_IN, activations, make_sae
from safetensors.torch import save_file

from darkmatter_ext.cli import main
from darkmatter_ext.saes import architectures
from darkmatter_ext.saes.check import check_sae

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.runs
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_sae_is_the_same_accelerated(architecture, dtype):
    sae = make_sae(architecture, dtype).requires_grad_(False)
    if "transcoder" in architecture:
        sae.use_error_term = False
    verdict = check_sae(sae, activations(30, dtype=dtype), n_tokens=40, rounds=1)
    assert verdict.passed, verdict.comparisons
    assert {row.data for row in verdict.comparisons} == {"random", "given"}
    assert verdict.stats.fast.keys() >= {"encode", "decode", "forward"}
    assert all(timing.plain_ms > 0 and timing.fast_ms > 0 for timing in verdict.timings)


def _scaled(acts):
    return dataclasses.replace(acts, values=acts.values * 1.001)


def _one_latent_wrong(acts):
    return dataclasses.replace(acts, stored_indices=(acts.stored_indices + 1) % acts.d_sae)


def _break(monkeypatch, name, fault):
    original = getattr(architectures, name)

    def encode(*arguments, **options):
        tried = original(*arguments, **options)
        return tried._replace(acts=fault(tried.acts))

    monkeypatch.setattr(architectures, name, encode)


@pytest.mark.parametrize("fault", [_scaled, _one_latent_wrong])
def test_a_wrong_answer_is_noticed(monkeypatch, fault):
    _break(monkeypatch, "try_topk_encode", fault)
    assert not check_sae(make_sae("topk").requires_grad_(False), n_tokens=20, rounds=1).passed


def test_the_command(tmp_path, capsys, monkeypatch):
    make_sae("jumprelu").save_model(tmp_path / "sae")
    np.save(tmp_path / "x.npy", activations(2, 9).numpy())
    save_file({"x": activations(4)}, tmp_path / "x.safetensors")
    torch.save(activations(4), tmp_path / "x.pt")
    common = ["check-sae", str(tmp_path / "sae"), "--tokens", "16", "--rounds", "1"]
    for name in ("x.npy", "x.safetensors", "x.pt"):
        assert main([*common, "--activations", str(tmp_path / name)]) == 0
    assert "same answer" in capsys.readouterr().out
    _break(monkeypatch, "try_threshold_encode", _scaled)
    assert main(common) == 1
    assert "DIFFERENT ANSWER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "must be a folder"),
        (["nowhere", "--sae-id", "x"], "must be an SAE that can be loaded, got nowhere:x (Release nowhere not found"),
        (["{sae}", "--tokens", "0"], "--tokens: must be at least 1, got 0"),
        (["{sae}", "--activations", "{sae}/cfg.json"], "--activations: must be a .safetensors, .npy or .pt tensor"),
        (["{sae}", "--activations", "{wrong}"], f"--activations: must be floating point of shape [..., {D_IN}]"),
        (["{own}"], "SAE: must be an SAE that can be accelerated"),
    ],
)
def test_bad_input_is_one_line(tmp_path, refused, arguments, message):
    places = {"sae": tmp_path / "sae", "wrong": tmp_path / "wrong.npy", "own": tmp_path / "own"}
    make_sae("topk").save_model(places["sae"])
    np.save(places["wrong"], np.zeros((3, D_IN + 1), dtype=np.float32))
    from sae_lens.registry import get_sae_class

    sae_class, cfg_class = get_sae_class("temporal")
    sae_class(cfg_class(d_in=D_IN, d_sae=128, n_heads=2)).save_model(places["own"])
    refused(["check-sae", *(argument.format(**places) for argument in arguments)], message)
