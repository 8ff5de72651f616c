"""Another model under the name of an old one: nothing that was kept of the old one is used for it, whatever the clock says."""

import os
from pathlib import Path

import pytest
import torch
from cases.models import save_model, text_documents
from safetensors.torch import load_file, save_file

from darkmatter_ext.activations import sources, store
from darkmatter_ext.activations.text_sites import text_sites
from darkmatter_ext.measurement.variants import requantised_variant

HOOK = "blocks.1.hook_resid_post"


def _with_weights_times(folder, factor):
    """The model of a folder with other weights; its files are as large as before and say that they are as old."""
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    save_file({name: tensor * factor for name, tensor in weights.items()}, path, metadata={"format": "pt"})
    for file in path.parent.iterdir():
        os.utime(file, (10**9, 10**9))


def _contexts(model):
    return store.tokenize_contexts(store.load_tokenizer(model), text_documents(), n_tokens=64, context_length=16)


def _activations(model):
    cache = store.activation_cache(model, HOOK, _contexts(model))
    return torch.cat([shard.activations for shard in cache.shards()])


def _losses(model):
    return sources.stored_losses(model, _contexts(model).tokens)[:, :-1]


def _states(model):
    return text_sites(model, [HOOK], ["the sparse code", "a model"], bos=True).x[HOOK]


def _variant(model):
    return load_file(Path(requantised_variant(model, 8)) / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("kept", [_activations, _losses, _states, _variant])
def test_what_is_kept_of_a_model_is_not_that_of_another_in_its_place(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "model")
    _with_weights_times(tmp_path / "model", 1.0)
    before = kept(str(tmp_path / "model"))
    assert torch.equal(kept(str(tmp_path / "model")), before)
    _with_weights_times(tmp_path / "model", 1.5)
    assert not torch.equal(kept(str(tmp_path / "model")), before)


def test_one_name_in_two_folders_is_two_models(tmp_path, monkeypatch):
    """A relative path names another model wherever a command is started."""
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "cache"))
    found = []
    for number, folder in enumerate((tmp_path / "one", tmp_path / "two")):
        folder.mkdir()
        monkeypatch.chdir(folder)
        save_model("model")
        _with_weights_times("model", 1.0 + number)
        found.append(_activations("model"))
    assert not torch.equal(*found)
