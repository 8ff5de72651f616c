"""States of numbers against forward passes by hand, sums, and patches of a planted clock."""

import math
from types import SimpleNamespace

import pytest
import torch
from cases.models import small_model, word_tokenizer

from darkmatter_ext.activations.number_prompts import (
    EXAMPLES,
    Prompts,
    last_states,
    number_states,
    patch_logits,
    patch_numbers,
    sum_prompts,
    summed_rightly,
    tokens_of,
)
from darkmatter_ext.activations.splicing import SplicedModel
from darkmatter_ext.runtime.inputs import InputError

HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]


def test_states_are_those_at_the_end_of_the_number():
    """Texts of two lengths: what is read at the last token of each, in the order of the values."""
    network, ids = small_model("llama").eval(), tokens_of(word_tokenizer(), bos=True)
    values = [8, 9, 10, 11]
    rows = [[ids(f"{text}{value}") for value in values] for text in ("the code ", "of ")]
    assert [len(row) for row in rows[0]] == [4, 4, 5, 5]
    found = number_states(network, HOOKS, rows, lambda _: None)
    for t, template in enumerate(rows):
        for v, row in enumerate(template):
            with torch.no_grad():
                hidden = network(torch.tensor([row]), output_hidden_states=True).hidden_states
            for hook, at in zip(HOOKS, (0, 2), strict=True):
                torch.testing.assert_close(found[hook][v, t], hidden[at][0, -1], rtol=1e-4, atol=1e-5)


def test_values_that_are_one_token_give_one_line():
    ids = tokens_of(word_tokenizer(), bos=False)
    rows = [[ids(text) for text in ("the xxx", "the yyy", "the 1")]]
    with pytest.raises(
        InputError, match="model: must have a tokenizer that tells the values apart, got 1 with the tokens"
    ):
        number_states(small_model("llama"), HOOKS, rows, lambda _: None)


def test_prompts_are_sums_without_a_carry():
    tokenizer = word_tokenizer()
    ids = tokens_of(tokenizer, bos=True)
    prompts = sum_prompts(ids, range(10, 100), seed=0)
    pairs = list(zip(prompts.value.tolist(), prompts.added.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == 9 * 44 - 2
    # In every ten 9 + 8 + ... + 1, less the one where no other number has room; less the two whose answers are shown.
    assert all(a % 10 + b < 10 for a, b in pairs)
    assert not {(31, 4), (54, 2)} & set(pairs)
    one = pairs.index((23, 4))
    to = int(prompts.to[one])
    assert to // 10 == 2
    assert to != 23
    assert to % 10 + 4 < 10
    assert prompts.tokens[one].tolist() == ids(f"{EXAMPLES}23 + 4 = 2")
    assert prompts.other[one].tolist() == ids(f"{EXAMPLES}{to} + 4 = 2")
    assert [tokenizer.decode([int(column[one])]) for column in (prompts.own, prompts.answer)] == ["7", str(to % 10 + 4)]
    assert prompts.tokens[one, : prompts.place + 1].tolist() == ids(f"{EXAMPLES}23")
    assert len(sum_prompts(ids, range(10, 100), seed=0, most=50).value) == 50
    words = sum_prompts(lambda text: [hash(text) % 1000], range(10, 100), seed=0)  # whole texts as tokens
    assert words is None


def test_the_last_state_is_that_of_the_last_token():
    network = small_model("llama").eval()
    tokens = torch.randint(0, 30, (70, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = network(tokens, output_hidden_states=True).hidden_states
    for hook, at in zip(HOOKS, (0, 2), strict=True):
        torch.testing.assert_close(last_states(network, HOOKS, tokens)[hook], hidden[at][:, -1], rtol=1e-4, atol=1e-5)


def test_a_patch_is_the_network_with_a_hook():
    network = small_model("llama").eval()
    prompts = sum_prompts(tokens_of(word_tokenizer(), bos=True), range(10, 40), seed=0)
    moves = {"helix": torch.ones(len(prompts.tokens), 16)}
    found = patch_logits(SplicedModel(network, 0), prompts, moves, seed=0)
    with torch.no_grad():
        plain = network(prompts.tokens).logits[:, -1]
        other = network(prompts.other, output_hidden_states=True).hidden_states[1][:, prompts.place]

        def hook(_module, _inputs, output):
            return output.index_put((torch.arange(len(other)), torch.tensor(prompts.place)), other)

        handle = network.model.layers[0].register_forward_hook(hook)
        patched = network(prompts.tokens).logits[:, -1]
        handle.remove()
    rows = torch.arange(len(other))
    torch.testing.assert_close(found["original"], plain[rows, prompts.answer], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["full"], patched[rows, prompts.answer], rtol=1e-4, atol=1e-5)
    assert set(found) == {"original", "full", "mean", "helix", "random_move"}
    assert summed_rightly(network, prompts).equal(plain.argmax(-1) == prompts.own)


class Clock:
    """A state (cos, sin of 2 pi u / 10) and noise in other axes; the logit of digit w is the state's cosine with (w - 1)."""

    def __init__(self, states, other):
        self.network = SimpleNamespace(device=torch.device("cpu"))
        self.states = {id(states[0]): states[1], id(other[0]): other[1]}
        angle = 2 * math.pi * (torch.arange(10) - 1) / 10
        self.readout = torch.stack([angle.cos(), angle.sin()])

    def activation(self, tokens):
        return self.states[id(tokens)]

    def hidden(self, _tokens, activation):
        return activation[:, :, :2]

    def logits(self, hidden):
        return hidden @ self.readout


def _clock():
    generator = torch.Generator().manual_seed(0)
    value = torch.arange(10, 90)
    to = value // 10 * 10 + torch.randint(10, (80,), generator=generator)

    def states(units):
        angle = 2 * math.pi * units / 10
        noise = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))
        return torch.cat([angle.cos()[:, None], angle.sin()[:, None], noise], 1)[:, None]

    tokens, other = torch.zeros(80, 1).long(), torch.zeros(80, 1).long()
    prompts = Prompts(tokens, other, 0, value, to, torch.ones_like(value), (value + 1) % 10, (to + 1) % 10)
    x, y = states(value % 10), states(to % 10)
    return Clock((tokens, x), (other, y)), prompts, (y - x)[:, 0]


def test_on_a_clock_the_right_move_scores_one_and_others_nothing():
    model, prompts, move = _clock()
    shuffled = move[torch.randperm(80, generator=torch.Generator().manual_seed(3))]
    away = torch.cat([torch.zeros(80, 2), torch.randn(80, 6)], 1)  # all but the clock
    x = model.activation(prompts.tokens)[:, 0]
    numbers = patch_numbers(
        patch_logits(
            model, prompts, {"helix": move, "shuffled": shuffled, "destroyed": x.mean(0) - x, "away": away}, seed=0
        ),
        seed=0,
    )
    assert numbers["patch/helix"] == pytest.approx(1, abs=1e-4)
    assert numbers["patch/destroyed"] == pytest.approx(0, abs=1e-4)
    for name in ("shuffled", "away", "random_move"):
        assert numbers[f"patch/{name}"] < 0.6, name
        assert numbers[f"patch/{name}/high"] < 0.8, name
    assert numbers["patch_logit/full"] > numbers["patch_logit/mean"]


def test_where_the_full_patch_does_nothing_there_is_no_score():
    model, prompts, move = _clock()
    model.readout.zero_()
    logits = patch_logits(model, prompts, {"helix": move}, seed=0)
    assert math.isnan(patch_numbers(logits, seed=0)["patch/helix"])
