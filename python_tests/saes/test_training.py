"""SAE training: recovers planted features, saves in SAELens' format, runs like SAELens' own SAE."""

import dataclasses
import json

import pytest
import torch

from darkmatter_ext.saes.encoders import as_encoder
from darkmatter_ext.saes.loading import load_sae
from darkmatter_ext.saes.training import TrainingConfig, save_sae, train_topk_sae

SMALL = TrainingConfig(d_sae=24, k=3, steps=400, batch_size=256, learning_rate=3e-3, dead_after_tokens=5000)


def _planted(n=8000, d=16, features=20, active=3, seed=0):
    """Sparse sums of unit directions, with a mean and a scale that training must cope with."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, d, generator=generator), dim=1)
    chosen = torch.rand(n, features, generator=generator).topk(active).indices
    codes = torch.zeros(n, features).scatter(1, chosen, 1 + torch.rand(n, active, generator=generator))
    return 30 * (codes @ directions) + 5, directions


@pytest.fixture(scope="module")
def trained():
    x, directions = _planted()
    return train_topk_sae(x, SMALL, metadata={"model_name": "planted"}), x, directions


def test_training_recovers_planted_directions(trained):
    (sae, report), x, directions = trained
    x_hat = sae(x)
    fvu = ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert fvu < 0.1
    similarity = (directions @ torch.nn.functional.normalize(sae.W_dec, dim=1).mT).max(1).values
    assert (similarity > 0.9).float().mean() > 0.75
    assert report["final_mse"] < 0.2
    assert 0 <= report["dead_share"] <= 1
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24), rtol=1e-5, atol=1e-5)


def test_training_is_seeded():
    x, _ = _planted(n=1000)
    short = dataclasses.replace(SMALL, steps=20)
    first = train_topk_sae(x, short)[0]
    with torch.no_grad():  # as experiments call it
        second = train_topk_sae(x, short)[0]
    other = train_topk_sae(x, dataclasses.replace(short, seed=1))[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.W_enc, other.W_enc)


def test_saelens_loads_what_is_saved_and_gives_the_same_output(trained, tmp_path):
    from sae_lens import SAE

    (sae, report), x, _ = trained
    save_sae(sae, tmp_path / "sae", report, SMALL)
    loaded = SAE.load_from_disk(tmp_path / "sae")
    assert loaded.cfg.architecture() == "topk"
    assert (loaded.cfg.k, loaded.cfg.d_sae, loaded.cfg.metadata.model_name) == (3, 24, "planted")
    ours = as_encoder(load_sae(tmp_path / "sae"))(x[:500])
    with torch.no_grad():
        torch.testing.assert_close(ours.x_hat, loaded(x[:500]), rtol=1e-4, atol=1e-3)
        assert torch.equal(ours.l0, (loaded.encode(x[:500]) != 0).sum(-1))
    assert json.loads((tmp_path / "sae" / "training.json").read_text())["report"] == report


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


def test_bad_sae_folders_are_named_in_one_line(trained, tmp_path):
    (sae, report), _, _ = trained
    good = tmp_path / "good"
    save_sae(sae, good, report, SMALL)

    def broken(name, edit):
        folder = tmp_path / name
        save_sae(sae, folder, report, SMALL)
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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TrainingConfig(d_sae=0), ValueError, "d_sae: must be at least 1, got 0"),
        (lambda: TrainingConfig(d_sae=8, k=9), ValueError, "k: must be from 1 to d_sae (8), got 9"),
        (lambda: TrainingConfig(d_sae=64, learning_rate=0), ValueError, "learning_rate: must be above 0, got 0"),
        (lambda: train_topk_sae(torch.randn(10, 4), SMALL), ValueError, "x: must hold at least one batch [256, d]"),
        (lambda: train_topk_sae(torch.ones(300, 4).int(), SMALL), TypeError, "x: must be a floating-point tensor"),
        (lambda: train_topk_sae(torch.ones(300, 4), SMALL), ValueError, "x: must be finite and vary"),
        (lambda: train_topk_sae(torch.full((300, 4), torch.nan), SMALL), ValueError, "x: must be finite and vary"),
    ],
)
def test_bad_settings_are_named_in_one_line(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
