"""A small language model with a text, for end-to-end runs in seconds: real formats, random weights."""

import torch
from test_activations import WORDS, _small_model, _word_tokenizer

from darkmatter_ext.measurement.settings import Settings, replaced


def make_workplace(folder):
    """A small Llama with a word tokenizer in `model`, and a text of twelve documents."""
    _small_model("llama").save_pretrained(folder / "model")
    _word_tokenizer().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(2)
    documents = []
    for number in range(12):
        picks = torch.randint(len(WORDS), (1500,), generator=generator).tolist()
        documents.append(f"=== {number}\n" + " ".join(WORDS[pick] for pick in picks))
    (folder / "text.txt").write_text("\n".join(documents))
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
