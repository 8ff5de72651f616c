"""What the tests of the emulated CUDA ops share."""

import ctypes

import pytest
import torch
from cases import emulated


@pytest.fixture(scope="module")
def emulated_library():
    """The library of the emulated CUDA ops; memory that nobody wrote is NaN, so that reading it shows."""
    opened = ctypes.CDLL(str(emulated.library()))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield opened
    torch.use_deterministic_algorithms(before)
