"""Token roles: every token has one, groups stay whole, batches give the measured tokens."""

import pytest
import torch

from darkmatter_ext.activations import store
from darkmatter_ext.activations.sources import CacheSource, SelectedContexts
from darkmatter_ext.measurement.settings import Measure
from darkmatter_ext.measurement.stored_tokens import MeasuredBatches, StoredTokens
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT, SAE_TRAINING, UNUSED, TokenRoles, training_contexts


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


def _select(cache, *, sae_fraction=0.5, **changes):
    """The roles of a cache's tokens, decided as a run decides them."""
    measure = Measure(**({"drop_positions": 1} | changes))
    training = training_contexts(cache.column("documents"), measure, sae_fraction)
    source = SelectedContexts(CacheSource({"site": cache}), (~training).nonzero().flatten())
    return StoredTokens.of(cache, "site", training, TokenRoles.decide(source, measure, ["site"]))


@pytest.mark.parametrize("split", ["documents", "contexts", "tokens"])
def test_every_token_has_one_role_and_groups_stay_whole(cache, split):
    chosen = _select(cache, split=split)
    roles = chosen.roles
    assert (roles[:, 0] == UNUSED).all()
    assert roles[3, 5] == UNUSED
    assert (chosen.left_out.by_position, chosen.left_out.by_token, chosen.left_out.by_norm) == (40, 0, 1)
    assert chosen.high_norm_share > 0.5
    assert sum(chosen.count(role) for role in range(4)) == 320
    training = (roles == SAE_TRAINING).any(1)
    assert not (training & ((roles == FIT) | (roles == HELD_OUT)).any(1)).any()
    if split != "tokens":
        groups = torch.arange(40) // 4 if split == "documents" else torch.arange(40)
        for group in groups.unique():
            assert roles[groups == group][:, 1:5].unique().numel() == 1


def test_norm_rule_can_be_switched_off_and_all_contexts_measured(cache):
    chosen = _select(cache, max_norm_ratio=0.0, sae_fraction=0.0)
    assert chosen.left_out.by_norm == 0
    assert chosen.count(SAE_TRAINING) == 0
    assert chosen.count(FIT) + chosen.count(HELD_OUT) == 280


def test_batches_give_the_measured_tokens_twice_in_the_same_order(cache):
    chosen = _select(cache)
    batches = MeasuredBatches(chosen)
    first, second = list(batches), list(batches)
    values = torch.cat([shard.activations for shard in cache.shards()])
    measured = (chosen.roles == FIT) | (chosen.roles == HELD_OUT)
    assert torch.equal(torch.cat([batch.x for batch in first]), values[measured])
    assert torch.equal(torch.cat([batch.train for batch in first]), chosen.roles[measured] == FIT)
    assert [batch.start for batch in second] == [0, len(first[0].x)]
    training = chosen.with_role(SAE_TRAINING)
    assert torch.equal(training, values[chosen.roles == SAE_TRAINING])


def test_bad_selections_are_named_in_one_line(cache):
    with pytest.raises(ValueError, match="drop_positions: must be from 0 to 7"):
        _select(cache, drop_positions=8)
    with pytest.raises(ValueError, match="split: must be documents, contexts or tokens, got 'rows'"):
        _select(cache, split="rows")
    with pytest.raises(ValueError, match="tokens: must leave documents on every side of the split, got 5 documents"):
        _select(cache, fit_fraction=0.01)
    with pytest.raises(ValueError, match="fraction: must leave groups on both sides"):
        _select(cache, sae_fraction=0.01)
