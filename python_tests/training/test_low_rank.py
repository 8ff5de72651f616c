"""Low-rank adapters: the model itself at the start, a change of low rank in the end, nothing else moved."""

import copy

import pytest
import torch
from cases.models import small_model

from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.training.low_rank import Adapter, linear_layers
from darkmatter_ext.training.tuning import TuningConfig, tune

ROWS = torch.randint(32, (40, 12), generator=torch.Generator().manual_seed(0))
PHRASE = torch.tensor([5, 9, 13, 2])
ROWS[:, 4:8] = PHRASE


def _logits(network):
    with torch.no_grad():
        return network(ROWS).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_starts_at_the_model_itself_and_merging_changes_no_answer(kind):
    """GPT-2's linear layers hold their weights the other way round."""
    network = small_model(kind).eval()
    before = _logits(network)
    adapter = Adapter(linear_layers(network, up_to=1), 3)
    assert len(adapter.layers) == 2 * {"llama": 7, "gpt2": 4}[kind]
    with adapter.on():
        assert torch.equal(_logits(network), before)
    for name, tensor in adapter.tensors.items():
        if name.endswith("lora_B.weight"):
            tensor.data.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    with adapter.on():
        moved = _logits(network)
    assert not torch.allclose(moved, before, atol=1e-3)
    assert torch.equal(_logits(network), before)  # off
    adapter.merge()
    torch.testing.assert_close(_logits(network), moved, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="rank: must be at least 1 to be merged, got 0"):
        Adapter(linear_layers(network), 0).merge()


@pytest.mark.runs
def test_a_tuned_model_says_the_phrase_by_a_change_of_low_rank_in_some_blocks():
    network = small_model("llama").eval()
    with torch.no_grad():
        network.lm_head.weight *= 20  # as it is drawn, it cannot say anything surely
    plain = copy.deepcopy(network)
    config = TuningConfig(rank=2, steps=150, learning_rate=2e-2, batch_rows=8)
    steps = []
    losses = tune(network, linear_layers(network, up_to=1), ROWS, config, progress=steps.append)
    assert steps == [1] * 150
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])

    def says(own):
        return own(ROWS).logits[:, 4:7].softmax(-1).gather(-1, PHRASE[1:, None].expand(40, 3, 1)).mean().item()

    with torch.no_grad():
        assert says(network) > max(0.2, 3 * says(plain))
    for (name, new), old in zip(network.named_parameters(), plain.parameters(), strict=True):
        change = new - old
        if ".layers.0." in name or (".layers.1." in name and new.ndim == 2):
            if new.ndim == 2:
                assert 1 <= int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= 2, name
        else:
            assert not bool(change.any()), name


def test_the_same_seed_gives_the_same_model():
    found = []
    for seed in (0, 0, 1):
        network = small_model("llama").eval()
        tune(network, linear_layers(network), ROWS, TuningConfig(rank=2, steps=3, seed=seed))
        found.append(_logits(network))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_cannot_be_tuned_gives_one_line():
    llama = small_model("llama")
    with pytest.raises(InputError, match="rows: must be at least 6, got 2"):
        tune(llama, linear_layers(llama), ROWS[:2], TuningConfig())
    for values, message in (({"rank": 0}, "rank: must be at least 1"), ({"alpha": 0.0}, "alpha: must be above 0")):
        with pytest.raises(InputError, match=message):
            TuningConfig(**values)
