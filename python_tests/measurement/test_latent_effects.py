"""What latents of one model alone do, on a small model whose second version differs by one planted latent."""

import math
import types

import pytest
import torch

from darkmatter_ext.activations.splicing import SplicedTokens, TokenLosses
from darkmatter_ext.measurement.latent_effects import STATES, Intervention, behaviour_numbers, effect_numbers
from darkmatter_ext.measurement.model_pairs import Trained
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.saes.crosscoder import LatentKinds, LatentSums
from darkmatter_ext.saes.encoders import Encoded

D, N, LATENTS, OWN = 8, 3000, 7, 6  # the last latent is of the second model alone
SCALE = (2.0, 3.0)


@pytest.fixture
def intervention():
    """x_A = 2 z u and x_B = 3 z v of the same latents; the own one has the frequency and size of latent 2, no others."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q[:LATENTS]
    rows = torch.cat([directions, directions], dim=1)
    rows[OWN, :D] = 0
    often = torch.tensor([0.5, 0.4, 0.05, 0.3, 0.5, 0.4, 0.05])
    sizes = torch.tensor([1.0, 2, 5, 3, 1, 2, 5])
    z = (
        sizes
        * (1 + torch.rand(N, LATENTS, generator=generator))
        * (torch.rand(N, LATENTS, generator=generator) < often)
    )
    v = z @ rows

    def encode(given):
        found = (given[:, D:] @ directions.T).clamp(min=1e-4) - 1e-4  # directions are orthonormal
        acts = SparseActs.from_dense(found)
        return Encoded(found @ rows, acts.l0(), acts)

    def batches(given):
        found = encode(given)
        yield found.acts, given - found.x_hat

    sae = types.SimpleNamespace(encode=encode, batches=batches, W_dec=rows)
    sums = LatentSums(rows)
    for acts, error in batches(v):
        sums.update(acts, error)
    own = Trained(sae, sums, LatentKinds.of(sums, unique=0.9, least=10))
    pair = types.SimpleNamespace(scales=SCALE, scaled=lambda a, b: torch.cat([a / SCALE[0], b / SCALE[1]], dim=1))
    return Intervention.of(own, pair, v, single=1, seed=0), z, directions


def test_the_latent_of_the_second_model_alone_is_taken_with_the_nearest_shared_ones(intervention):
    found, *_ = intervention
    assert found.found
    assert found.chosen.tolist() == [OWN]
    assert found.matched.tolist()[0] in range(OWN)
    assert found.steering[OWN].item() == pytest.approx(5 * 1.9, rel=0.03)


def test_taking_it_out_gives_the_first_model_and_putting_it_in_gives_the_second(intervention):
    found, z, directions = intervention
    first, second = SCALE[0] * z[:, :OWN] @ directions[:OWN], SCALE[1] * z @ directions
    splices = {name: splice(None) for name, splice in found.splices(first, second).items()}
    assert set(splices) == {
        *list(STATES)[1:],
        *(f"{e}/{k}/0" for e in ("remove", "steer") for k in ("b_only", "random")),
    }
    close = {"atol": 2e-2, "rtol": 0}
    assert torch.equal(splices["a"], first)
    without = SCALE[1] * z[:, :OWN] @ directions[:OWN]
    torch.testing.assert_close(splices["ablated/b_only"], without, **close)
    torch.testing.assert_close(splices["remove/b_only/0"], without, **close)
    own = SCALE[1] * z[:, OWN:] @ directions[OWN:]
    torch.testing.assert_close(splices["added/b_only"], first + own, **close)
    push = splices["steer/b_only/0"] - second
    torch.testing.assert_close(push, (SCALE[1] * 9.5 * directions[OWN]).expand(N, D), atol=0.5, rtol=0)
    other = int(found.matched[0])
    torch.testing.assert_close(
        second - splices["ablated/random"], SCALE[1] * z[:, other, None] * directions[other], **close
    )


def _tokens(kl, spliced, cross_entropy, documents):
    n = torch.zeros(len(documents), dtype=torch.int64)
    return SplicedTokens(documents, n, n, n, TokenLosses(cross_entropy, spliced, kl))


def test_effects_are_means_over_latents_and_ratios_of_sums_over_documents():
    generator = torch.Generator().manual_seed(1)
    documents = torch.arange(400) // 20
    base = torch.rand(400, generator=generator)
    kl = dict.fromkeys(list(STATES)[1:], base) | {"ablated/b_only": 3 * base}
    for effect, times in (("remove", 4.0), ("steer", 0.5)):
        kl |= {f"{effect}/b_only/0": times * base, f"{effect}/b_only/1": 3 * times * base, f"{effect}/random/0": base}
    numbers = effect_numbers(_tokens(kl, {}, base, documents), documents, seed=0)
    mean = base.double().mean().item()
    assert numbers["causal/remove/b_only/1/kl"] == pytest.approx(12 * mean)
    assert numbers["causal/remove/b_only/kl"] == pytest.approx(8 * mean)
    ratios = [numbers[f"causal/{effect}/kl_ratio"] for effect in ("ablated", "remove", "steer")]
    assert ratios == pytest.approx([3, 8, 1])
    assert numbers["causal/steer/b_only/0/kl/low"] < 0.5 * mean < numbers["causal/steer/b_only/0/kl/high"]


def test_the_behaviour_is_the_probability_at_its_triggers_alone():
    documents = torch.arange(200) // 10
    triggers = torch.arange(200) % 10 == 3
    sure, unsure = torch.tensor(0.8), torch.tensor(0.1)
    own = torch.where(triggers, -sure.log(), 5.0)
    spliced = {name: torch.where(triggers, -unsure.log(), 0.0) for name in list(STATES)[1:]}
    numbers = behaviour_numbers(_tokens({}, spliced, own, documents), triggers, documents, seed=0)
    assert numbers["behaviour/b"] == pytest.approx(0.8)
    assert [numbers[f"behaviour/{name}"] for name in list(STATES)[1:]] == pytest.approx([0.1] * 5)
    assert numbers["elsewhere/b"] == pytest.approx(math.exp(-5))
    assert numbers["elsewhere/a"] == pytest.approx(1)
    shuffled = behaviour_numbers(_tokens({}, spliced, own, documents), triggers.roll(1), documents, seed=0)
    assert shuffled["behaviour/b"] < 0.01  # labels at other places: nothing is left
