"""Every option of sparsify and dictionary_learning, and the part of the page that says so (cases/peer_option_table.py)."""

import pytest
from cases import lives
from cases.option_table import PAGE
from cases.peer_option_table import HEADING, cell, coder_rows, dictionary_rows, section
from cases.peers import DICTIONARIES

pytestmark = pytest.mark.skipif(not lives.SCREENS, reason="the page is that of a processor with vector kernels")


@pytest.mark.runs
def test_the_page_is_what_is_measured():
    assert HEADING + PAGE.read_text().partition(HEADING)[2] == section()


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["SparseCoder", *DICTIONARIES])
def test_every_cell_answers_as_the_library(kind):
    """Cells are compared with the plain twin while they are tried; a class is fast by default."""
    rows = coder_rows() if kind == "SparseCoder" else dictionary_rows()
    assert "fast" in [cell(kind, value.option, value.label) for value in rows]
