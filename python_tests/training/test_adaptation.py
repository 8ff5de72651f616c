"""Adapters: peft's answer, nothing while off, and training on a planted model whose best adapter is known in closed form."""

from types import SimpleNamespace

import pytest
import torch
from cases.models import save_model, small_model
from torch import nn

from darkmatter_ext.activations.splicing import PlacesToSplice, SplicedModel, splice_losses
from darkmatter_ext.estimators.intervals import ratio, sums_by
from darkmatter_ext.runtime.inputs import InputError, StateError
from darkmatter_ext.training.adaptation import Arm, Recipe, train_adapters
from darkmatter_ext.training.low_rank import Adapter, check_rank, linear_layers

D, V = 8, 12
SHAPES = (3.0, 2.0, 1.0)  # singular values of what the SAE takes away


class HeadOnly:
    """logits = W x: the smallest model that can be adapted. Logits are small, so that KL is a squared error."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        left = torch.randn(V, D, generator=generator)
        left = torch.linalg.qr(left - left.mean(0)).Q  # a shift of all logits changes nothing
        self.right = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
        self.layer = nn.Linear(D, V, bias=False).requires_grad_(False)
        scales = torch.tensor([*SHAPES, *[1.5] * (D - len(SHAPES))])
        self.layer.weight.copy_(0.1 * left * scales @ self.right.mT)
        self.network = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(vocab_size=V))

    def hidden(self, _tokens, activation):
        return self.layer(activation)

    def logits(self, hidden):
        return hidden

    def shrunk(self, to):
        """x with its first components in W's own directions, one for each of SHAPES, `to` times as large."""
        along = self.right[:, : len(SHAPES)]
        return lambda x: x - (1 - to) * x @ along @ along.mT


def _contexts(count, length=50, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, length, D, generator=generator)
    tokens = torch.randint(V, (count, length), generator=generator)
    return PlacesToSplice(torch.arange(count), tokens, x, torch.ones(count, length, dtype=torch.bool))


