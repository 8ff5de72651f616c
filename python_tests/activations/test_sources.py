"""Sources of activations: hook points against TransformerLens, caches against the model, tokens against datasets."""

import json

import pytest
import torch
from cases.models import small_model, text_documents, word_tokenizer

from darkmatter_ext.activations import hook_points, sources, store
from darkmatter_ext.activations.contexts import ContextStore, text_rows, tokenised_rows, write_contexts

KINDS = hook_points.KINDS


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2"])
def model_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / request.param
    small_model(request.param).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def _store(folder, model_folder, n=6, length=12):
    rows = text_rows(store.load_tokenizer(model_folder), text_documents(), context_length=length, prepend_bos=True)
    return write_contexts(folder / "contexts", rows, n_contexts=n, context_length=length)


def test_every_hook_point_equals_transformer_lens(model_folder, tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    store = _store(tmp_path, model_folder)
    hooks = [f"blocks.{layer}.{kind}" for layer in (0, 1) for kind in KINDS]
    found = sources.ModelSource.load(model_folder, hooks, store).read([4, 1]).activations
    _, cache = TransformerBridge.boot_transformers(model_folder, device="cpu").run_with_cache(store.tokens([4, 1]))
    for hook in hooks:
        expected = cache[hook].flatten(start_dim=2)
        torch.testing.assert_close(found[hook], expected, rtol=1e-4, atol=1e-5, msg=lambda m, hook=hook: f"{hook}: {m}")


def _other_family(kind):
    import transformers

    torch.manual_seed(0)
    common = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    classes = {
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }
    config, model = classes[kind]
    return model(config(**common)).eval()


@pytest.mark.parametrize("family", [*hook_points.FAMILIES])
def test_the_residual_stream_adds_up_in_every_family(family):
    """mid = pre + attn_out, post = mid + mlp_out, and attn_out comes from z: the definitions, whatever the module names."""
    network = small_model(family).eval() if family in ("gpt2", "llama", "gemma2") else _other_family(family)
    tokens = torch.randint(2, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    names = {kind: f"blocks.1.{kind}" for kind in KINDS}
    with torch.no_grad():
        found = hook_points.capture(network, list(names.values()), lambda: network(tokens, use_cache=False))
    pre, mid, post, attn, mlp, z, normalised, mlp_in, mlp_out = (found[names[kind]] for kind in KINDS)
    torch.testing.assert_close(mid, pre + attn, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(post, mid + mlp, rtol=1e-4, atol=1e-5)
    block = hook_points.transformer_blocks(network)[1]
    norm = block.get_submodule(hook_points.FAMILIES[family]["ln2.hook_normalized"][0])
    with torch.no_grad():
        gain = 1 + norm.weight if family.startswith("gemma") else norm.weight
        torch.testing.assert_close(normalised * gain + getattr(norm, "bias", 0), mlp_in, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(block.mlp(mlp_in), mlp_out, rtol=1e-4, atol=1e-5)
        if family == "gpt2":
            torch.testing.assert_close(block.attn.c_proj(z), attn)
        elif not family.startswith("gemma"):  # Gemma norms what attention writes
            torch.testing.assert_close(block.self_attn.o_proj(z), attn)


def test_the_model_stops_after_the_deepest_hook(model_folder):
    from transformers import AutoModelForCausalLM

    network, ran = AutoModelForCausalLM.from_pretrained(model_folder).eval(), []
    for layer, block in enumerate(hook_points.transformer_blocks(network)):
        block.register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    hook_points.capture(network, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid"], lambda: network(tokens))
    assert ran == [0, 1]


def test_unknown_families_and_hooks_are_refused_in_one_line(model_folder, tmp_path):
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    network, tokens = transformers.GPTNeoXForCausalLM(config).eval(), torch.zeros(1, 4, dtype=torch.int64)
    hook_points.capture(network, ["blocks.1.hook_resid_post"], lambda: network(tokens))
    with pytest.raises(ValueError, match=r"hook_mlp_out must be read from a model of gpt2, .* of a gpt_neox model"):
        hook_points.capture(network, ["blocks.1.hook_mlp_out"], lambda: network(tokens))
    with pytest.raises(ValueError, match=r"has blocks 0 to 2, got block 7"):
        sources.ModelSource.load(model_folder, ["blocks.7.hook_resid_pre"], _store(tmp_path, model_folder))
    with pytest.raises(ValueError, match=r"hook: must be like blocks.10.hook_resid_post, got 'blocks.1.hook_q'"):
        hook_points.parse_hook_point("blocks.1.hook_q")
    assert hook_points.translated_hook("model.layers.7") == "blocks.7.hook_resid_post"
    assert hook_points.translated_hook("model.layers.7.mlp") == "model.layers.7.mlp"


def test_the_loss_is_the_models_own(model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    store = _store(tmp_path, model_folder)
    source = sources.ModelSource.load(model_folder, ["blocks.0.hook_resid_post"], store, loss=True)
    batch = source.read([0, 3])
    tokens = store.tokens([0, 3])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model_folder).eval()(tokens, labels=tokens).loss
    assert batch.loss is not None
    assert batch.loss[:, -1].isnan().all()
    assert batch.loss[:, :-1].mean().item() == pytest.approx(expected.item(), rel=1e-5)
    plain = sources.ModelSource.load(model_folder, ["blocks.0.hook_resid_post"], store).read([0, 3])
    torch.testing.assert_close(batch.activations, plain.activations)
    assert source.widths == {"blocks.0.hook_resid_post": 16}


def test_processed_weights_come_from_transformer_lens(tmp_path):
    folder = tmp_path / "gpt2"
    small_model("gpt2").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    store, hooks = _store(tmp_path, str(folder)), ["blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"]
    plain = sources.ModelSource.load(str(folder), hooks, store).read([0, 2]).activations
    asked = sources.asked_processing({"center_writing_weights": True, "fold_ln": False})
    assert asked == {"center_writing_weights": True}
    centred = sources.LensSource.load(str(folder), hooks, store, processing=asked).read([0, 2]).activations
    resid, z = (plain[hook] for hook in hooks)
    torch.testing.assert_close(centred[hooks[0]], resid - resid.mean(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(centred[hooks[1]], z, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"hook: must be a hook point of .* in TransformerLens"):
        sources.LensSource.load(str(folder), ["blocks.9.hook_resid_pre"], store, processing=asked)
    with pytest.raises(ValueError, match=r"model: must be a model TransformerLens can load"):
        sources.LensSource.load(str(tmp_path / "none"), hooks, store, processing=asked)


def test_caches_give_what_the_model_gives(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "CONTEXTS_PER_SHARD", 3)
    tokenizer = store.load_tokenizer(model_folder)
    contexts = store.tokenize_contexts(tokenizer, text_documents(), n_tokens=120, context_length=12)
    hooks = ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"]
    caches = [store.activation_cache(model_folder, hook, contexts) for hook in hooks]
    source = sources.open_cache([cache.folder for cache in caches])
    numbers = [1, 2, 3, 4, 9, 0]  # across shards, back and forth
    batch = source.read(numbers)
    assert torch.equal(batch.tokens, contexts.tokens[numbers])
    for hook, cache in zip(hooks, caches, strict=True):
        stored = torch.cat([shard.activations for shard in cache.shards()])
        assert torch.equal(batch.activations[hook], stored[numbers])
    assert (source.n_contexts, source.context_length) == (10, 12)
    assert torch.equal(source.documents, contexts.documents)
    assert source.widths == dict.fromkeys(hooks, 16)
    with pytest.raises(ValueError, match=r"cache: must be a folder of activations"):
        sources.open_cache([tmp_path])
    other = store.tokenize_contexts(tokenizer, text_documents(), n_tokens=60, context_length=12)
    mixed = store.activation_cache(model_folder, "blocks.0.hook_resid_post", other)
    with pytest.raises(ValueError, match=r"cache: must be of the same tokens"):
        sources.open_cache([caches[0].folder, mixed.folder])


def test_datasets_cached_by_sae_lens_are_read(tmp_path):
    """Written by SAELens' own runner from a Llama in Hugging Face format; the same tokens through our model source."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    folder = tmp_path / "llama"
    small_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    ids = torch.randint(2, 14, (8, 12), generator=torch.Generator().manual_seed(0))
    Dataset.from_dict({"tokens": ids.tolist()}).save_to_disk(str(tmp_path / "tokens"))
    cfg = CacheActivationsRunnerConfig(
        dataset_path=str(tmp_path / "tokens"), model_name=str(folder), model_class_name="AutoModelForCausalLM",
        model_batch_size=2, hook_name="model.layers.1", d_in=16, training_tokens=96, context_size=12,
        new_cached_activations_path=str(tmp_path / "cached"), shuffle=False, prepend_bos=False, device="cpu",
        streaming=False, buffer_size_gb=4 * 12 * 16 * 4 / 1e9,  # four contexts: two shards
    )  # fmt: skip
    CacheActivationsRunner(cfg, override_dataset=Dataset.from_dict({"tokens": ids.tolist()})).run()
    source = sources.open_cache([tmp_path / "cached"])
    batch = source.read([5, 0, 6])
    assert source.widths == {"model.layers.1": 16}
    assert (source.n_contexts, source.context_length) == (8, 12)
    rows = tokenised_rows(str(tmp_path / "tokens"), context_length=12)
    store = write_contexts(tmp_path / "contexts", rows, n_contexts=8, context_length=12)
    assert torch.equal(batch.tokens, store.tokens([5, 0, 6]))
    ours = sources.ModelSource.load(str(folder), ["blocks.1.hook_resid_post"], store).read([5, 0, 6])
    torch.testing.assert_close(
        batch.activations["model.layers.1"], ours.activations["blocks.1.hook_resid_post"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("column", ["input_ids", "tokens"])
def test_tokenised_datasets_are_used_as_they_are(tmp_path, column):
    from datasets import Dataset

    rows = [[5] * 12, [6] * 7, [7] * 14]
    Dataset.from_dict({column: rows}).save_to_disk(str(tmp_path / "saved"))
    assert [*tokenised_rows(str(tmp_path / "saved"), context_length=12)] == [(0, [5] * 12), (2, [7] * 12)]
    Dataset.from_dict({column: rows}).to_parquet(tmp_path / "data" / "rows.parquet")
    assert len([*tokenised_rows(str(tmp_path / "data"), context_length=7)]) == 3
    Dataset.from_dict({"words": [["a"]]}).save_to_disk(str(tmp_path / "words"))
    with pytest.raises(ValueError, match=r"tokenised: must have a column input_ids or tokens, got \['words'\]"):
        next(tokenised_rows(str(tmp_path / "words"), context_length=1))
    with pytest.raises(ValueError, match=r"tokenised: must be a dataset that can be loaded"):
        next(tokenised_rows(str(tmp_path / "none"), context_length=1))


def test_contexts_on_disk_are_those_in_memory(model_folder, tmp_path):
    stored = _store(tmp_path, model_folder, n=10, length=16)
    tokenizer = store.load_tokenizer(model_folder)
    expected = store.tokenize_contexts(tokenizer, text_documents(), n_tokens=160, context_length=16)
    assert torch.equal(stored.tokens(range(10)), expected.tokens)
    assert torch.equal(stored.documents, expected.documents)
    rows = text_rows(tokenizer, text_documents(), context_length=16, prepend_bos=False, per_document=1)
    firsts = write_contexts(tmp_path / "firsts", rows, n_contexts=6, context_length=16)
    assert firsts.documents.tolist() == [0, 1, 2, 3, 4, 5]
    assert (firsts.tokens([3])[0, 0] != tokenizer.bos_token_id).item()
    rows = text_rows(tokenizer, text_documents(), context_length=16, prepend_bos=False, per_document=1)
    with pytest.raises(ValueError, match=r"tokens: the text gives 6 whole contexts of 16 tokens, 96 tokens in all"):
        write_contexts(tmp_path / "more", rows, n_contexts=7, context_length=16)
    assert not (tmp_path / "more").exists()
    (tmp_path / "firsts" / "contexts.json").write_text(json.dumps({"n_contexts": 6}))
    with pytest.raises(RuntimeError, match=r"contexts: .* is damaged .*; delete it"):
        ContextStore.open(tmp_path / "firsts")
