"""The ops under pytest-benchmark, for comparing two commits: `pytest benchmarks --benchmark-only --benchmark-autosave`."""

import pytest
import torch
from problems import Problem

SHAPE = (256, 768, 8192, 32)


@pytest.fixture(scope="module", params=["topk", "jumprelu"])
def problem(request):
    return Problem.make("sae_like", SHAPE, request.param, torch.float32)


@pytest.mark.parametrize("operation", ["encode_row", "forward_row", "decode_row", "support_row"])
def test_op(benchmark, problem, operation):
    with torch.no_grad():
        row = getattr(problem, operation)()
        row.check()
        benchmark(row.ours)