def _closed(model, splice, rank, *, steps=600, rate=1e-2, recipe=None):
    """The share of KL that an adapter of a rank closes, in percent."""
    adapter = Adapter({"layer": model.layer}, rank, alpha=max(1, rank))
    train_adapters(model, _contexts(steps), {"one": Arm(adapter, rate, splice, recipe or Recipe())}, seed=0)
    test = _contexts(40, seed=2)
    splices = {"off": splice, "on": splice}
    losses = splice_losses(model, test.tokens, test.x, test.replaced, splices, {"on": adapter.on})
    before, after = losses.kl["off"], losses.kl["on"]
    return ratio(sums_by(torch.arange(len(before)) // 49, 100 * (before - after), before)).value


@pytest.mark.runs
@pytest.mark.parametrize(("rank", "expected"), [(1, 100 * 9 / 14), (2, 100 * 13 / 14), (3, 100.0)])
def test_an_adapter_closes_what_the_best_matrix_of_its_rank_does(rank, expected):
    """Sae(x) = (I - P/2) x: W P is needed, of rank 3; Eckart and Young say what fewer give."""
    model = HeadOnly()
    assert _closed(model, model.shrunk(0.5), rank) == pytest.approx(expected, abs=3)


@pytest.mark.runs
def test_a_loss_of_some_tokens_trains_the_same():
    model = HeadOnly()
    assert _closed(model, model.shrunk(0.5), 3, recipe=Recipe(loss_share=0.25)) == pytest.approx(100, abs=4)


@pytest.mark.runs
def test_biases_alone_close_nothing_here():
    model = HeadOnly()
    assert abs(_closed(model, model.shrunk(0.5), 0, rate=1e-3)) < 3


@pytest.mark.runs
def test_what_is_gone_is_not_won_back():
    """Sae(x) = (I - P) x: the rest of x knows nothing of P x. Training that read x itself would close it."""
    model = HeadOnly()
    assert abs(_closed(model, model.shrunk(0.0), 3, rate=1e-3)) < 3


def test_nothing_lost_is_nothing_to_close():
    model, test = HeadOnly(), _contexts(20)
    losses = splice_losses(model, test.tokens, test.x, test.replaced, {"same": lambda x: x})
    found = ratio(sums_by(torch.arange(len(losses.kl["same"])) // 49, losses.kl["same"], losses.kl["same"]))
    assert found.value != found.value  # NaN, not 100


def test_an_adapter_that_is_off_is_nothing_to_the_bit():
    network = small_model("llama")
    model = SplicedModel(network, 0)
    tokens = torch.randint(32, (4, 12), generator=torch.Generator().manual_seed(0))
    plain, weights = network(tokens).logits, {n: p.clone() for n, p in network.named_parameters()}
    adapter = Adapter(linear_layers(network, 0), 2)
    with adapter.on():
        assert torch.equal(network(tokens).logits, plain)  # B is zero at first
    contexts = PlacesToSplice(torch.arange(4), tokens, model.activation(tokens).clone(), torch.ones_like(tokens).bool())
    kept = train_adapters(
        model, contexts, {"a": Arm(adapter, 0.1, lambda x: 0.5 * x)}, seed=0, checkpoints={"a": (0.5,)}
    )
    assert torch.equal(network(tokens).logits, plain)
    with adapter.on():
        assert not torch.equal(network(tokens).logits, plain)
    assert all(torch.equal(p, weights[n]) for n, p in network.named_parameters())
    (half,) = kept["a"].values()
    assert any(not torch.equal(half.tensors[name], adapter.tensors[name]) for name in adapter.tensors)


def test_side_by_side_is_as_alone():
    model = HeadOnly()
    arms = {
        "a": (model.shrunk(0.5), Recipe(loss_share=0.5)),
        "b": (model.shrunk(0.0), Recipe()),
        "c": (None, Recipe(loss_of_text=True)),
    }

    def trained(names):
        own = {
            n: Arm(Adapter({"layer": model.layer}, 2, dropout=0.0), 1e-2, arms[n][0], recipe=arms[n][1]) for n in names
        }
        train_adapters(model, _contexts(8), own, seed=3)
        return {n: arm.adapter.tensors for n, arm in own.items()}

    together = trained("abc")
    for name in "abc":
        alone = trained(name)[name]
        assert all(torch.equal(alone[key], tensor) for key, tensor in together[name].items())
    assert together["c"]["layer.lora_B.weight"].abs().sum() > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_reads_what_is_saved_and_answers_the_same(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="peft, the oracle, is not installed")
    save_model(tmp_path / "model", kind)
    network = small_model(kind).eval()
    adapter = Adapter(linear_layers(network, 1), 4, alpha=8, seed=1)
    for number, tensor in enumerate(adapter.tensors.values()):
        tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    adapter.save(tmp_path / "adapter", model=str(tmp_path / "model"))
    tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = network(tokens).logits
        with adapter.on():
            own = network(tokens).logits
        theirs = peft.PeftModel.from_pretrained(small_model(kind).eval(), tmp_path / "adapter")(tokens).logits
    assert not torch.allclose(plain, theirs, atol=1e-3)
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


def test_a_saved_adapter_is_read_again(tmp_path):
    layers = linear_layers(small_model("llama"), 1)
    adapter = Adapter(layers, 3, seed=5)
    adapter.save(tmp_path / "a")
    again = Adapter(layers, 3, seed=6).load(tmp_path / "a")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    with pytest.raises(StateError, match="must be of rank 2"):
        Adapter(layers, 2).load(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(StateError, match="is damaged"):
        adapter.load(tmp_path / "a")


def test_dropout_is_of_training_alone():
    layer = nn.Linear(4, 4)
    adapter = Adapter({"layer": layer}, 2, dropout=0.9)
    adapter.tensors["layer.lora_B.weight"].data.fill_(1)
    x = torch.ones(50, 4)
    with adapter.on():
        assert torch.equal(layer(x), layer(x))
    with adapter.on(training=True):
        assert not torch.equal(layer(x), layer(x))


def test_bad_input_gives_one_line():
    layers = linear_layers(small_model("llama"), 1)
    assert len(layers) == 7
    with pytest.raises(InputError, match=r"ranks: must be from 1 to 8, the width of .*k_proj, got 9"):
        check_rank(layers, 9, argument="ranks")
    with pytest.raises(InputError, match="hook: must have a block after it to adapt, got block 2"):
        linear_layers(small_model("llama"), 2)
    contexts = _contexts(2)
    none = contexts._replace(replaced=torch.zeros_like(contexts.replaced))
    with pytest.raises(InputError, match="must have places to replace"):
        train_adapters(HeadOnly(), none, {}, seed=0)
    model = HeadOnly()
    arm = Arm(Adapter({"layer": model.layer}, 1), 1e30, model.shrunk(0.5))
    with pytest.raises(InputError, match="learning_rates: must keep the loss finite, got 1e"):
        train_adapters(model, _contexts(20), {"a": arm}, seed=0)
