"""Certified screening gives the exact path's answer to the bit, whatever the data does to its bound.

The exact path is the same op with a PreparedEncoder that carries no screening codes; `reference.py` is checked elsewhere.
"""

import dataclasses

import pytest
import torch
from cases.children import run_python
from cases.screening import DTYPES, KINDS, check_screened, count_violations, make_data, without_codes
from hypothesis import given
from hypothesis import strategies as st

import darkmatter_ext as dm
from darkmatter_ext.ops.encode import screen_intervals
from darkmatter_ext.ops.facts import fact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_exact_answer(kind, dtype):
    for seed, (n, d, n_latents, k) in enumerate([(21, 64, 700, 5), (9, 300, 2500, 32), (130, 40, 513, 17)]):
        check_screened(kind, n, d, n_latents, k, dtype, seed, centred=seed % 2 == 0)


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    n=st.integers(3, 20),
    d=st.integers(32, 200),
    n_latents=st.integers(256, 900),
    k=st.integers(1, 32),
    seed=st.integers(0, 10_000),
    centred=st.booleans(),
)
def test_any_shape_gives_the_exact_answer(kind, dtype, n, d, n_latents, k, seed, centred):
    check_screened(kind, n, d, n_latents, k, dtype, seed, centred)


def test_threads_do_not_change_the_answer():
    x, W_enc, b_enc, _ = make_data("heavy_tailed", 200, 96, 3000, torch.float32, 0)
    prepared, threads = dm.prepare_encoder(W_enc, b_enc), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(dm.topk_encode(x, W_enc, b_enc, 16, prepared=prepared))
            results.append(dm.topk_encode(x[:1], W_enc, b_enc, 16, prepared=prepared))
    finally:
        torch.set_num_threads(threads)
    for many, one in zip(results[::2], results[1::2], strict=True):
        assert torch.equal(many.values, results[0].values)
        assert torch.equal(many.indices, results[0].indices)
        assert torch.equal(one.indices[0], results[0].indices[0])


def test_all_latents_alike_overflow_into_the_exact_path():
    """Equal latents: no bound can tell them apart, every token has more candidates than the buffer holds."""
    row = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    W_enc, b_enc = row.expand(64, 9000).contiguous(), torch.zeros(9000)
    acts = dm.topk_encode(torch.randn(5, 64), W_enc, b_enc, 8, prepared=dm.prepare_encoder(W_enc, b_enc))
    assert torch.equal(acts.indices, torch.arange(8).expand(5, 8))


@pytest.mark.parametrize("strong", ["few_all_sampled", "many_none_sampled", "ascending", "descending"])
def test_a_misleading_sample_costs_time_not_correctness(strong):
    """The first limit is guessed from every 16th panel of 48 latents: here that sample is as wrong as can be."""
    n_latents, k = 48 * 22 * 16, 32
    x, W_enc, b_enc, _ = make_data("gaussian", 40, 64, n_latents, torch.float32, 1)
    panel = torch.arange(n_latents) // 48
    if strong == "few_all_sampled":  # fewer than k, so that the k-th best lies far below the guess
        b_enc[torch.arange(20) + 48 * 16] += 100
    elif strong == "many_none_sampled":
        b_enc[panel % 16 != 0] += 100
    else:
        order = torch.arange(n_latents).float() * 0.01
        b_enc += order if strong == "ascending" else -order
    prepared = dm.prepare_encoder(W_enc, b_enc)
    ours = dm.topk_encode(x, W_enc, b_enc, k, prepared=prepared)
    theirs = dm.topk_encode(x, W_enc, b_enc, k, prepared=without_codes(prepared))
    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "not_finite"])
def test_the_bound_holds(kind):
    for dtype in (torch.float32, torch.bfloat16):
        violations, pairs = count_violations(kind, dtype, 24, 96, 600, seed=3)
        assert violations == 0
        assert pairs > 0 or kind in ("denormal", "zero", "tiny")


@pytest.mark.slow
def test_the_bound_holds_on_a_hundred_million_pairs():
    """About half a minute. The bound is rigorous: not one pair may lie outside."""
    total = 0
    shapes = [(512, 768, 8192), (256, 2304, 8192), (512, 576, 8192)]
    kinds = ("gaussian", "heavy_tailed", "outlier_dimensions", "near_duplicates", "offset")
    for seed in range(3):
        for kind in kinds:
            for shape in shapes:
                violations, pairs = count_violations(kind, torch.float32, *shape, seed=seed)
                assert violations == 0, (kind, shape, seed)
                total += pairs
    assert total >= 100_000_000


def test_intervals_are_tight_enough_to_be_of_use():
    """In standard deviations of Gaussian scores at d 768: 0.43 expected of 8 bits, 0.01 of 16, 0.0013 of float32."""
    x, W_enc, b_enc, _ = make_data("gaussian", 64, 768, 2000, torch.float32, 0)
    found = screen_intervals(x, W_enc, b_enc)
    bound = (found.upper - found.lower).mean() / 2 / (x @ W_enc).std()
    eight_bits = dict.fromkeys(("avx512_vnni", "amx_int8"), (0.2, 0.6))
    low, high = {**eight_bits, "scalar": (5e-4, 4e-3)}.get(fact("cpu_isa"), (0.005, 0.015))
    assert low < bound < high


_IN_A_CHILD = """
from cases import screening as cases
shapes = [(21, 64, 700, 5), (9, 300, 2500, 32), (3, 40, 513, 17)]
for row, dtype in enumerate(cases.DTYPES):
    for column, kind in enumerate(cases.KINDS):
        seed = (row + column) % 3
        cases.check_screened(kind, *shapes[seed], dtype, seed, column % 2 == 0)
        assert cases.count_violations(kind, dtype, 24, 96, 600, 3)[0] == 0, (kind, dtype)
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_screens_of_other_processors(isa):
    """`scalar` screens by torch's own product, as processors do that have no integer dot products."""
    run = run_python(_IN_A_CHILD, check=False, DARKMATTER_CPU_ISA=isa)
    if "must be supported by this machine" in run.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert run.returncode == 0, run.stderr


def test_reduced_precision_products_are_not_trusted():
    """Where torch may multiply float32 in bfloat16, the bound of a float32 product does not hold: no codes are handed on."""
    by_torch = dataclasses.replace(dm.prepare_encoder(torch.randn(40, 300), torch.zeros(300)), codes=torch.zeros(1))
    assert by_torch.packed[2].numel() == 1
    torch.set_float32_matmul_precision("medium")
    try:
        assert by_torch.packed[2].numel() == 0
    finally:
        torch.set_float32_matmul_precision("highest")
