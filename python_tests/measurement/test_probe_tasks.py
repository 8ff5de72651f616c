"""Tasks for probes: files, built-in ones, the rows that probes are fitted on, and what they read of a text."""

import math

import pytest
import torch
from cases.planted import planted_sae
from scipy import stats

from darkmatter_ext.activations.text import Document, Paragraph, installed_paragraphs
from darkmatter_ext.activations.text_sites import TextSites
from darkmatter_ext.estimators.least_squares import LinearMap
from darkmatter_ext.estimators.probes import arrows, dense, validation_folds
from darkmatter_ext.measurement.probe_features import PARTS, codes, features, words
from darkmatter_ext.measurement.probe_regimes import Regimes, draws
from darkmatter_ext.measurement.probe_tasks import british, read_tasks, shuffled_words, tasks_of
from darkmatter_ext.runtime.inputs import InputError


def _file(path, *rows, header="prompt,target,task,document,domain"):
    path.write_text("\n".join([header, *rows]))
    return str(path)


def test_a_file_of_two_tasks(tmp_path):
    rows = [f"text {i} here,{'yes' if i % 2 else 'no'},{'ab'[i % 4 // 2]},{i // 3},{i % 2 - 1}" for i in range(40)]
    first, second = read_tasks(_file(tmp_path / "t.csv", *rows))
    assert (first.name, second.name, len(first), len(second)) == ("a", "b", 20, 20)
    assert first.labels[:4].tolist() == [0, 1, 0, 1]  # no before yes
    assert first.documents[:4].tolist() == [0, 0, 1, 1]
    assert first.domains[:4].tolist() == [-1, 0, -1, 0]
    assert not first.shifts
    (plain,) = read_tasks(_file(tmp_path / "plain.csv", "a b,1", "c d,0", header="prompt,target"))
    assert (plain.name, plain.documents.tolist(), plain.domains.tolist()) == ("plain", [0, 1], [-1, -1])


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (
            "text,label",
            ["a,1"],
            "tasks: must have rows with the columns prompt and target, got the columns text, label in",
        ),
        ("prompt,target", [], "tasks: must have rows with the columns prompt and target, got no rows in"),
        ("prompt,target", ["a,1", " ,0"], "must have a prompt and a target in every row, got none in line 3"),
        ("prompt,target", ["a,1", "b,1"], "must have two values of target in every task, got 1 in 't'"),
        ("prompt,target", ["a,1", "b,2", "c,3"], "must have two values of target in every task, got 1, 2, 3 in 't'"),
        ("prompt,target,domain", ["a,1,2", "b,0,1"], "must have the domain 0, 1 or none, got '2' in line 2"),
    ],
)
def test_bad_files_give_one_line(tmp_path, header, rows, message):
    with pytest.raises(InputError) as told:
        read_tasks(_file(tmp_path / "t.csv", *rows, header=header))
    assert message in str(told.value)
    assert "\n" not in str(told.value)
    with pytest.raises(InputError, match="tasks: must be a readable CSV file"):
        read_tasks(str(tmp_path / "none.csv"))


# ---- built-in tasks


def test_spelling_and_order():
    assert british("The Behavior of initialized colors, normalization and size") == (
        "The Behaviour of initialised colours, normalisation and size"
    )
    assert british("unlabeled centers model labels") == "unlabelled centres model labels"
    text = "one two three four five six"
    assert sorted(shuffled_words(text, seed=0).split()) == sorted(text.split())
    assert shuffled_words(text, seed=0) != text
    assert shuffled_words(text, seed=0) == shuffled_words(text, seed=0)


def _paragraphs(n=240):
    made = []
    for i in range(n):
        library = ("numpy", "torch", "scipy", "pandas")[i % 4]
        subject = f"{'ab'[i % 2]}{'xyz'[i // 80]}{'klm'[i // 20 % 3]}"
        rest = f"{'3' if i % 3 else 'three'} {'and `this`' if i % 2 else ''} n_x {'word ' * (i % 5)}"
        text = f"the behavior of {subject} is {rest}"
        made.append(Paragraph(library, f"{library}/{i // 8}", ("class", "function", "module")[i % 3], text))
    return made


