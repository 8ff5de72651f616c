"""The CUDA kernels and launchers, run on the CPU by the emulator, against the CPU ops: equal to the bit.

The CPU ops have their own tests against the twins, so equality with them is equality with the definition. What the
emulator cannot show (races between blocks, alignment, speed) waits for `make gpu-check`.
"""

import dataclasses
import math
import os
import subprocess

import pytest
import torch
from cases import emulated
from cases.encoders import INF, NAN, NOT_PACKED, SCREENED_DTYPES, WORST, check_encoders, gaussian, same, worst
from cases.ops import DTYPES, N_PACKED, ON_CUDA
from cases.pursuit import DICTIONARIES, made_of, targets
from hypothesis import given, settings
from hypothesis import strategies as st

import darkmatter_ext as dm
from darkmatter_ext.ops import decode, encode, pursuit_cuda, reference
from darkmatter_ext.ops.pursuit_cuda import run_gradient_on_cuda
from darkmatter_ext.ops.pursuit_steps import Rules

pytestmark = pytest.mark.slow  # the emulator takes a minute to compile


@pytest.fixture(scope="module", autouse=True)
def cuda(emulated_library):
    """torch.ops.darkmatter_emulated."""
    return torch.ops.darkmatter_emulated


@pytest.fixture
def emulated_ops(cuda, monkeypatch):
    """The public functions on the emulated ops."""
    for module in (decode, encode, pursuit_cuda):
        monkeypatch.setattr(module, "_ops", cuda)


