"""Every option of SAELens' configuration classes at every architecture, and the page that says so (cases/option_table.py)."""

import re
from importlib.metadata import version

import pytest
from cases import lives
from cases.option_table import FAST, PAGE, cell, page, refusal, rows
from sae_lens.registry import SAE_CLASS_REGISTRY


def _without_counts(text):
    """The page as every version of SAELens gives it: its list of pretrained SAEs grows."""
    return re.sub(r" · \d+|sae_lens [\d.]+|the \d+ SAEs|\| all .*\n", "", text)


@pytest.mark.runs
@pytest.mark.skipif(not lives.SCREENS, reason="the page is that of a processor with vector kernels")
def test_the_page_is_what_is_measured():
    written = PAGE.read_text().partition("\n# Options of sparsify")[0]
    if f"sae_lens {version('sae_lens')} " in written:
        assert written == page()
    else:
        assert _without_counts(written) == _without_counts(page())


@pytest.mark.runs
@pytest.mark.parametrize("architecture", SAE_CLASS_REGISTRY)
def test_every_cell_answers_as_saelens(architecture):
    """Cells are compared with the plain twin while they are tried; an accelerated architecture is fast by default."""
    cells = [cell(architecture, value.field, value.label) for value in rows()]
    slow = refusal(architecture) or architecture in lives.NEVER_FAST or not lives.SCREENS
    assert slow or FAST in cells or "gradients" in str(cells)