def test_built_in_tasks_have_equal_labels_and_whole_documents():
    found, notes = tasks_of(_paragraphs(), 120, seed=0)
    tasks = {task.name: task for task in found}
    assert set(tasks) == {
        "library numpy", "library torch", "library scipy", "library pandas", "class", "number", "quotation", "spelling",
        "shuffled",
    }  # fmt: skip
    assert notes == ["Task 'parameter' is left out: 0 texts of its rarer label."]
    for task in found:
        assert task.labels.double().mean() == 0.5, task.name
        assert len(task) <= 120
    numpy = tasks["library numpy"]
    assert not numpy.shifts
    assert tasks["number"].shifts
    for text, label in zip(tasks["number"].texts, tasks["number"].labels.tolist(), strict=True):
        assert any(c.isdigit() for c in text) == label
    spelled = tasks["spelling"]
    assert all(("behaviour" in text) == bool(y) for text, y in zip(spelled.texts, spelled.labels, strict=True))
    again, _ = tasks_of(_paragraphs(), 120, seed=0)
    assert [task.texts for task in again] == [task.texts for task in found]


def test_installed_paragraphs_leave_out_what_was_read(monkeypatch, tmp_path):
    prose = "This is a sentence that is long enough to be taken for prose by the rule that asks for many letters and for blanks"
    package = tmp_path / "lib"
    package.mkdir()
    for name in ("one", "two", "three"):
        body = "\n\n".join(f"{prose} number {word} in {name}." for word in ("a", "b", "c"))
        (package / f"{name}.py").write_text(f'"""{prose}, all."""\nclass A:\n    """{body}"""\n')
    monkeypatch.setattr("darkmatter_ext.activations.text._libraries", lambda: [("lib", package)])
    options = {"per_document": 2, "words": 10, "seed": 0}
    read = Document("lib/two.py", "")
    found = list(installed_paragraphs(50, **options, without=[read, Document("other", f"{prose}, all.")]))
    assert {own.document for own in found} == {"lib/one.py", "lib/three.py"}
    assert len(found) == 4  # two of each
    assert {own.kind for own in found} == {"class"}
    assert all(own.text == " ".join(prose.split()[:10]) for own in found)
    assert len(list(installed_paragraphs(3, **options))) == 3


# ---- training rows


def _task(n=240, documents=60):
    names = [f"{i % 2},{i % documents},{i % 3 - 1}" for i in range(n)]
    return [f"text {i},{name}" for i, name in enumerate(names)]


def test_documents_are_on_one_side_and_labels_as_asked(tmp_path):
    (task,) = read_tasks(_file(tmp_path / "t.csv", *_task(), header="prompt,target,document,domain"))
    regimes = Regimes(train_sizes=(8, 32, 512), imbalances=(0.1,), label_noise=(0.25,))
    found = draws(task, regimes, seed=0)
    assert [draw.points for draw in found] == [
        ("normal", "noise-0.25"), ("scarcity-8",), ("scarcity-32",), ("imbalance-0.1",), ("shift",),
    ]  # fmt: skip
    for draw in found[:-1]:
        assert not set(task.documents[draw.rows].tolist()) & set(task.documents[draw.test].tolist())
    normal = found[0]
    y = task.labels[normal.rows]
    assert y.double().mean() == 0.5
    assert normal.labels[:, 0].equal(y)
    assert (normal.labels[:, 1] != y).sum() == round(0.25 * len(y))
    assert normal.labels[:, -1].sum() == y.sum()
    assert not normal.labels[:, -1].equal(y)
    assert [len(found[i].rows) for i in (1, 2)] == [8, 32]
    rare = task.labels[found[3].rows]
    assert rare.double().mean() == pytest.approx(0.1, abs=0.02)
    assert task.domains[found[4].rows].unique().tolist() == [0]
    assert task.domains[found[4].test].unique().tolist() == [1]
    assert not torch.equal(draws(task, regimes, seed=1)[0].test, normal.test)


def test_documents_of_a_rare_label_are_on_both_sides(tmp_path):
    """Ten documents of label 1 among many of label 0: every split has about as many of either label on each side."""
    rows = [f"text {i},{int(i < 80)},{i // 8 if i < 80 else i}" for i in range(160)]
    (task,) = read_tasks(_file(tmp_path / "t.csv", *rows, header="prompt,target,document"))
    for seed in range(20):
        test = draws(task, Regimes(), seed=seed)[0].test
        assert task.labels[test].sum() == 32  # 4 of 10 documents
        assert len(test) == 32 + 29


