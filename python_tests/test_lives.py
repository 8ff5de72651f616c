"""Accelerated SAEs live through random edits beside their plain twins: see lives.py and life_edits.py."""

import pytest
from lives import live

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

N_EDITS = 25


@pytest.mark.parametrize("seed", range(16))
def test_some_lives(seed):
    live(seed, N_EDITS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 500))
def test_many_lives(seed):
    live(seed, N_EDITS)
