"""Small language models, SAEs and texts for runs in seconds: real formats, random weights."""

import torch
from sae_lens.registry import get_sae_class

from darkmatter_ext.activations.text import Document
from darkmatter_ext.measurement.settings import Settings, replaced

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


def word_tokenizer():
    """A tokenizer whose tokens are WORDS, digits and a comma."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<bos>", *sorted(set(WORDS)), *"0123456789,"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>")


def small_model(kind):
    """A gpt2, llama or gemma2 of three blocks and width 16."""
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


def save_model(folder, kind="llama"):
    """That model with that tokenizer, as a folder of Hugging Face's format."""
    small_model(kind).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def text_documents(n=6, words=100, seed=1):
    """Documents of random WORDS."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(n):
        picks = torch.randint(len(WORDS), (words,), generator=generator).tolist()
        yield Document(str(number), " ".join(WORDS[pick] for pick in picks))


def write_text(path, n=12, words=1500):
    """A text file of such documents."""
    documents = text_documents(n, words, seed=2)
    path.write_text("\n".join(f"=== {document.name}\n{document.text}" for document in documents))


def write_tasks(path, rows=80):
    """A file of two tasks on texts of WORDS, "has sparse" and "has model", two rows a document, two domains."""
    generator = torch.Generator().manual_seed(3)
    lines = ["prompt,target,task,document,domain"]
    for word in ("sparse", "model"):
        for number in range(rows):
            picks = torch.randint(len(WORDS), (6,), generator=generator).tolist()
            words = [WORDS[pick] for pick in picks if WORDS[pick] not in (word, "it")] + ["it"]
            label = number // 2 % 2
            words[-1] = word if label else "it"
            lines.append(f"{' '.join(words)},{label},has {word},{number // 2},{number % 2}")
    path.write_text("\n".join(lines))


def write_pairs(path):
    """A file of two relations, words of WORDS and the same after "the" or "of"."""
    words = sorted(set(WORDS) - {"the", "of"})
    lines = [f"{first},{word},{first} {word}" for first, own in (("the", words[:5]), ("of", words[5:])) for word in own]
    path.write_text("\n".join(["relation,a,b", *lines]))


def small_sae(architecture, d_in, d_sae, seed, *, bias=-0.2, threshold=0.7):
    """A random SAE whose decoder is its encoder's transpose, so that it reconstructs something."""
    torch.manual_seed(seed)
    sae_class, cfg_class = get_sae_class(architecture)
    more = {"k": 4} if architecture == "topk" else {}
    sae = sae_class(cfg_class(d_in=d_in, d_sae=d_sae, dtype="float32", device="cpu", **more))
    directions = torch.randn(d_sae, d_in)
    directions /= directions.norm(dim=1, keepdim=True)
    weights = {"W_enc": directions.T.contiguous(), "W_dec": 0.8 * directions, "b_dec": torch.full((d_in,), 0.1)}
    weights["b_enc"] = torch.full((d_sae,), bias)
    if architecture == "jumprelu":
        weights["threshold"] = torch.full((d_sae,), threshold)
    sae.load_state_dict(weights)
    return sae.eval().requires_grad_(False)


def saved_sae(folder, d_in=16, d_sae=24, seed=0, architecture="topk", bias=0.0, threshold=0.01, **metadata):
    """Such an SAE as a folder, with what its metadata says; the defaults suit the small activations of `small_model`."""
    sae = small_sae(architecture, d_in, d_sae, seed, bias=bias, threshold=threshold)
    for key, value in metadata.items():
        sae.cfg.metadata[key] = value
    sae.save_model(folder)
    return str(folder)


def make_workplace(folder):
    """A small Llama with a word tokenizer in `model`, a text of twelve documents, tasks for probes, word pairs."""
    save_model(folder / "model")
    write_text(folder / "text.txt")
    write_tasks(folder / "tasks.csv")
    write_pairs(folder / "pairs.csv")
    return folder


def settings_of(result):
    """The settings that a result tells, without those of its experiment."""
    known = Settings().flat()
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in result.config.items() if name in known}
    return replaced(Settings(), **values)


def flags(workplace, *more, experiment="decomposition", hook="blocks.1.hook_resid_post"):
    """Arguments of `darkmatter run` on it; without a hook where given SAEs name theirs."""
    return [
        "run", experiment, "--model", str(workplace / "model"), *(["--hook", hook] if hook else []),
        "--text", str(workplace / "text.txt"), "--tokens", "16000", "--context-length", "32", "--widths", "24", "48",
        "--k", "4", "--steps", "30", *more,
    ]  # fmt: skip
