"""docs/pages.py: the documentation site's page of every result file, from that file alone."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from cases.explored import explored_result

PAGES = Path(__file__).resolve().parents[2] / "docs" / "pages.py"


@pytest.fixture(scope="module")
def pages():
    if not PAGES.exists():
        pytest.skip("docs/: not in this checkout")
    spec = importlib.util.spec_from_file_location("pages", PAGES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tmp_path):
    """A result that has lost its arrays, and one of another name."""
    folder = tmp_path / "results"
    folder.mkdir()
    result = explored_result()
    keys = ("l0", "fvu", "fvu_nonlinear", "linear_share", "r2_vec", "r2_norm")
    result.numbers.update({f"sae-{sae}/{key}": 0.5 for sae in range(2) for key in keys})
    result.provenance["created"] = "2026-01-02T03:04:05"
    result.save(folder / "decomposition.json")
    (folder / "decomposition.npz").unlink()
    return folder


def test_every_result_has_a_page_made_from_its_file_alone(pages, results, tmp_path, monkeypatch):
    written = []

    def write_report(loaded, path):
        written.append((loaded[0].experiment, loaded[0].arrays, loaded[0].notes[-1]))
        path.write_text("page")
        return path

    monkeypatch.setattr("darkmatter_ext.experiments.write_report", write_report)
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "old.html").write_text("of a result that is gone")
    assert pages.write(tmp_path / "pages", results) == [tmp_path / "pages" / "decomposition.html"]
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["decomposition.html"]
    assert written[0][:2] == ("decomposition", {})
    assert "decomposition.npz, kept beside this result, was not there" in written[0][2]


def test_the_list_and_the_gallery_link_to_pages_that_exist(pages, results, tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    assert pages.listed(results, folder) == "No result file is in this checkout."
    (folder / "decomposition.html").write_text("page")
    row = pages.listed(results, folder).splitlines()[-1]
    count = len(json.loads((results / "decomposition.json").read_text())["numbers"])
    assert row == (
        f"| decomposition | model | {count} | 2026-01-02 | [page](results/decomposition.html) "
        "| [JSON](results/decomposition.json) |"
    )
    gallery = "# All\n\n## decomposition: the split\n\nText.\n\n## scaling: width\n\nMore.\n"
    assert pages.linked(gallery, folder) == gallery.replace(
        "the split\n", "the split\n\n[Explore this result](results/decomposition.html)\n"
    )


def test_links_of_the_documentation_lead_somewhere(pages):
    """mkdocs checks them, too, with anchors, where `make docs` can be run; it counts no warning that it does not print."""
    if not (PAGES.parents[1] / "Makefile").exists():
        pytest.skip("Makefile: not in this checkout")
    dead = [
        f"{path.name}: {target}"
        for path in PAGES.parent.glob("*.md")
        for target in re.findall(r"\]\(([^)#]+)", path.read_text())
        if "://" not in target and not (PAGES.parent / target).exists()
    ]
    assert dead == []
    nav = (PAGES.parents[1] / "mkdocs.yml").read_text()
    assert [path.name for path in PAGES.parent.glob("*.md") if f": {path.name}\n" not in nav] == []
    commands = re.findall(r"^\t.*mkdocs build[^#\n]*", (PAGES.parents[1] / "Makefile").read_text(), re.MULTILINE)
    assert len(commands) == 1
    assert "quiet" not in commands[0]


def test_the_site_names_the_list(pages):
    text = (PAGES.parent / "result_pages.md").read_text()
    assert text.count(pages.LIST) == 1
    assert pages._HEADING.findall((PAGES.parent / "results.md").read_text()).count("scaling") == 1
