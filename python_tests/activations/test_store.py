"""Contexts and the activation cache, on small random-weight models in real Hugging Face formats."""

import pytest
import torch
from cases.models import save_model, text_documents

from darkmatter_ext.activations import store


@pytest.fixture(params=["gpt2", "llama", "gemma2"])
def model_folder(request, tmp_path, monkeypatch):
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / request.param
    save_model(folder, request.param)
    return str(folder)


def _contexts(model_folder, n_tokens=160, context_length=16):
    tokenizer = store.load_tokenizer(model_folder)
    return store.tokenize_contexts(tokenizer, text_documents(), n_tokens=n_tokens, context_length=context_length)


def test_contexts_are_whole_start_with_bos_and_never_cross_documents(model_folder):
    contexts = _contexts(model_folder)
    tokenizer = store.load_tokenizer(model_folder)
    assert contexts.tokens.shape == (10, 16)
    assert (contexts.tokens[:, 0] == tokenizer.bos_token_id).all()
    texts = [document.text for document in text_documents()]
    for row, number in zip(contexts.tokens, contexts.documents, strict=True):
        assert tokenizer.decode(row[1:]) in texts[int(number)]
    assert contexts.documents.tolist() == [0] * 6 + [1] * 4  # 100 words hold 6 contexts of 15


def test_at_most_so_many_contexts_of_a_document(model_folder):
    tokenizer = store.load_tokenizer(model_folder)
    contexts = store.tokenize_contexts(tokenizer, text_documents(), n_tokens=64, context_length=16, per_document=2)
    assert contexts.documents.tolist() == [0, 0, 1, 1]
    assert torch.equal(contexts.tokens[:2], _contexts(model_folder).tokens[:2])


def test_the_model_is_given_so_many_tokens_at_a_time(model_folder):
    contexts, done = _contexts(model_folder), []
    store.activation_caches(
        model_folder, ["blocks.0.hook_resid_post"], contexts, forward_tokens=50, progress=done.append
    )
    assert done == [48, 48, 48, 16]  # whole contexts


def test_cached_activations_equal_the_models_own_hidden_states(model_folder):
    from transformers import AutoModelForCausalLM

    contexts, done = _contexts(model_folder), []
    cache = store.activation_cache(model_folder, "blocks.1.hook_resid_post", contexts, progress=done.append)
    network = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with torch.no_grad():
        hidden = network(contexts.tokens, output_hidden_states=True, use_cache=False).hidden_states[2]
    stored = torch.cat([shard.activations for shard in cache.shards()])
    torch.testing.assert_close(stored, hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cache.column("norms"), stored.norm(dim=-1))
    assert torch.equal(cache.column("tokens"), contexts.tokens)
    assert (sum(done), cache.d_in, cache.n_contexts, cache.context_length) == (160, 16, 10, 16)


def test_the_cache_is_used_again_and_a_damaged_one_is_told(model_folder, monkeypatch):
    contexts = _contexts(model_folder)
    cache = store.activation_cache(model_folder, "blocks.0.hook_resid_post", contexts)
    monkeypatch.setattr(store, "load_model", None)  # a second forward pass would fail
    again = store.activation_cache(model_folder, "blocks.0.hook_resid_post", contexts)
    assert again.folder == cache.folder
    shard = next(again.folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(RuntimeError, match=r"is damaged .* delete") as caught:
        list(again.shards())
    assert "\n" not in str(caught.value)


def test_a_failed_pass_leaves_no_cache(model_folder):
    contexts = _contexts(model_folder)

    def stop(_tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.activation_cache(model_folder, "blocks.0.hook_resid_post", contexts, progress=stop)
    assert list(store.cache_dir("activations").iterdir()) == []


def test_bad_models_sites_and_lengths_are_named_in_one_line(model_folder, tmp_path):
    contexts = _contexts(model_folder)
    calls = [
        (lambda: store.activation_cache(model_folder, "blocks.3.hook_resid_post", contexts), "has blocks 0 to 2"),
        (lambda: store.parse_hook("blocks.1.hook_pattern"), "hook: must be like"),
        (lambda: store.load_tokenizer(str(tmp_path / "none")), "model: must be a causal language model"),
        (lambda: store.load_model(str(tmp_path), device="cpu", dtype=torch.float32), "model: must be a causal"),
        (lambda: _contexts(model_folder, n_tokens=10_000), "tokens: the text gives 36 whole contexts of 16 tokens"),
        (lambda: _contexts(model_folder, context_length=1), "context_length: must be at least 2, got 1"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=r"^(hook|model|tokens|context_length): ") as caught:
            call()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
