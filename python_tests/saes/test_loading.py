"""Loading SAEs and using them: every architecture gives SAELens' own answer, a bad folder one line."""

import pytest
import torch

from darkmatter_ext.saes.encoders import as_encoder
from darkmatter_ext.saes.loading import load_sae


def _sae_of(kind, **options):
    from sae_lens.registry import get_sae_class

    torch.manual_seed(1)
    sae_class, cfg_class = get_sae_class(kind)
    sae = sae_class(cfg_class(d_in=12, d_sae=40, dtype="float32", device="cpu", **options))
    for name, parameter in sae.named_parameters():
        scale = 0.3 if name == "threshold" else 1.0
        parameter.data = scale * torch.randn_like(parameter) / (12**0.5 if parameter.ndim == 2 else 2)
    return sae.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("topk", {"k": 2}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),  # with negative thresholds too: relu comes first
        ("standard", {"normalize_activations": "layer_norm"}),
        ("gated", {}),
        ("matching_pursuit", {"residual_threshold": 0.5}),
    ],
)
def test_every_architecture_gives_saelens_own_answer(kind, options):
    sae, plain = _sae_of(kind, **options), _sae_of(kind, **options)
    x = 2 * torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) + 1
    ours = as_encoder(sae)(x)
    acts = plain.encode(x)
    torch.testing.assert_close(ours.x_hat, plain.decode(acts), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.l0, (acts != 0).sum(-1))


def test_bad_sae_folders_are_named_in_one_line(tmp_path):
    sae, good = _sae_of("topk", k=5), tmp_path / "good"
    sae.save_model(good)

    def broken(name, edit):
        folder = tmp_path / name
        sae.save_model(folder)
        edit(folder)
        return folder

    weights = "sae_weights.safetensors"
    nan = _sae_of("topk", k=5)
    nan.W_enc.data[0, 0] = float("nan")
    cases = [
        (tmp_path / "absent", "no such folder"),
        (broken("no_weights", lambda f: (f / weights).unlink()), f"without {weights}"),
        (broken("no_config", lambda f: (f / "cfg.json").unlink()), "without cfg.json"),
        (broken("truncated", lambda f: (f / weights).write_bytes((good / weights).read_bytes()[:500])), "complete SAE"),
        (broken("not_json", lambda f: (f / "cfg.json").write_text("{")), "complete SAE"),
        (broken("nan", nan.save_model), "NaN in W_enc"),
    ]
    for folder, message in cases:
        with pytest.raises(ValueError, match="sae") as caught:
            load_sae(folder)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