def test_too_few_rows_give_one_line(tmp_path):
    rows = [f"text {i},{int(i < 5)}" for i in range(50)]
    (task,) = read_tasks(_file(tmp_path / "few.csv", *rows, header="prompt,target"))
    with pytest.raises(
        InputError, match="must have at least 8 rows of each label on both sides of a split by document"
    ):
        draws(task, Regimes(), seed=0)
    for values, message in (
        ({"names": ("scarcity",)}, "regimes: must have normal among them, got scarcity"),
        ({"names": ("normal", "x")}, "regimes: must be one of normal, scarcity"),
        ({"train_sizes": ()}, "train_sizes: must name at least one number, got none"),
        ({"train_sizes": (2,)}, "train_sizes: must be at least 4, got 2"),
        ({"imbalances": (0.7,)}, "imbalances: must be above 0 and at most 0.5, got 0.7"),
    ):
        with pytest.raises(InputError, match=message):
            Regimes(**values)


# ---- features


def _sites(x, texts=None):
    texts = torch.arange(len(x)) if texts is None else texts
    return TextSites({"hook": x}, texts, [[0]] * (int(texts.max()) + 1))


def test_a_label_in_the_noise_is_in_the_error_alone():
    """Classes d' apart in noise on a direction that no latent has: AUC(Sae) 0.5, AUC(error) Phi(d' / sqrt 2)."""
    n, d, inside, separation = 6000, 24, 16, 1.2
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    z = (torch.rand(n, inside, generator=generator) < 0.3) * (1 + torch.rand(n, inside, generator=generator))
    y = (torch.rand(n, generator=generator) < 0.5).long()
    noise = torch.randn(n, d - inside, generator=generator)
    noise[:, 0] += separation * y
    x = z @ rows[:inside] + noise @ rows[inside:]
    encode = planted_sae(
        "s",
        "hook",
        lambda x: x @ rows[:inside].mT @ rows[:inside],
        lambda x: (x @ rows[:inside].mT).clamp(min=0),
        inside,
    ).load()
    nothing = LinearMap(torch.zeros(d, d).double(), torch.zeros(d).double(), d, n)
    own = features(_sites(x), "hook", lambda x: encode({"hook": x}), nothing)
    assert set(own) == {"x", "latents", *PARTS}
    torch.testing.assert_close(own["error"] + own["sae"], x)
    torch.testing.assert_close(own["nonlinear"], own["error"])
    torch.testing.assert_close(own["without_nonlinear"], own["sae"])
    folds = validation_folds(y[:1500], seed=0)
    expected = stats.norm.cdf(separation / math.sqrt(2))
    for name, truth in (("sae", 0.5), ("error", expected), ("x", expected), ("latents", 0.5)):
        found = arrows(dense(name), own[name][:1500], y[:1500, None], own[name][1500:], y[1500:], folds)[name]
        assert found.test.item() == pytest.approx(truth, abs=0.025), name


def test_the_linear_error_is_what_b_star_says():
    x = torch.randn(20, 4)
    encode = planted_sae("s", "hook", lambda x: 0.5 * x, lambda x: x.abs(), 4).load()
    b_star = LinearMap(0.2 * torch.eye(4).double(), torch.ones(4).double(), 4, 20)
    own = features(_sites(x), "hook", lambda x: encode({"hook": x}), b_star)
    torch.testing.assert_close(own["linear"], 0.2 * x + 1)
    torch.testing.assert_close(own["nonlinear"], 0.5 * x - 0.2 * x - 1)
    torch.testing.assert_close(own["without_nonlinear"], 0.7 * x + 1)
    mean = features(_sites(x, torch.arange(20) // 5), "hook", lambda x: encode({"hook": x}), b_star)
    torch.testing.assert_close(mean["latents"], x.abs().view(4, 5, 4).mean(1))
    torch.testing.assert_close(codes(_sites(x), "hook", lambda x: encode({"hook": x})), x.abs())


def test_words_are_those_that_several_texts_have():
    found = words([[1, 7, 7, 9]] * 5 + [[1, 9, 3]] * 4)
    assert found.tolist() == [[1, 1, 1]] * 5 + [[1, 0, 1]] * 4  # 3 is in four texts only
