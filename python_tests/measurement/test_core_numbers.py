"""SAEBench's core numbers from the sums of a measurement, beside their definitions on stored tokens."""

import pytest
import torch
from cases.models import small_sae
from cases.planted import PlantedSource

from darkmatter_ext.measurement import engine
from darkmatter_ext.measurement.core_numbers import _nearest, core_numbers
from darkmatter_ext.measurement.settings import Measure
from darkmatter_ext.measurement.tokens import HELD_OUT, TokenRoles
from darkmatter_ext.saes.encoders import Encoder, as_encoder

HOOK, D, F, TOKENS = "blocks.1.hook_resid_post", 12, 64, 3000


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One SAE on activations away from zero, the tokens that were held out, and all numbers."""
    x = 0.3 + 0.4 * torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(0))
    sae, settings = small_sae("jumprelu", D, F, 2), Measure(drop_positions=0, max_norm_ratio=0)
    source = PlantedSource({HOOK: x})
    roles = TokenRoles.decide(source, settings, [HOOK])
    encoder = Encoder.of_site("sae", HOOK, F, lambda: as_encoder(sae))
    site = engine.measure(source, [encoder], roles, folder=tmp_path_factory.mktemp("core"))[HOOK]
    held = (roles.contexts == HELD_OUT).repeat_interleave(50)
    return x, sae, held, core_numbers(site, "sae", sae)


def test_every_number_equals_its_definition(measured):
    x, sae, held, numbers = measured
    y, y_hat = x[held].double(), sae(x[held]).double()
    error, size = (y - y_hat).square().sum(), (y - y.mean(0)).square().sum()
    assert numbers["explained_variance"] == pytest.approx(1 - (error / size).item(), rel=1e-6)
    product = (y * y_hat).sum(1).mean()
    bias = (y_hat.square().sum(1).mean() / product).item()
    assert numbers["saebench/relative_reconstruction_bias"] == pytest.approx(bias, rel=1e-5)
    alive = int((sae.encode(x) > 0).any(0).sum())
    assert 0 < numbers["alive_latents"] == alive < F
    assert numbers["alive_share"] == alive / F
    cosine = torch.nn.functional.cosine_similarity(sae.W_dec, sae.W_enc.T, dim=1).mean().item()
    assert numbers["encoder_decoder_cosine"] == pytest.approx(cosine, abs=1e-6) == pytest.approx(1, abs=1e-6)
    unit = torch.nn.functional.normalize(sae.W_dec, dim=1)
    largest = (unit @ unit.T - 2 * torch.eye(F)).max(1).values.mean().item()
    assert numbers["max_decoder_cosine"] == pytest.approx(largest, abs=1e-6)


def test_explained_variance_of_saebench_is_written_out_as_its_code_has_it(measured):
    """Means of batches of equal size, as `get_sparsity_and_variance_metrics` of 0.6.0 takes them."""
    x, sae, held, numbers = measured
    y = x[held][: held.sum() // 4 * 4].double().unflatten(0, (4, -1))
    rest = x[held][: held.sum() // 4 * 4].double() - sae(x[held][: held.sum() // 4 * 4]).double()
    squares = torch.stack([batch.square().sum(-1).mean() for batch in y]).mean()
    entries = torch.cat([batch.square().mean(0) for batch in y]).mean()
    found = 1 - rest.square().sum(-1).mean() / (squares - entries**2)
    assert numbers["saebench/explained_variance"] == pytest.approx(found.item(), abs=0.01)
    assert abs(numbers["saebench/explained_variance"] - numbers["explained_variance"]) > 0.05  # they are two things


def test_nearest_rows_are_looked_for_in_pieces_and_of_a_sample(monkeypatch):
    from darkmatter_ext.measurement import core_numbers as module

    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    whole = _nearest(rows)
    monkeypatch.setattr(module, "ROWS", 70)
    assert _nearest(rows) == pytest.approx(whole, abs=1e-6)
    monkeypatch.setattr(module, "SAMPLED_LATENTS", 100)
    assert _nearest(rows) == pytest.approx(whole, abs=0.03)
    assert _nearest(torch.cat([rows, rows])) == pytest.approx(1, abs=1e-5)
    assert _nearest(rows[:1]) != _nearest(rows[:1])  # NaN: there is no other


def test_explained_variance_beside_the_library(measured):
    """Its own function, on the tokens that were held out, as one batch."""
    main = pytest.importorskip("sae_bench.evals.core.main", reason="SAEBench, the oracle, is not installed")
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    x, sae, held, numbers = measured
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, "tiny"

    class Model:
        def run_with_cache(self, tokens, **_):
            return None, {HOOK: x[held].unflatten(0, (-1, 50))}

    class Store:
        def get_batch_tokens(self, _):
            return torch.zeros(int(held.sum()) // 50, 50, dtype=torch.int64)

    found, _ = main.get_sparsity_and_variance_metrics(
        load_and_format_sae("sae", sae, "cpu")[1], Model(), Store(), n_batches=1, compute_l2_norms=True,
        compute_sparsity_metrics=True, compute_variance_metrics=True, compute_featurewise_density_statistics=True,
        eval_batch_size_prompts=1, model_kwargs={},
    )  # fmt: skip
    assert numbers["saebench/explained_variance"] == pytest.approx(found["explained_variance"], rel=1e-4)
    key = "relative_reconstruction_bias"
    assert numbers[f"saebench/{key}"] == pytest.approx(found[key], rel=1e-4)
    weights = main.get_featurewise_weight_based_metrics(sae)
    for ours, theirs in (("max_decoder_cosine", "max_decoder_cosine_sim"), ("encoder_decoder_cosine",) * 2):
        name = theirs if theirs in weights else "encoder_decoder_cosine_sim"
        assert numbers[ours] == pytest.approx(sum(weights[name]) / F, abs=1e-5)
