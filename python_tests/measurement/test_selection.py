"""Token roles: every token has one, groups stay whole, batches give the measured tokens."""

import pytest
import torch

from darkmatter_ext.activations import store
from darkmatter_ext.measurement import selection


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache whose activations are made here: 40 contexts of 8 tokens from 10 documents, sinks at position 0."""
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 8, 6, generator=generator)
    values[:, 0] *= 50
    values[3, 5] *= 100
    for number in range(2):
        part = slice(20 * number, 20 * number + 20)
        tokens = torch.zeros(20, 8, dtype=torch.int64)
        store._write_shard(tmp_path, number, values[part], tokens, torch.arange(40)[part] // 4)
    return store.ActivationCache(tmp_path, {"d_in": 6, "n_contexts": 40, "context_length": 8})


def _select(cache, **changes):
    settings = {
        "drop_positions": 1, "max_norm_ratio": 10.0, "sae_fraction": 0.5, "fit_fraction": 0.6,
        "split": "documents", "seed": 0,
    }  # fmt: skip
    return selection.select_tokens(cache, **(settings | changes))


@pytest.mark.parametrize("split", ["documents", "contexts", "tokens"])
def test_every_token_has_one_role_and_groups_stay_whole(cache, split):
    chosen = _select(cache, split=split)
    roles = chosen.roles
    assert (roles[:, 0] == selection.UNUSED).all()
    assert roles[3, 5] == selection.UNUSED
    assert (chosen.dropped_positions, chosen.high_norm_tokens) == (40, 1)
    assert chosen.high_norm_share > 0.5
    assert sum(chosen.count(role) for role in range(4)) == 320
    training = (roles == selection.SAE_TRAINING).any(1)
    assert not (training & ((roles == selection.FIT) | (roles == selection.HELD_OUT)).any(1)).any()
    if split != "tokens":
        groups = torch.arange(40) // 4 if split == "documents" else torch.arange(40)
        for group in groups.unique():
            assert roles[groups == group][:, 1:5].unique().numel() == 1


def test_norm_rule_can_be_switched_off_and_all_contexts_measured(cache):
    chosen = _select(cache, max_norm_ratio=0.0, sae_fraction=0.0)
    assert chosen.high_norm_tokens == 0
    assert chosen.count(selection.SAE_TRAINING) == 0
    assert chosen.count(selection.FIT) + chosen.count(selection.HELD_OUT) == 280


def test_batches_give_the_measured_tokens_twice_in_the_same_order(cache):
    chosen = _select(cache)
    batches = selection.MeasuredBatches(cache, chosen.roles)
    first, second = list(batches), list(batches)
    values = torch.cat([shard.activations for shard in cache.shards()])
    measured = (chosen.roles == selection.FIT) | (chosen.roles == selection.HELD_OUT)
    assert torch.equal(torch.cat([batch.x for batch in first]), values[measured])
    assert torch.equal(torch.cat([batch.train for batch in first]), chosen.roles[measured] == selection.FIT)
    assert [batch.start for batch in second] == [0, len(first[0].x)]
    training = selection.tokens_with_role(cache, chosen.roles, selection.SAE_TRAINING)
    assert torch.equal(training, values[chosen.roles == selection.SAE_TRAINING])


def test_bad_selections_are_named_in_one_line(cache):
    with pytest.raises(ValueError, match="drop_positions: must be from 0 to 7"):
        _select(cache, drop_positions=8)
    with pytest.raises(ValueError, match="split: must be documents, contexts or tokens, got 'rows'"):
        _select(cache, split="rows")
    with pytest.raises(ValueError, match="fraction: must leave groups on both sides"):
        _select(cache, fit_fraction=0.01)
