"""Word pairs: the built-in file, files of a user, halves that share no word."""

import pytest
import torch

from darkmatter_ext.measurement.word_pairs import read_pairs
from darkmatter_ext.runtime.inputs import InputError


def _file(path, *rows, header="relation,a,b"):
    path.write_text("\n".join([header, *rows]))
    return str(path)


def test_built_in_pairs_are_twelve_relations_of_twenty():
    pairs = read_pairs()
    assert len(pairs.relations) == 12
    assert torch.bincount(pairs.labels).tolist() == [20] * 12
    assert len(pairs.words) == 480
    assert len(pairs.groups().unique()) == 240


def test_halves_share_no_word(tmp_path):
    rows = [f"r,a{i // 2},b{i}" for i in range(12)]  # two pairs share each a
    rows += [f"s,c{i},{'a1' if i == 3 else f'd{i}'}" for i in range(6)]  # one shares a word with r's
    pairs = read_pairs(_file(tmp_path / "p.csv", *rows))
    halves = pairs.halves(seed=0)
    sides = [
        {
            word
            for words in (pairs.first, pairs.second)
            for word, own in zip(words, halves.tolist(), strict=True)
            if own == side
        }
        for side in (True, False)
    ]
    assert not sides[0] & sides[1]
    for relation in range(2):
        assert halves[pairs.labels == relation].sum() >= 2
        assert (~halves)[pairs.labels == relation].sum() >= 2
    assert not torch.equal(halves, pairs.halves(seed=1))


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("relation,from,to", ["r,a,b"], "pairs: must have rows with the columns relation, a and b, got the columns relation"),
        ("relation,a,b", [], "pairs: must have rows with the columns relation, a and b, got no pairs in"),
        ("relation,a,b", ["r,a,b", "r,,c"], "pairs: must have a relation and two words in every row, got none in line 3"),
        ("relation,a,b", ["r,a,b", "r,c,d"], "pairs: must be of at least two relations, got 'r' alone"),
        (
            "relation,a,b", [f"{r},{r}{i},x{r}{i // 3}" for r in "rs" for i in range(6)],
            "pairs: must have at least 4 pairs without a common word in each relation, got 2 in 'r'",
        ),
    ],
)  # fmt: skip
def test_bad_files_give_one_line(tmp_path, header, rows, message):
    with pytest.raises(InputError) as told:
        read_pairs(_file(tmp_path / "p.csv", *rows, header=header))
    assert message in str(told.value)
    assert "\n" not in str(told.value)
    with pytest.raises(InputError, match="pairs: must be a readable CSV file"):
        read_pairs(str(tmp_path / "none.csv"))