def shared_cases():
    return [case for case in ON_CUDA if case.op not in ("screen_intervals", "prepare_encoder")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", shared_cases(), ids=[case.id for case in shared_cases()])
def test_every_case_of_every_op(cuda, case, dtype):
    arguments = list(case.make(dtype))
    on_cpu = case.call()(*arguments)
    if case.name == "packed":  # codes of the CPU are not those of CUDA
        _, W_enc, b_enc, b_dec = arguments[:4]
        arguments[-N_PACKED:] = cuda.prepare_encoder(W_enc, b_enc, b_dec)
    mine = getattr(cuda, case.op)(*arguments)
    if dtype == torch.float64:  # the last bit may depend on fused multiply-add
        for one, other in zip(
            *(value if isinstance(value, tuple) else (value,) for value in (mine, on_cpu)), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
    else:
        same(mine, on_cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_packing(cuda, dtype, transposed):
    _, W_enc, b_enc, b_dec = gaussian(dtype=dtype)
    W_enc = W_enc.mT.contiguous().mT if transposed else W_enc
    weight, bias, codes, sums, bounds, groups = cuda.prepare_encoder(W_enc, b_enc, b_dec)
    on_cpu = torch.ops.darkmatter.prepare_encoder(W_enc, b_enc, b_dec)
    assert torch.equal(weight, on_cpu[0])
    assert weight.data_ptr() != W_enc.data_ptr()
    assert torch.equal(bias, on_cpu[1]) or dtype == torch.float64
    assert codes.dtype == torch.float16
    assert sums.numel() == groups.numel() == 0
    assert len(codes) == 1500
    exact = W_enc.mT.double()
    approximate = codes[:, :40].double() * bounds[0].double()[:, None]
    removed = (exact - approximate).norm(dim=1)
    assert (removed <= bounds[3]).all()
    assert (bounds[3] <= removed * (1 + 1e-5) + 1e-30).all()
    assert (exact.norm(dim=1) <= bounds[2]).all()
    assert (codes[:, 40:] == 0).all()


@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("n", "d", "n_latents", "k"), [(9, 40, 1500, 5), (1, 70, 3001, 33), (17, 33, 1024, 128)])
def test_encoders_on_sizes_that_are_screened(cuda, dtype, centred, n, d, n_latents, k):
    x, W_enc, b_enc, b_dec = gaussian(n, d, n_latents, dtype)
    check_encoders(cuda, x, W_enc, b_enc, b_dec if centred else None, k=k, threshold=math.sqrt(d) * 1.5)


def test_encoders_of_long_rows_and_unpacked_weights(cuda):
    """d beyond what is staged in shared memory; a threshold for each latent; weights packed in the call."""
    x, W_enc, b_enc, b_dec = gaussian(2, 7200, 1030)
    check_encoders(cuda, x, W_enc, b_enc, b_dec, threshold=torch.rand(1030) * 200, packed=False)


def test_screening_decides_without_reading_the_rows(cuda):
    """Rows of latents that cannot be in the answer are never read: what they hold after packing changes nothing."""
    x, W_enc, b_enc, b_dec = gaussian(12, 64, 4000)
    weight, *others = cuda.prepare_encoder(W_enc, b_enc, b_dec)
    on_cpu = dm.topk_encode(x, W_enc, b_enc, 8, b_dec=b_dec)
    above = dm.threshold_encode(x, W_enc, b_enc, 20.0, b_dec=b_dec)
    h = reference.pre_activations(x, W_enc, b_enc, b_dec=b_dec)
    needed = (h >= h.sort(dim=1, descending=True).values[:, 10:11]).any(0) | (h > 19.5).any(0)
    assert needed.float().mean() < 0.3
    weight[~needed] = NAN
    top = cuda.topk_encode(x, W_enc, b_enc, b_dec, 8, weight, *others)
    same(top, (on_cpu.values, on_cpu.indices))
    kept = cuda.threshold_encode(x, W_enc, b_enc, b_dec, torch.tensor(20.0), weight, *others)
    same(kept, (above.values, above.crow_indices, above.col_indices))


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_the_order_of_threads_changes_nothing(cuda, seed):
    emulated.set_seed(seed)
    check_encoders(cuda, *gaussian(10, 48, 2100, seed=seed), k=20, threshold=10.0)
    emulated.set_seed(1)


@pytest.mark.parametrize("name", WORST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_worst_cases(cuda, name, dtype):
    x, W_enc, b_enc, b_dec = worst(name, dtype)
    check_encoders(cuda, x, W_enc, b_enc, b_dec, k=20, threshold=5.0)


def test_intervals_hold_every_pre_activation(cuda):
    """With a tensor core's truncating sums emulated; float64 products of the given numbers are the truth."""
    for seed, scale in enumerate((1.0, 1e-3, 1e4)):
        x, W_enc, b_enc, b_dec = gaussian(8, 300, 1100, seed=seed)
        x, W_enc = x * scale, W_enc * torch.rand(1100) ** 4
        lower, upper, screened = cuda.screen_intervals(x, W_enc, b_enc, b_dec, *NOT_PACKED)
        h = (x.double() - b_dec.double()) @ W_enc.double() + b_enc.double()
        assert screened.all()
        assert (lower <= h).all()
        assert (h <= upper).all()
        worst = ((h - (lower.double() + upper) / 2).abs() / ((upper.double() - lower) / 2)).max()
        assert 0.05 < worst < 1, "a bound that is never approached is too loose to be useful"


@pytest.mark.parametrize("n_latents", [1500, 300])  # with codes, whose making finds NaN, and without
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "b_dec"])
def test_nan_in_weights_is_refused_when_prepared(cuda, name, n_latents):
    weights = dict(zip(("W_enc", "b_enc", "b_dec"), gaussian(n_latents=n_latents)[1:], strict=True))
    weights["W_enc"][0, 2], weights["b_enc"][1] = INF, -INF  # infinite is allowed
    cuda.prepare_encoder(*weights.values())
    weights[name][..., 5] = NAN
    with pytest.raises(RuntimeError, match=f"{name}: must not contain NaN, got shape"):
        cuda.prepare_encoder(*weights.values())


def test_nan_in_weights_of_a_call(cuda):
    x, W_enc, b_enc, b_dec = gaussian()
    W_enc[3, 5] = NAN
    values, indices = cuda.topk_encode(x, W_enc, b_enc, b_dec, 3, *NOT_PACKED)  # unprepared: as torch.topk, NaN first
    assert values[:, 0].isnan().all()
    assert (indices[:, 0] == 5).all()
    with pytest.raises(RuntimeError, match="threshold: must not contain NaN"):
        cuda.threshold_encode(x, W_enc, b_enc, b_dec, torch.tensor(NAN), *NOT_PACKED)


@settings(max_examples=25)
@given(
    n=st.integers(1, 9), d=st.sampled_from([1, 4, 7, 130, 256]), n_latents=st.integers(1, 40), k=st.integers(0, 12),
    dtype=st.sampled_from(SCREENED_DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_sparse_ops(n, d, n_latents, k, dtype, seed):
    """Any shapes, with repeated latents, stored zeros, empty tokens."""
    cuda, cpu = torch.ops.darkmatter_emulated, torch.ops.darkmatter
    torch.manual_seed(seed)
    rows, W_dec = torch.randn(n, d).to(dtype), torch.randn(n_latents, d).to(dtype)
    indices = torch.randint(n_latents, (n, k))
    values = torch.randn(n, k).relu().to(dtype)
    kept = torch.rand(n, k) < 0.6
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    for v, i, c in ((values, indices, None), (values[kept], indices[kept], crow)):
        same(cuda.sparse_decode(v, i, c, W_dec, rows[0]), cpu.sparse_decode(v, i, c, W_dec, rows[0]))
        same(cuda.decoder_dot(rows, i, c, W_dec), cpu.decoder_dot(rows, i, c, W_dec))
        same(cuda.decoder_outer(v, i, c, rows, n_latents), cpu.decoder_outer(v, i, c, rows, n_latents))
        same(cuda.to_dense(v, i, c, n_latents), cpu.to_dense(v, i, c, n_latents))
        dense = cpu.to_dense(v, i, c, n_latents)
        same(cuda.find_support(dense), cpu.find_support(dense))
        capacity = min(seed, n_latents)
        same(cuda.find_support_fixed(dense, capacity), cpu.find_support_fixed(dense, capacity))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 37, 132, 520])  # one element at a time; a last slice cut short; several slices
def test_outer_of_latents_with_no_one_and_many_entries(cuda, dtype, d):
    """More latents than entries, one latent in every token, nothing at either end; x not aligned."""
    n, n_latents = 60, 900
    torch.manual_seed(d)
    x = torch.randn(n * d + 1).to(dtype)[1:].view(n, d) if d == 132 else torch.randn(n, d).to(dtype)
    indices = torch.randint(100, 700, (n, 5))
    indices[:, 2] = 333
    indices[:, 4] = 650 + torch.arange(n) // 30
    values = torch.randn(n, 5).to(dtype)
    mine = cuda.decoder_outer(values, indices, None, x, n_latents)
    on_cpu = torch.ops.darkmatter.decoder_outer(values, indices, None, x, n_latents)
    torch.testing.assert_close(mine, on_cpu, rtol=1e-14, atol=1e-14) if dtype == torch.float64 else same(mine, on_cpu)
    assert (mine[:100] == 0).all()
    none = indices[:0]
    assert (cuda.decoder_outer(values[:0], none, None, x[:0], n_latents) == 0).all()


def test_outer_with_an_index_out_of_range_adds_to_no_latent(cuda):
    indices = torch.tensor([[0, 4], [-1, 1 << 32]])
    out = cuda.decoder_outer(torch.ones(2, 2), indices, None, torch.ones(2, 4), 4)
    assert out.tolist() == [[1.0] * 4] + [[0.0] * 4] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "n_latents"), [(64, 128), (72, 200), (33, 70), (8, 1)])
