"""KL and loss at the page's tokens, against plain transformers with plain SAELens code in a forward hook."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from cases.models import save_model
from transformers import AutoModelForCausalLM

from darkmatter_ext.measurement import spliced_text
from darkmatter_ext.measurement.exploration import explored
from darkmatter_ext.measurement.run import measured, prepare
from darkmatter_ext.measurement.settings import Settings, replaced
from darkmatter_ext.runtime.progress import Stages

pytestmark = pytest.mark.runs
STAGES = Stages(show=False)
LAYER, LENGTH = 1, 32


def _settings(workplace, **more):
    return replaced(
        Settings(), model=str(workplace / "model"), text=str(workplace / "text.txt"), context_length=LENGTH, tokens=16000,
        **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(workplace, tmp_path_factory):
    """Of SAEs that are trained here, activations stored; and of one of them, streamed, read before the next block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARKMATTER_CACHE", str(workplace / "cache"))
        inputs = prepare(
            _settings(workplace, hook=f"blocks.{LAYER}.hook_resid_post", widths=(24, 48), k=4, steps=30), STAGES
        )
        folder = shutil.copytree(inputs.saes[0].folder, tmp_path_factory.mktemp("next") / "sae")
        config = json.loads((folder / "cfg.json").read_text())
        config["metadata"]["hook_name"] = f"blocks.{LAYER + 1}.hook_resid_pre"  # the same place by its other name
        (folder / "cfg.json").write_text(json.dumps(config))
        streamed = prepare(_settings(workplace, sae=(str(folder),), page_kl_tokens=4 * LENGTH), STAGES)
        return {
            "stored": (inputs, measured(inputs, STAGES)),
            "streamed": (streamed, measured(streamed, STAGES)),
        }


def _plain(model, sae, tokens, replaced_at):
    """[C, L] loss of the model, and KL with the SAE's output in the place of the block's, in float64."""
    network = AutoModelForCausalLM.from_pretrained(model).eval()

    def splice(_module, _inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        x_hat = type(sae).decode(sae, type(sae).encode(sae, x.to(sae.dtype))).to(x.dtype)
        changed = torch.where(replaced_at[:, :, None], x_hat, x)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with torch.no_grad():
        log_p = network(tokens).logits.double().log_softmax(-1)
        handle = network.model.layers[LAYER].register_forward_hook(splice)
        log_q = network(tokens).logits.double().log_softmax(-1)
        handle.remove()
    loss = torch.full(tokens.shape, torch.nan, dtype=torch.float64)
    loss[:, :-1] = -log_p[:, :-1].gather(2, tokens[:, 1:, None])[:, :, 0]
    return loss, (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("name", ["stored", "streamed"])
def test_kl_and_loss_are_those_of_plain_transformers(runs, workplace, name):
    inputs, found = runs[name]
    about, arrays = explored(inputs, found, STAGES)
    contexts = arrays["page/contexts"].tolist()
    tokens = inputs.source.read(contexts).tokens
    measured_at = torch.from_numpy(np.isfinite(arrays["page/site0/x"]))
    known = torch.from_numpy(np.isfinite(arrays["page/sae0/kl"]))
    has_next = measured_at.clone()
    has_next[:, -1] = False
    spliced = known.any(1)
    assert about["kl"] == {"contexts": int(spliced.sum())}
    assert int(spliced.sum()) == min(len(contexts), inputs.settings.page_kl_tokens // LENGTH)
    assert torch.equal(known, has_next & spliced[:, None])
    for number, sae in enumerate(about["saes"]):
        plain = inputs.sae(sae["name"]).load()
        loss, kl = _plain(inputs.model, plain, tokens, measured_at)
        assert kl[known].mean() > 1e-3
        torch.testing.assert_close(
            torch.from_numpy(arrays[f"page/sae{number}/kl"])[known].double(), kl[known], rtol=5e-4, atol=2e-6
        )
        torch.testing.assert_close(
            torch.from_numpy(arrays["page/loss"])[known].double(), loss[known], rtol=5e-4, atol=2e-6
        )


def _with(inputs, **settings):
    changed = replaced(inputs.settings, **settings)
    return dataclasses.replace(inputs, resolved=dataclasses.replace(inputs.resolved, settings=changed))


def test_where_there_is_none_the_page_says_why(runs, monkeypatch):
    inputs, found = runs["streamed"]
    cases = [
        ({"page_kl_tokens": 0}, "page_kl_tokens is 0"),
        ({"device_map": "auto"}, "the model is spread over devices"),
        ({"text": "", "cache": ("folder",)}, "activations come from a cache, without their model"),
        ({"backend": "transformer-lens"}, "TransformerLens runs the model"),
        ({"split": "tokens"}, "only some tokens of each context are held out"),
    ]
    for settings, reason in cases:
        about, arrays = explored(_with(inputs, **settings), found, STAGES)
        assert reason in about["kl"]["absent"]
        assert not {"page/sae0/kl", "page/loss"} & set(arrays)
    inside = [dataclasses.replace(sae, hook="blocks.1.hook_mlp_out") for sae in inputs.saes]
    assert "does not reconstruct the output of a block" in spliced_text.why_not_spliced(inputs, inside)

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("of the device")

    monkeypatch.setattr(spliced_text, "load_model", too_large)
    assert "no memory for all of" in explored(inputs, found, STAGES)[0]["kl"]["absent"]


def test_a_model_that_gives_other_activations_is_told(runs, tmp_path):
    inputs, found = runs["streamed"]
    save_model(tmp_path / "other", "gpt2")
    resolved = dataclasses.replace(inputs.resolved, model=str(tmp_path / "other"))
    about, _ = explored(dataclasses.replace(inputs, resolved=resolved), found, STAGES)
    assert "could not be spliced: activations: must be those of the model" in about["kl"]["absent"]


def test_kl_settings_change_no_measurement(runs):
    from darkmatter_ext.measurement.run import deciding

    inputs, _ = runs["stored"]
    assert "page_kl_tokens" not in deciding(inputs, inputs.saes, None, None)
    with pytest.raises(ValueError, match="page_kl_tokens: must be at least 0, got -1"):
        replaced(inputs.settings, page_kl_tokens=-1)
