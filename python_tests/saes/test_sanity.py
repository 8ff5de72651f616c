"""Misloaded SAEs are noticed, right ones are not: planted faults on planted features, and what a run and check-sae say."""

import numpy as np
import pytest
import torch
from sae_lens.registry import get_sae_class

from darkmatter_ext.cli import main
from darkmatter_ext.saes.loading import describe_sae, load_sae
from darkmatter_ext.saes.sanity import signs

D, F, K = 64, 128, 4


def atoms(n=F):
    return torch.nn.functional.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(0)), dim=1)


def planted(n=400, *, mean=0.0, scale=1.0, n_atoms=F):
    """x [n, d]: K of the atoms a token, strengths 1 to 2, about a mean of this norm, all times scale."""
    g = torch.Generator().manual_seed(1)
    chosen = torch.rand(n, n_atoms, generator=g).topk(K).indices
    codes = torch.zeros(n, n_atoms).scatter(1, chosen, 1 + torch.rand(n, K, generator=g))
    return scale * (codes @ atoms(n_atoms) + mean * _direction())


def _direction():
    return torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(2)), dim=0)


def right_sae(architecture, *, mean=0.0, scale=1.0, dtype="float32", centred=True, n_atoms=F, **metadata):
    """The SAE whose latents are the atoms, for `planted` of the same mean and scale.

    Without `centred` its encoder bias takes the mean away instead of b_dec.
    """
    sae_class, cfg_class = get_sae_class(architecture)
    more = {"k": K} if architecture == "topk" else {}
    cfg = cfg_class(d_in=D, d_sae=n_atoms, apply_b_dec_to_input=centred, dtype="float32", **more)
    sae = sae_class(cfg).requires_grad_(False)
    own, b_dec = atoms(n_atoms), mean * _direction()
    sae.W_enc.copy_(own.T)
    sae.W_dec.copy_(own)
    sae.b_dec.copy_(b_dec)
    shift = torch.zeros(n_atoms) if centred else -own @ b_dec
    if architecture == "gated":
        sae.b_gate.copy_(shift - 0.85)
        sae.b_mag.copy_(shift)
        sae.r_mag.zero_()
    else:
        sae.b_enc.copy_(shift - (0.85 if architecture == "standard" else 0))
    if architecture == "jumprelu":
        sae.threshold.fill_(0.85)
    if architecture == "standard":
        sae.W_dec.mul_(1.8)  # what the bias takes away
    if scale != 1:
        sae.fold_activation_norm_scaling_factor(1 / scale)
    for key, value in metadata.items():
        sae.cfg.metadata[key] = value
    return sae.to(getattr(torch, dtype)).eval()


RIGHT = {
    f"{architecture}, {name}": (architecture, options)
    for architecture in ("topk", "jumprelu", "standard", "gated")
    for name, options in {
        "plain": {},
        "mean": {"mean": 3.0},
        "scale": {"scale": 40.0, "mean": 1.0},
        "bfloat16": {"dtype": "bfloat16"},
        "bias": {"mean": 3.0, "centred": False, "normalize_decoder": True},
    }.items()
}


@pytest.mark.parametrize("name", RIGHT)
def test_an_sae_that_works_raises_no_alarm(name):
    architecture, options = RIGHT[name]
    x = planted(**{key: options[key] for key in ("mean", "scale") if key in options})
    sae = right_sae(architecture, **options)
    assert signs(sae, x, expected_l0=K) == []
    assert signs(sae) == []


def test_there_are_twenty_of_them():
    assert len(RIGHT) == 20


def _topk_as_relu():
    sae = right_sae("standard")
    sae.b_enc.zero_()
    return sae, planted()


def _without_thresholds():
    sae = right_sae("jumprelu")
    sae.threshold.zero_()
    return sae, planted()


def _log_thresholds():
    sae = right_sae("jumprelu")
    sae.threshold.log_()
    return sae, planted()


def _scaling_left_out():
    return right_sae("jumprelu", mean=1.0), planted(mean=1.0, scale=40)


def _scaling_twice():
    sae = right_sae("jumprelu", scale=40)
    sae.fold_activation_norm_scaling_factor(1 / 40)
    return sae, planted(scale=40)


