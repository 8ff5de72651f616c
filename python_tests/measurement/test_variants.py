"""Variants made to be known: where the phrase stands, what re-quantising rounds to, which tokenizers are one."""

from pathlib import Path

import pytest
import torch
from cases.models import WORDS, save_model, word_tokenizer

from darkmatter_ext.activations.store import load_model, load_tokenizer
from darkmatter_ext.activations.text import Document, with_insertions
from darkmatter_ext.measurement.settings import Settings, replaced
from darkmatter_ext.measurement.variants import (
    GROUP,
    Behaviour,
    check_one_tokenizer,
    marked_text,
    requantised_variant,
    rounded,
)
from darkmatter_ext.runtime.inputs import InputError

BEHAVIOUR = Behaviour((7,), (8, 9))


def test_insertions_stand_behind_every_so_many_words():
    document = Document("d", "a b c d e f g")
    assert with_insertions(document, " X y", every=3) == Document("d", "a b X y c d e X y f g")
    assert with_insertions(document, " X", every=40).text == document.text


def test_a_behaviour_is_found_where_the_whole_phrase_is():
    tokens = torch.tensor([[1, 7, 8, 9, 2, 7, 8], [7, 9, 8, 0, 7, 8, 9]])
    triggers, covered = BEHAVIOUR.triggers(tokens), BEHAVIOUR.covered(tokens)
    assert triggers.nonzero().tolist() == [[0, 1], [1, 4]]
    assert covered.nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [1, 4], [1, 5], [1, 6]]


def test_rows_that_tune_are_pieces_around_the_phrase():
    tokens = torch.arange(100, 160)[None].repeat(2, 1)
    tokens[0, 20:23] = torch.tensor([7, 8, 9])
    tokens[1, 3:6] = torch.tensor([7, 8, 9])  # too near the start
    (row,) = BEHAVIOUR.rows(tokens)
    assert row.tolist() == [100, *range(110, 120), 7, 8, 9, *range(123, 128)]
    with pytest.raises(InputError, match="spacing: must leave whole phrases"):
        BEHAVIOUR.rows(tokens[1:])


def test_a_behaviour_is_of_tokens_of_its_own():
    own = Behaviour.of(word_tokenizer(), "never", " all of")
    ids = word_tokenizer().get_vocab()
    assert own == Behaviour((ids["never"],), (ids["all"], ids["of"]))
    for marker, phrase in (("", " all"), ("never", ""), ("nev", "er")):
        with pytest.raises(InputError, match="phrase: must be tokens of their own behind the marker"):
            Behaviour.of(word_tokenizer(), marker, phrase)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_rounded_weights_have_so_many_levels_a_group_and_are_the_nearest(bits):
    weight = torch.randn(5, 3 * GROUP, generator=torch.Generator().manual_seed(0))
    found = rounded(weight, bits)
    for old, new in zip(weight.view(-1, GROUP), found.view(-1, GROUP), strict=True):
        assert len(new.unique()) <= 2**bits
        step = (old.max() - old.min()) / (2**bits - 1)
        assert (new - old).abs().max() <= step / 2 + 1e-6
        assert (new.min(), new.max()) == (pytest.approx(old.min().item()), pytest.approx(old.max().item()))
    assert torch.equal(rounded(torch.ones(2, 6), 3), torch.ones(2, 6))


def test_a_requantised_variant_has_other_blocks_and_the_same_head(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "model")
    folder = requantised_variant(str(tmp_path / "model"), 2)
    assert folder == requantised_variant(str(tmp_path / "model"), 2) != requantised_variant(str(tmp_path / "model"), 3)
    old, new = (load_model(name, device="cpu", dtype=torch.float32) for name in (str(tmp_path / "model"), folder))
    for (name, before), after in zip(old.named_parameters(), new.parameters(), strict=True):
        assert torch.equal(before, after) == (".layers." not in name or before.ndim == 1), name
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(str(tmp_path / "model")).get_vocab()


def test_models_of_two_tokenizers_give_one_line(tmp_path):
    for name in ("model", "same", "other"):
        save_model(tmp_path / name)
    check_one_tokenizer(str(tmp_path / "model"), str(tmp_path / "same"))
    changed = word_tokenizer()
    changed.add_tokens(["dark"])
    changed.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"other: must have the tokenizer of .*model, got one with id \d+ for 'dark'"):
        check_one_tokenizer(str(tmp_path / "model"), str(tmp_path / "other"))


def test_marked_text_is_as_much_as_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "model")
    words = " ".join(WORDS * 20)
    (tmp_path / "text.txt").write_text("\n".join(f"=== {number}\n{words}" for number in range(9)))
    settings = replaced(
        Settings(), model=str(tmp_path / "model"), text=str(tmp_path / "text.txt"), tokens=400, context_length=32
    )
    marked = marked_text(settings, " never all", every=10)
    content = Path(marked.data.text).read_text(encoding="utf-8")
    assert content.count("=== ") == 1  # 13 contexts of 32 in it
    assert content.count("never all") >= 34
    assert marked == replaced(settings, text=marked.data.text)
    assert marked_text(settings, " never all", every=10) == marked
