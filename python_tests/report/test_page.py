"""The page as a file: one, of itself, inert, with a bundle made of the sources that are here."""

import base64
import gzip
import hashlib
import html.parser
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from cases.explored import HOSTILE, explored_result, page_of

from darkmatter_ext.report.page import BUNDLE, Section, inert, write_page
from darkmatter_ext.report.payload import packed
from darkmatter_ext.report.result import Result, load_result
from darkmatter_ext.report.table import Table

WEB = Path(__file__).resolve().parents[2] / "web"


class _Elements(html.parser.HTMLParser):
    """What a browser would make of the page: elements, attributes, text by element."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts, self._open = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data):
        self.texts.append((self._open, data))


def _hostile_page(tmp_path):
    result = explored_result(words=HOSTILE, length=24, notes=list(HOSTILE))
    result.config["text"] = HOSTILE[0]
    result.numbers[HOSTILE[1]] = 1.0
    return page_of(result, tmp_path, reading=HOSTILE).read_text()


def test_the_page_loads_nothing_and_runs_only_its_bundle(tmp_path):
    page = _hostile_page(tmp_path)
    elements = _Elements(page)
    for tag, attributes in elements.found:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
        assert not [name for name in attributes if name.startswith("on")], attributes
    scripts = [attributes.get("type") for tag, attributes in elements.found if tag == "script"]
    assert scripts == ["text/plain", "application/json", None]
    policy = next(own["content"] for tag, own in elements.found if own.get("http-equiv"))
    bundle = (BUNDLE / "page.js").read_bytes()
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(bundle).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert bundle.decode() in page


def test_hostile_text_is_text(tmp_path):
    page = _hostile_page(tmp_path)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\u2028\ufeff\x00\x07\x1b\x7f]", page)
    assert "⟨U+202E⟩desrever⟨U+202C⟩" in page
    assert "{{ 7 * 7 }}" in page
    figure = next(
        text for tag, text in _Elements(page).texts if tag == "script" and '"panels"' not in text and "law" in text
    )
    assert json.loads(figure)[0]["x"]["names"][1][1] == "<b>two</b>"


def test_links_inside_the_page_lead_somewhere(tmp_path):
    result = explored_result()
    judged = {"latent": 7, "explanation": "<i>rivers</i>", "score": None, "documents": 3}
    result.series.update({"judged": {"activation": {"latents": [judged, judged | {"score": 0.75}]}}})
    result.series.update({"about": {"activation": "the SAE"}})
    page = page_of(result, tmp_path).read_text()
    elements = _Elements(page).found
    ids = [own["id"] for _, own in elements if "id" in own]
    targets = [own["href"][1:] for tag, own in elements if tag == "a" and own["href"].startswith("#")]
    assert len(ids) == len(set(ids))
    assert {"r1-tokens", "r1-judged"} <= set(targets) <= set(ids)
    assert '<td class="words">&lt;i&gt;rivers&lt;/i&gt;</td><td>–</td>' in page
    assert "<td>0.75</td>" in page


def test_inert_names_what_hides():
    assert inert("plain\n\ttext é漢🙂") == "plain\n\ttext é漢🙂"
    assert inert("a\u202eb\x00\u200d") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+200D⟩"


def test_the_packed_text_is_that_of_the_result():
    result = explored_result(words=HOSTILE)
    block = gzip.decompress(base64.b64decode(packed(result)))
    (size,) = struct.unpack_from("<I", block)
    head = json.loads(block[4 : 4 + size])
    assert head["vocabulary"][: len(HOSTILE)] == list(HOSTILE)
    at, columns = 4 * -(-(4 + size) // 4), {}
    for name, kind, count in head["columns"]:
        numbers = np.frombuffer(block, f"<{'u2' if kind == 'b2' else kind}", count, at)
        columns[name] = (numbers.astype("<u4") << 16).view("<f4") if kind == "b2" else numbers
        at += 4 * -(-numbers.nbytes // 4)
    assert at == len(block)
    np.testing.assert_array_equal(columns["tokens"], result.arrays["page/tokens"].ravel())
    np.testing.assert_array_equal(columns["sae1/error"], result.arrays["page/sae1/error"].ravel())
    np.testing.assert_array_equal(columns["sae0/latents"], result.arrays["page/sae0/latents"].ravel() + 1)
    np.testing.assert_allclose(columns["sae0/values"], result.arrays["page/sae0/values"].ravel(), rtol=2.0**-8)
    assert packed(Result("decomposition", {}, {})) is None


def test_a_result_read_from_its_file_gives_the_same_page(tmp_path):
    result = explored_result()
    page = page_of(result, tmp_path).read_text()
    loaded = load_result(result.save(tmp_path / "r.json"))
    assert page_of(loaded, tmp_path).read_text() == page


def test_a_result_without_text_has_a_page_too(tmp_path):
    section = Section(Result("decomposition", {"seed": 0}, {"a": 1.0}), Table("t", ("a",), [["b"]]), ["It says."])
    page = write_page([section, section], tmp_path / "p.html").read_text()
    assert page.count("It says.") == 2
    assert "packed" not in re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)


def test_the_bundle_is_made_of_these_sources():
    """As web/build.mjs names them; `make web` builds it again."""
    if not WEB.exists():
        pytest.skip("web/: not in this checkout")
    own = hashlib.sha256()
    files = ["build.mjs", "package-lock.json", *(f"src/{path.name}" for path in (WEB / "src").iterdir())]
    for name in sorted(files):
        own.update(name.encode() + b"\0" + (WEB / name).read_bytes() + b"\0")
    for name in ("page.js", "page.css"):
        assert own.hexdigest() in (BUNDLE / name).read_text()[:300], f"{name} is of other sources: make web"


def test_every_bundled_package_has_its_licence():
    text = (BUNDLE / "LICENSES.txt").read_text()
    assert "tabulator-tables 6.5.3, MIT" in text
    assert "@observablehq/plot 0.6.17, ISC" in text
    assert "(no licence text in the package)" not in text
