"""SAEs handed to SAEBench: what it takes, the same numbers as with plain ones; its own code where it is installed."""

import pytest
import torch
from cases import saes  # noqa: F401  (small SAEs may be fast)
from cases.formats import write_sparsify
from cases.models import saved_sae

from darkmatter_ext import deaccelerate, is_accelerated, stats
from darkmatter_ext.saes.loading import load_sae
from darkmatter_ext.saes.sae_bench import selected_saes

HOOK = "blocks.1.hook_resid_post"


def test_pairs_of_names_and_accelerated_saes(tmp_path):
    named = saved_sae(tmp_path / "a", architecture="jumprelu", hook_name=HOOK, model_name="tiny", threshold=0.5)
    bare = saved_sae(tmp_path / "b", seed=1)
    (first, a), (second, b) = selected_saes([named, bare], model="gpt2", hook="blocks.2.hook_resid_pre")
    assert (first, second) == (named, bare)
    assert is_accelerated(a)
    assert is_accelerated(b)
    assert (a.cfg.metadata.model_name, a.cfg.metadata.hook_name) == ("tiny", HOOK)
    assert (b.cfg.metadata.model_name, b.cfg.metadata.hook_name) == ("gpt2", "blocks.2.hook_resid_pre")
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(24))  # from 0.8
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(a(x), load_sae(named)(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b(x), load_sae(bare)(x), rtol=1e-5, atol=1e-5)


def test_what_sae_bench_cannot_evaluate_is_refused(tmp_path):
    bare = saved_sae(tmp_path / "b")
    with pytest.raises(ValueError, match=r"^model: must be given, .* does not say its own, got none"):
        selected_saes([bare])
    with pytest.raises(ValueError, match=r"^hook: must be given"):
        selected_saes([bare], model="gpt2")
    with pytest.raises(ValueError, match=r"^hook: must be of a block"):
        selected_saes([bare], model="gpt2", hook="hook_embed")
    folder, _ = write_sparsify(tmp_path / "run", module="layers.1.mlp", transcode=True)
    with pytest.raises(ValueError, match=r"^specs: must reconstruct their own input, got the topk_transcoder"):
        selected_saes([str(folder)], model="gpt2")


class _Store:
    """What `run_evals` asks of SAELens' ActivationsStore: batches of tokens."""

    store_batch_size_prompts, context_size = 4, 16

    def __init__(self):
        self.reset_input_dataset()

    def reset_input_dataset(self):
        self.generator = torch.Generator().manual_seed(0)

    def get_batch_tokens(self, n):
        return torch.randint(3, 30, (n, self.context_size), generator=self.generator)


def test_sae_bench_itself_gives_the_numbers_it_gives_plain_saes(tmp_path):
    main = pytest.importorskip("sae_bench.evals.core.main", reason="SAEBench, the oracle, is not installed")
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=16, d_head=8, n_heads=2, d_vocab=32, act_fn="gelu", device="cpu"
    )
    model = HookedTransformer(config)
    more = {"hook_name": HOOK, "model_name": "tiny", "context_size": 16, "prepend_bos": False}
    spec = saved_sae(tmp_path / "a", d_sae=64, **more)
    evaluation = CoreEvalConfig(
        model_name="tiny", batch_size_prompts=4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2,
        compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    found = []
    for (name, sae), plain in ((selected_saes([spec])[0], False), (selected_saes([spec])[0], True)):
        own = load_and_format_sae(name, deaccelerate(sae) if plain else sae, "cpu")[1]
        found.append(main.run_evals(own, _Store(), model, evaluation))
        if not plain:
            assert sum(stats(own).fast.values()) > 0
    (fast, features), (slow, more_features) = found
    assert fast.keys() == slow.keys()
    for group in fast:
        assert fast[group] == pytest.approx(slow[group], rel=1e-4, abs=1e-5, nan_ok=True), group
    assert features.keys() == more_features.keys()
