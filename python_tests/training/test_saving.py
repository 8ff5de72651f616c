"""What training saves: SAELens loads it and computes the same, sparsify's layout too, and says how it was trained."""

import json

import pytest
import torch
from cases.dense_training import planted

from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.encoders import as_encoder
from darkmatter_ext.saes.loading import load_sae
from darkmatter_ext.training.config import ARCHITECTURES, StreamConfig, TrainingConfig
from darkmatter_ext.training.train import train

pytestmark = pytest.mark.runs  # all read a training
OPTIONS = {"d_sae": 24, "k": 3, "steps": 400, "batch_size": 256, "learning_rate": 3e-3, "dead_after_tokens": 5000}
METADATA = {"model_name": "planted", "hook_name": "blocks.0.hook_resid_post", "prepend_bos": True, "context_size": 32}


@pytest.fixture(scope="module")
def x():
    return planted()[0]


@pytest.fixture(scope="module")
def trained(x):
    """An SAE of each architecture."""
    configs = [TrainingConfig(architecture=architecture, **OPTIONS) for architecture in ARCHITECTURES]
    return dict(zip(ARCHITECTURES, train(x, configs, metadata=METADATA), strict=True))


def _fvu(x, x_hat):
    return ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_explains_planted_features(trained, x, architecture):
    found = trained[architecture]
    assert found.report["held_out/fvu"] < 0.3
    assert found.report["train/fvu"] == pytest.approx(_fvu(x[:7600], found.sae(x[:7600])), rel=1e-4)
    assert found.report["held_out/fvu"] == pytest.approx(_fvu(x[7600:], found.sae(x[7600:])), rel=1e-4)
    assert found.report["held_out/l0"] == pytest.approx(3, rel=0.5)
    assert 0 <= found.report["dead_share"] <= 1
    torch.testing.assert_close(found.sae.W_dec.norm(dim=1), torch.ones(24), rtol=1e-5, atol=1e-5)


def test_topk_recovers_planted_directions(x):
    directions = planted()[1]
    found = train(x, TrainingConfig(**OPTIONS | {"steps": 1200}))
    similarity = (directions @ torch.nn.functional.normalize(found.sae.W_dec, dim=1).mT).max(1).values
    assert (similarity > 0.9).float().mean() > 0.75


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_loads_what_is_saved_and_computes_the_same(trained, x, architecture, tmp_path):
    from sae_lens import SAE

    found = trained[architecture]
    found.save(tmp_path / "sae")
    loaded = SAE.load_from_disk(tmp_path / "sae")
    assert loaded.cfg.architecture() == ("topk" if architecture == "topk" else "jumprelu")
    for name, value in (METADATA | {"training_architecture": architecture, "k": 3}).items():
        assert loaded.cfg.metadata[name] == value
    ours = as_encoder(load_sae(tmp_path / "sae"))(x[:500])
    with torch.no_grad():
        torch.testing.assert_close(ours.x_hat, loaded(x[:500]), rtol=1e-4, atol=1e-3)
        assert torch.equal(ours.l0, (loaded.encode(x[:500]) != 0).sum(-1))
    content = json.loads((tmp_path / "sae" / "training.json").read_text())
    assert content["report"] == found.report
    assert content["config"]["architecture"] == architecture
    assert [entry["step"] for entry in content["history"]] == list(range(50, 401, 50))


def test_sparsifys_layout_holds_the_same_sae(trained, x, tmp_path):
    folder = trained["topk"].save(tmp_path / "layers.0", layout="sparsify")
    assert {path.name for path in folder.iterdir()} == {"cfg.json", "sae.safetensors", "training.json"}
    loaded = load_sae(folder)
    assert loaded.cfg.k == 3
    torch.testing.assert_close(as_encoder(loaded)(x[:200]).x_hat, trained["topk"].sae(x[:200]), rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError, match="layout: must be saelens for a jumprelu SAE, got 'sparsify'"):
        trained["jumprelu"].save(tmp_path / "no", layout="sparsify")
    with pytest.raises(InputError, match="layout: must be saelens or sparsify, got 'npz'"):
        trained["topk"].save(tmp_path / "no", layout="npz")
    assert not (tmp_path / "no").exists()


def test_an_sae_of_zero_tokens_held_out_reports_the_training_text_alone(x):
    config = TrainingConfig(**OPTIONS | {"steps": 3})
    report = train(x, config, stream=StreamConfig(held_out_share=0, evaluation_tokens=300)).report
    assert report["train/tokens"] == 300
    assert "held_out/fvu" not in report
