"""No pre-activation lies outside the interval that the screen certifies: random hard rows, scales, dtypes, biases and gains.

`DARKMATTER_FUZZ_PAIRS=1000000000` (`make fuzz`) is how many pairs of token and latent are screened in all; without it some
millions. The pairs that float64 cannot decide are decided in rational numbers.
"""

import os
import random

import pytest
from cases.bounds import count_outside, random_problem

PARTS = 4  # for as many processes
PAIRS = int(os.environ.get("DARKMATTER_FUZZ_PAIRS", "4_000_000"))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_screened_pair_lies_in_its_interval(part):
    seen = case = 0
    while seen < PAIRS / PARTS:
        chance = random.Random(f"{part} {case}")
        shape = (
            chance.choice((8, 64, 256)),
            chance.choice((32, 50, 64, 72, 200, 768)),
            chance.choice((256, 600, 2048, 4096)),
        )
        outside, screened = count_outside(random_problem(chance, *shape))
        assert outside == 0, (part, case, shape)
        seen, case = seen + screened, case + 1