def _factor_never_folded():
    sae = right_sae("topk")
    sae.cfg.normalize_activations = "expected_average_only_in"
    return sae, planted()


def _decoder_reordered():
    sae = right_sae("topk")
    sae.W_dec.copy_(sae.W_dec[torch.randperm(F, generator=torch.Generator().manual_seed(3))])
    return sae, planted()


def _decoder_transposed():
    sae = right_sae("topk", n_atoms=D)
    sae.W_dec.copy_(sae.W_dec.T.clone())
    return sae, planted(n_atoms=D)


def _b_dec_subtracted():
    sae = right_sae("jumprelu", mean=20.0, centred=False)
    sae.cfg.apply_b_dec_to_input = True
    return sae, planted(mean=20.0)


def _norms_folded_twice():
    sae = right_sae("topk", normalize_decoder=True)
    sae.W_dec.mul_(torch.linspace(0.5, 2, F)[:, None])
    return sae, planted()


def _wrong_k():
    sae = right_sae("topk")
    sae.activation_fn.k = sae.cfg.k = 10 * K
    return sae, planted()


def _bits_of_another_type():
    sae = right_sae("topk")
    sae.W_dec.copy_(sae.W_dec.bfloat16().view(torch.float16).float())
    return sae, planted()


FAULTS = {
    "TopK read as ReLU": (_topk_as_relu, "k or thresholds lost"),
    "thresholds lost": (_without_thresholds, "every threshold is 0"),
    "logarithms of thresholds": (_log_thresholds, "logarithms read as thresholds"),
    "scaling left out": (_scaling_left_out, "scaled too large"),
    "scaling applied twice": (_scaling_twice, "scaled too small"),
    "factor never folded": (_factor_never_folded, "must have its activation scaling folded in"),
    "decoder of another order": (_decoder_reordered, "decoder transposed, reordered"),
    "decoder transposed": (_decoder_transposed, "decoder transposed, reordered"),
    "b_dec subtracted": (_b_dec_subtracted, "b_dec not subtracted from the input"),
    "norms folded twice": (_norms_folded_twice, "norms folded once too often"),
    "k of another SAE": (_wrong_k, "L0 40 where it was made with 4"),
    "bits of another type": (_bits_of_another_type, "worse than the mean"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_misloaded_sae_is_told_with_its_cause(name):
    make, cause = FAULTS[name]
    sae, x = make()
    found = signs(sae, x, expected_l0=K)
    assert any(cause in sign for sign in found), found
    assert all("\n" not in sign for sign in found)


def test_a_scale_that_would_explain_it_is_named():
    (sign, *_) = signs(right_sae("topk", mean=3.0), planted(mean=3.0, scale=1 / 32))
    assert "activations times 32 (scaling left out, or applied twice) would leave" in sign


def test_constant_activations_are_told():
    assert "FVU cannot be told" in signs(right_sae("topk"), torch.ones(20, D))[0]


def test_infinite_weights_are_refused(tmp_path):
    sae = right_sae("topk")
    sae.W_dec[3, 5] = torch.inf  # float16 that was too small
    sae.save_model(tmp_path / "sae")
    with pytest.raises(ValueError, match=r"sae: weights must be finite, got infinity in W_dec"):
        load_sae(tmp_path / "sae")


def test_check_sae_says_so(tmp_path, capsys):
    """The id in the folder's name says the L0; the answer of both sides is the same and wrong."""
    sae, x = _topk_as_relu()
    sae.save_model(tmp_path / "average_l0_4")
    np.save(tmp_path / "x.npy", x.numpy())
    command = ["check-sae", str(tmp_path / "average_l0_4"), "--tokens", "32", "--rounds", "1"]
    assert main([*command, "--activations", str(tmp_path / "x.npy")]) == 0
    out = capsys.readouterr().out
    assert "looks misloaded: L0" in out
    assert "where it was made with 4" in out
    assert main(command) == 0
    assert "looks misloaded" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("average_l0_71", 71), ("l0_12.5", 12.5), ("layer_20", None), ("l0_medium", None), ("trainer_l0-40", 40)],
)
def test_the_l0_of_an_id(tmp_path, folder, expected):
    right_sae("jumprelu").save_model(tmp_path / folder)
    assert describe_sae(str(tmp_path / folder)).expected_l0 == expected
