"""Damaged files of every kind that is read: an answer or one line, in bounded time and memory, and nothing is written.

`DARKMATTER_FUZZ=100000` (`make fuzz`) is how many files in all; without it a few of each kind.
"""

import json
import os

import pytest
from cases.children import reports
from cases.readers import READERS

FEW = 12  # of each kind, where no number is asked for


def _count():
    wanted = int(os.environ.get("DARKMATTER_FUZZ", "0"))
    return max(FEW, -(-wanted // len(READERS)))


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_read_or_told_in_one_line(reader, tmp_path):
    [wrong] = reports("damage", reader, 0, _count(), DARKMATTER_CACHE=str(tmp_path))
    assert wrong == [], json.dumps(wrong[:5], indent=1)
