"""Splicing into a language model, against forward passes written by hand, on small models in real formats."""

import dataclasses

import pytest
import torch
from cases.models import small_model

from darkmatter_ext.activations.hook_points import block_that_ends_at
from darkmatter_ext.activations.splicing import SplicedModel, splice_losses
from darkmatter_ext.measurement.opening import require_same_tokens

KINDS = ["gpt2", "llama", "gemma2"]


@pytest.fixture(params=[(kind, layer) for kind in KINDS for layer in (0, 1, 2)], ids=str)
def spliced(request):
    kind, layer = request.param
    return SplicedModel(small_model(kind).eval(), layer)


def _tokens(contexts=3, length=12):
    return torch.randint(32, (contexts, length), generator=torch.Generator().manual_seed(3))


def _hooked_logits(model, tokens, change):
    """The oracle: the whole network, every block, with a hook that changes the output of the site's block."""

    def hook(_module, _inputs, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = model._blocks[model.layer].register_forward_hook(hook)
    try:
        with torch.inference_mode():
            return model.network(tokens, use_cache=False).logits
    finally:
        handle.remove()


def test_the_identity_gives_exactly_the_same_logits(spliced):
    tokens = _tokens()
    own = spliced.activation(tokens)
    with torch.inference_mode():
        plain = spliced.network(tokens, use_cache=False).logits
    assert torch.equal(spliced.logits(spliced.hidden(tokens, own)), plain)
    assert spliced.passes_over_blocks
    losses = splice_losses(spliced, tokens, own, torch.ones_like(tokens).bool(), {"same": lambda x: x})
    assert torch.equal(losses.spliced["same"], losses.cross_entropy)
    assert (losses.kl["same"] == 0).all()


def test_a_zero_splice_equals_the_model_run_by_hand(spliced):
    tokens = _tokens()
    replaced = torch.arange(12).expand(3, 12) >= 4
    replaced = replaced & (tokens != 5)  # any pattern of places
    losses = splice_losses(spliced, tokens, spliced.activation(tokens), replaced, {"zero": torch.zeros_like})

    def zero(hidden):
        return torch.where(replaced[..., None], 0.0, hidden)

    before = _hooked_logits(spliced, tokens, lambda hidden: hidden).double().log_softmax(-1)
    after = _hooked_logits(spliced, tokens, zero).double().log_softmax(-1)
    assert not torch.equal(before, after)
    expected = {"ce": [], "zero": [], "kl": []}
    for context, position in replaced.nonzero().tolist():
        if position == 11:
            continue  # nothing to predict
        target = tokens[context, position + 1]
        p, q = before[context, position], after[context, position]
        expected["ce"].append(-p[target])
        expected["zero"].append(-q[target])
        expected["kl"].append((p.exp() * (p - q)).sum())
    for found, name in ((losses.cross_entropy, "ce"), (losses.spliced["zero"], "zero"), (losses.kl["zero"], "kl")):
        torch.testing.assert_close(found.double(), torch.stack(expected[name]), rtol=1e-4, atol=1e-5)


def test_every_splice_of_a_batch_is_its_own(spliced):
    """Several splices at once equal each alone, and the model is as it was afterwards."""
    tokens, replaced = _tokens(), torch.ones(3, 12).bool()
    own = spliced.activation(tokens)
    splices = {"half": lambda x: 0.5 * x, "same": lambda x: x, "shift": lambda x: x + 1}
    together = splice_losses(spliced, tokens, own, replaced, splices)
    for name, splice in splices.items():
        alone = splice_losses(spliced, tokens, own, replaced, {name: splice})
        assert torch.equal(alone.kl[name], together.kl[name])
        assert torch.equal(alone.spliced[name], together.spliced[name])
    assert torch.equal(spliced.activation(tokens), own)


def test_running_all_blocks_gives_the_same(spliced):
    tokens, replaced = _tokens(), torch.ones(3, 12).bool()
    own = spliced.activation(tokens)
    quick = splice_losses(spliced, tokens, own, replaced, {"half": lambda x: 0.5 * x})
    spliced.passes_over_blocks = False
    whole = splice_losses(spliced, tokens, own, replaced, {"half": lambda x: 0.5 * x})
    assert torch.equal(quick.kl["half"], whole.kl["half"])


def test_chunks_of_logits_change_nothing(monkeypatch):
    from darkmatter_ext.activations import splicing

    model = SplicedModel(small_model("llama").eval(), 1)
    tokens, replaced = _tokens(), torch.ones(3, 12).bool()
    own = model.activation(tokens)
    whole = splice_losses(model, tokens, own, replaced, {"zero": torch.zeros_like})
    monkeypatch.setattr(splicing, "LOGITS_BYTES", 5 * 4 * 32)  # five tokens at a time
    parts = splice_losses(model, tokens, own, replaced, {"zero": torch.zeros_like})
    for field in dataclasses.fields(whole)[1:]:
        torch.testing.assert_close(getattr(parts, field.name)["zero"], getattr(whole, field.name)["zero"])


def test_no_measured_token_gives_no_losses(spliced):
    tokens = _tokens()
    losses = splice_losses(
        spliced, tokens, spliced.activation(tokens), torch.zeros(3, 12).bool(), {"zero": torch.zeros_like}
    )
    assert len(losses.cross_entropy) == len(losses.kl["zero"]) == 0


def test_a_site_must_be_the_output_of_a_block():
    ends = {"2.hook_resid_post": 2, "2.hook_resid_pre": 1, "0.hook_resid_pre": None, "1.hook_mlp_out": None}
    assert {name: block_that_ends_at(f"blocks.{name}") for name in ends} == ends
    with pytest.raises(ValueError, match="hook: must be the output of a block to splice into the model, got blocks"):
        SplicedModel.load("no model is read", "blocks.1.hook_mlp_out")


def test_what_does_not_match_is_named_in_one_line():
    model = SplicedModel(small_model("llama").eval(), 1)
    tokens = _tokens()
    own, other = model.activation(tokens), tokens.clone()
    other[1, 7] = (other[1, 7] + 1) % 32
    model.check_activations(tokens, own)
    require_same_tokens(tokens, tokens.clone())
    everywhere = torch.ones(3, 12).bool()
    cases = [
        (lambda: require_same_tokens(other, tokens), "(context 1, position 7; 1 places differ)"),
        (lambda: require_same_tokens(tokens[:, :5], tokens), "tokens: must be those of the stored activations [3, 12]"),
        (lambda: model.check_activations(other, own), "(context 1, position 7)"),
        (lambda: model.check_activations(tokens, own / 0), "activations: must be those of the model"),
        (
            lambda: splice_losses(model, tokens, own, everywhere, {"nan": lambda x: x / 0}),
            "splices: 'nan' must give finite activations [36, 16], got [36, 16] with NaN or infinity",
        ),
        (
            lambda: splice_losses(model, tokens, own, everywhere, {"short": lambda x: x[1:]}),
            "splices: 'short' must give finite activations [36, 16], got [35, 16]",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match="must") as caught:
            call()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