def test_packed_rows_are_the_transposed_weights(cuda, dtype, d, n_latents):
    """Whole and ragged tiles; rows stored with gaps, columns with a stride, a start that is not aligned."""
    wide = torch.randn(d, n_latents + 8).to(dtype)
    shifted = torch.randn(d * n_latents + 1).to(dtype)[1:].view(d, n_latents)
    every_second = torch.randn(d, 2 * n_latents).to(dtype)[:, ::2]
    one_row = torch.randn(1, n_latents).to(dtype).expand(d, n_latents)
    for W_enc in (wide[:, 8:].contiguous(), wide[:, 8:], wide[:, :n_latents], shifted, every_second, one_row):
        weight = cuda.prepare_encoder(W_enc, torch.zeros(n_latents).to(dtype), None)[0]
        assert weight.is_contiguous()
        assert torch.equal(weight, W_enc.mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_support_of_wide_rows(cuda, dtype):
    acts = torch.randn(3, 5000).to(dtype)
    acts[torch.rand_like(acts.float()) < 0.98] = 0
    acts[0, 17], acts[1, :] = NAN, -0.0
    same(cuda.find_support(acts), torch.ops.darkmatter.find_support(acts))
    for capacity in (0, 1, 70, 5000):
        same(cuda.find_support_fixed(acts, capacity), torch.ops.darkmatter.find_support_fixed(acts, capacity))


def test_an_index_out_of_range_is_nan_not_foreign_memory(cuda):
    out = cuda.sparse_decode(torch.ones(2, 1), torch.tensor([[0], [9]]), None, torch.ones(3, 4), None)
    assert out[0].tolist() == [1.0] * 4
    assert out[1].isnan().all()


def pursued(x, dictionary, l0, **options):
    """Weights [n, F] of gradient pursuit by the ops of CUDA; l0 [n]."""
    prepared = dm.prepare_dictionary(dictionary)  # with the codes of the CPU, which are not those of CUDA
    no_bias = torch.zeros(len(dictionary), dtype=prepared.rows.dtype)
    packed = torch.ops.darkmatter_emulated.prepare_encoder(prepared.rows.mT, no_bias, None)
    packed = encode.PreparedEncoder(*packed, None, False)
    prepared = dataclasses.replace(prepared, packed=packed)
    ((_, atoms, weights),) = run_gradient_on_cuda([x.double()], [l0], prepared, Rules("gradient", **options))
    return torch.zeros(len(x), len(dictionary), dtype=torch.float64).scatter_add(1, atoms, weights)


@pytest.mark.parametrize("keep_chosen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_atoms", [700, 1100])
def test_gradient_pursuit(emulated_ops, keep_chosen, dtype, n_atoms):
    """The fused steps against the dense twin: the same atoms, the weights to rounding; own l0 of each token.

    700 atoms are too few to be screened. Zero tokens and atoms, a token that one atom explains."""
    torch.manual_seed(3)
    x, dictionary = torch.randn(7, 36).to(dtype), torch.randn(n_atoms, 36).to(dtype)
    x[2], dictionary[5], x[4] = 0.0, 0.0, dictionary[8] * 3
    l0 = torch.tensor([0, 1, 4, 12, 7, 12, 3])
    expected = reference.pursuit(x, dictionary, l0, keep_chosen=keep_chosen)
    found = pursued(x, dictionary, l0, keep_chosen=keep_chosen)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(found != 0, expected != 0)
    assert ((found != 0).sum(1) <= l0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", DICTIONARIES, ids=lambda make: make.__name__.strip("_"))
def test_pursuit_of_ties_is_that_of_the_twin(emulated_ops, make, dtype):
    """Atoms twice, axes and their negatives, near copies: of products equal up to rounding the lowest index is taken."""
    dictionary = make(2600, 40).to(dtype)
    x = torch.cat([targets(3, 40), made_of(dictionary.double(), 3)]).to(dtype)
    x[1] = x[1].round()  # equal products of different axes
    l0 = torch.tensor([5, 5, 2, 6, 6, 1])
    expected = reference.pursuit(x, dictionary, l0)
    found = pursued(x, dictionary, l0)
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_choice_among_more_ties_than_a_list_holds(cuda):
    """All atoms equal up to the last bit but one; some tokens rest. The lowest of the ties, or the one that is larger."""
    torch.manual_seed(5)
    n_atoms, n = 2600, 21
    dictionary = torch.randn(1, 40).repeat(n_atoms, 1)
    residual = dictionary[0].double() + 0.01 * torch.randn(n, 40, dtype=torch.float64)
    dictionary[2000] *= 1 + 1e-6
    packed = cuda.prepare_encoder(dictionary.mT, torch.zeros(n_atoms), None)
    noise = torch.full((n,), 1e-9, dtype=torch.float64)
    noise[::2] = 1e-3
    l0, done = torch.full((n,), 3), torch.zeros(n, dtype=torch.int32)
    done[4], l0[5] = 1, 1
    choice = cuda.pursuit_choose(residual, dictionary, packed[2], packed[4], noise, l0, 1, done)
    expected = torch.where(torch.arange(n) % 2 == 0, 0, 2000)
    expected[4] = expected[5] = -1
    assert torch.equal(choice, expected)


def test_pursuit_stops_at_a_small_residual(emulated_ops):
    torch.manual_seed(4)
    x, dictionary = torch.randn(4, 36), torch.randn(1100, 36)
    expected = reference.pursuit(x, dictionary, 9, residual_threshold=4.0)
    found = pursued(x, dictionary, torch.full((4,), 9), residual_threshold=4.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert 0 < (found != 0).sum() < 36


@pytest.mark.parametrize("method", ["matching", "orthogonal"])
def test_other_pursuits_run_on_the_ops_of_cuda(emulated_ops, method):
    torch.manual_seed(6)
    x, dictionary = torch.randn(5, 36), torch.nn.functional.normalize(torch.randn(1100, 36), dim=1)
    expected = reference.pursuit(x, dictionary, 4, method=method)
    found = dm.pursuit(x, dictionary, 4, method=method).to_dense()
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
def test_many_tokens_that_screening_cannot_help(cuda, dtype):
    """Hundreds of marked tokens, in more groups than there are slots for their scores; others among them."""
    x, W_enc, b_enc, b_dec = gaussian(300, 40, 2600, dtype)
    W_enc[:, 1:] = W_enc[:, :1]  # as many ties as latents
    b_enc[:] = b_enc[0]
    W_enc[:, 7] *= 1.5
    x[::3], x[5, 3], x[6, 0] = 0, NAN, math.inf
    check_encoders(cuda, x, W_enc, b_enc, b_dec, k=20, threshold=0.5)


@pytest.mark.parametrize(("n", "d", "n_latents"), [(3, 0, 100), (9, 0, 2000), (3, 64, 0), (0, 64, 2000)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nothing_along_a_side(cuda, n, d, n_latents, seed):
    """No dimensions, no latents or no tokens; in any order of threads."""
    x, W_enc, b_enc, _ = gaussian(n, d, n_latents)
    emulated.set_seed(seed)
    check_encoders(cuda, x, W_enc, b_enc, k=min(5, n_latents), threshold=0.5)
    emulated.set_seed(1)


@pytest.mark.parametrize("k", [600, 1024, 1025, 2600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_latents_than_are_screened(cuda, dtype, k):
    check_encoders(cuda, *gaussian(11, 520, 2600, dtype), k=k, threshold=30.0)


def test_the_emulator_finds_what_it_is_for(tmp_path):
    """A kernel without its barrier, one that waits alone, one that writes too far and one that loads between: each is seen."""
    program = tmp_path / "faults.cpp"
    program.write_text(
        r"""
#include <cstdio>
#include <cuda_runtime.h>
using darkmatter::cuda::memory;
int out[3];
void sums(bool barrier) {
  int* shared = reinterpret_cast<int*>(memory);
  shared[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  if (threadIdx.x == 0) { out[0] = 0; for (int t = 0; t < 32; ++t) out[0] += shared[t]; }
}
template <typename Body> const char* fault(size_t shared, const Body& body) {
  static std::string line;
  try { simt::run_grid(dim3(1), 32, shared, body); } catch (const std::exception& e) { line = e.what(); return line.c_str(); }
  return "none";
}
int main() {
  simt::run_grid(dim3(1), 32, 128, [] { sums(true); });
  std::printf("%d\n", out[0] == 496);
  simt::run_grid(dim3(1), 32, 128, [] { sums(false); });
  std::printf("%d\n", out[0] == 496);
  std::printf("%s\n", fault(0, [] { if (threadIdx.x < 31) __shfl_xor_sync(0xffffffffu, 1, 1); }));
  std::printf("%s\n", fault(8, [] { memory[9] = 1; }));
  std::fflush(stdout);
  simt::run_grid(dim3(1), 32, 128, [] { out[1] = reinterpret_cast<float4*>(memory + 4 * threadIdx.x)->x; });
}
"""
    )
    binary = tmp_path / "faults"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, "-std=c++20", "-w", *emulated.ALIGNED, f"-I{emulated.TESTS / 'emulator'}", program, "-o", binary],
        check=True,
    )
    run = subprocess.run([binary], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "misaligned address" in run.stderr
    assert run.stdout.splitlines() == [
        "1",
        "0",
        "emulated kernel: threads wait for others that never come",
        "emulated kernel: wrote behind its shared memory",
    ]
