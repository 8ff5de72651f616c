"""Text sources: what counts as prose, documents from files, the installed documentation."""

import itertools

import pytest

from darkmatter_ext.activations import text


def test_prose_is_running_english_only():
    sentence = "The statement assigns the value of the expression to the name, and binds it in the current scope. " * 2
    assert text.is_prose(sentence)
    assert not text.is_prose("short sentence")
    assert not text.is_prose(">>> x = 1 " + sentence)
    assert not text.is_prose("| 1 | 2 | 3 |\n" * 30)
    assert not text.is_prose("averyveryverylongidentifier" * 20)


@pytest.mark.slow
def test_installed_documentation_is_english_deduplicated_and_in_a_fixed_order():
    first = list(itertools.islice(text.installed_documents(), 40))
    assert first == list(itertools.islice(text.installed_documents(), 40))
    assert len({document.name for document in first}) == 40
    paragraphs = [paragraph for document in first for paragraph in document.text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert all(text.is_prose(paragraph) for paragraph in paragraphs)
    assert all(len(document.text) >= text.MINIMUM_DOCUMENT_CHARACTERS for document in first)


def test_a_file_is_split_at_document_marks(tmp_path):
    path = tmp_path / "speeches.txt"
    path.write_text("=== one\nFellow citizens.\nMore.\n\n=== two\nGentlemen of the Senate.\n")
    found = list(text.documents(text=str(path)))
    assert [document.text for document in found] == ["Fellow citizens.\nMore.", "Gentlemen of the Senate."]
    assert found[1].name == "speeches.txt#1"
    path.write_text("no marks === here")
    assert [document.text for document in text.file_documents(path)] == ["no marks === here"]


def test_a_local_dataset_streams_its_text_column(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [document.text for document in text.documents(dataset=str(tmp_path))] == ["one", "two"]
    (tmp_path / "data.jsonl").write_text('{"body": "one"}\n')
    with pytest.raises(ValueError, match="must have a column 'text', got"):
        list(text.dataset_documents(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00binary", "text: must be UTF-8 text"),
        (b"zero\x00byte", "text: must be text"),
        (b"  \n", "text: must hold some text"),
        (None, "text: must be a readable file"),
    ],
)
def test_a_file_that_is_not_text_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "tokens.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(text.file_documents(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="give one of text and dataset"):
        text.documents(text="a", dataset="b")
