"""Contexts, the activation cache and token roles, on small random-weight models in real Hugging Face formats."""

import pytest
import torch

from darkmatter_ext.activations import store
from darkmatter_ext.activations.sources import CacheSource, SelectedContexts
from darkmatter_ext.activations.text import Document
from darkmatter_ext.measurement.settings import Measure
from darkmatter_ext.measurement.stored_tokens import MeasuredBatches, StoredTokens
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT, SAE_TRAINING, UNUSED, TokenRoles, training_contexts

WORDS = [
    "the",
    "sparse",
    "code",
    "of",
    "a",
    "model",
    "explains",
    "most",
    "of",
    "what",
    "it",
    "represents",
    "but",
    "never",
    "all",
    "of",
    "it",
]


def _word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<bos>", *sorted(set(WORDS))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>")


def _small_model(kind):
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=64)
        return transformers.GPT2LMHeadModel(config)
    common = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**common, head_dim=8))


@pytest.fixture(params=["gpt2", "llama", "gemma2"])
def model_folder(request, tmp_path, monkeypatch):
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / request.param
    _small_model(request.param).save_pretrained(folder)
    _word_tokenizer().save_pretrained(folder)
    return str(folder)


def _documents(n=6, words=100):
    generator = torch.Generator().manual_seed(1)
    for number in range(n):
        picks = torch.randint(len(WORDS), (words,), generator=generator).tolist()
        yield Document(str(number), " ".join(WORDS[pick] for pick in picks))


def _contexts(model_folder, n_tokens=160, context_length=16):
    tokenizer = store.load_tokenizer(model_folder)
    return store.tokenize_contexts(tokenizer, _documents(), n_tokens=n_tokens, context_length=context_length)


def test_contexts_are_whole_start_with_bos_and_never_cross_documents(model_folder):
    contexts = _contexts(model_folder)
    tokenizer = store.load_tokenizer(model_folder)
    assert contexts.tokens.shape == (10, 16)
    assert (contexts.tokens[:, 0] == tokenizer.bos_token_id).all()
    texts = [document.text for document in _documents()]
    for row, number in zip(contexts.tokens, contexts.documents, strict=True):
        assert tokenizer.decode(row[1:]) in texts[int(number)]
    assert contexts.documents.tolist() == [0] * 6 + [1] * 4  # 100 words hold 6 contexts of 15


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
