"""The CPU ops with every instruction set, run on AVX2 by the emulator: the real library's answer to the bit.

AVX2 itself is among them: real instructions, but the text that the others are compiled from. What the emulator cannot
show is speed, and what a compiler makes of the same sources for the real instructions. On a machine that has them the
comparison is with them.
"""

import functools
import re
import shutil
import subprocess

import pytest
import torch
from cases import emulated
from cases.bounds import ROWS, Problem, count_outside, rows_of, scaled
from cases.encoders import SCREENED_DTYPES, WORST, check_encoders, gaussian, same, worst
from cases.ops import CASES, DTYPES, N_PACKED
from cases.places import EDITS, edited, whole
from cases.screening import KINDS, count_violations, make_data

from darkmatter_ext.ops import encode

pytestmark = pytest.mark.slow  # the emulator takes a minute to compile

CHECKS = emulated.X86 / "checks.cpp"
WORDS, BYTES = ("avx2", "avx_vnni", "avx512"), ("avx512_vnni", "amx_int8")  # with codes of 16 and of 8 bits
ISAS = (*WORDS, *BYTES)
GROUP = {"avx2": 16, "avx_vnni": 16, **dict.fromkeys(("avx512", *BYTES), 48)}  # latents whose codes are interleaved
SIGNS = 0x9E3779B97F4A7C15  # of the dimensions before the rotation, as in csrc/cpu

check = functools.partial(check_encoders, fixed=False)


def emulated_ops(isa):
    """torch.ops.darkmatter_emulated_cpu with an instruction set from now on."""
    emulated.cpu_library()
    emulated.set_cpu_isa(isa)
    return torch.ops.darkmatter_emulated_cpu


@pytest.fixture(params=ISAS)
def cpu(request):
    """The emulated ops with one instruction set after the other."""
    return emulated_ops(request.param)


@pytest.fixture
def api(cpu, monkeypatch):
    """The public encode functions, calling the emulated ops."""
    monkeypatch.setattr(encode, "_ops", cpu)
    return encode


def compiled(source, out, *flags):
    command = [emulated.compiler(), *emulated.X86_FLAGS, *flags, str(source), "-o", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_emulated_instructions_do_what_the_processor_does(tmp_path):
    emulated.needs_avx2()
    done = compiled(CHECKS, tmp_path / "checks", "-O1")
    assert done.returncode == 0, done.stderr
    run = subprocess.run([tmp_path / "checks"], capture_output=True, text=True, check=False)
    assert re.fullmatch(r"compared \d{3}, 0 differ\n", run.stdout)


@pytest.mark.parametrize(
    "call", ["_mm512_rol_epi32(x, 3)", "_mm512_gf2p8mul_epi8(x, x)", "_mm512_dpbuud_epi32(x, x, x)"]
)
def test_an_instruction_that_is_not_emulated_does_not_compile(tmp_path, call):
    emulated.needs_avx2()
    source = tmp_path / "unknown.cpp"
    source.write_text(
        "#include <immintrin.h>\nnamespace darkmatter {\n"
        f"int first(__m512i x) {{ return _mm512_reduce_add_epi32({call}); }}\n}}  // namespace darkmatter\n"
    )
    done = compiled(source, tmp_path / "unknown.o", "-O1", "-c")
    assert done.returncode != 0
    assert call.split("(")[0] in done.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)")
def test_the_emulated_library_has_no_instruction_beyond_avx2():
    out = emulated.cpu_library()._name
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", out], capture_output=True, text=True, check=True
    ).stdout
    assert "%ymm1" in text
    assert not re.search(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])|vpdp|tdpb", text)


# The kernels of fixed shape are of Python there: made of those that have a case here.
NOT_HERE = ("screen_intervals", "prepare_encoder", "prepare_rows", "threshold_encode_fixed", "find_support_fixed")
ON_CPU = [case for case in CASES if case.op not in NOT_HERE]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ON_CPU, ids=[case.id for case in ON_CPU])
def test_every_case_of_every_op(cpu, case, dtype):
    arguments = list(case.make(dtype))
    expected = case.call()(*arguments)
    if case.name in ("packed", "gains"):  # codes may be of another kind
        gains = arguments[5 + N_PACKED :]
        arguments[5 : 5 + N_PACKED] = cpu.prepare_encoder(*arguments[1:4], *gains)
    found = getattr(cpu, case.op)(*arguments)
    if case.op.startswith("try_"):
        found, expected = decided_by_both(found, expected)
    same(found, expected)


def decided_by_both(*tried):
    """What `try_` ops give for the tokens that neither leaves: which they leave depends on codes and threads."""
    left = torch.cat([answer[-1] for answer in tried])
    kept = []
    for values, *places, _ in tried:
        if len(places) == 1:  # [N, k] values and indices
            tokens = torch.arange(len(values))
            shown = (values, *places)
        else:
            tokens = torch.repeat_interleave(places[0].diff())
            shown = (values, places[1])
        kept.append(tuple(column[~torch.isin(tokens, left)] for column in (tokens, *shown)))
    assert len(kept[0][0]) > 0
    return kept


@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "d", "n_latents", "k"), [(9, 40, 1500, 5), (1, 70, 3001, 33), (17, 33, 1024, 128), (70, 512, 300, 3)]
)
@pytest.mark.parametrize("packed", [True, False])
def test_encoders(cpu, dtype, n, d, n_latents, k, packed):
    x, W_enc, b_enc, b_dec = gaussian(n, d, n_latents, dtype)
    threshold = torch.rand(n_latents) * d**0.5 * 3
    check(cpu, x, W_enc, b_enc, b_dec, k=k, threshold=threshold, packed=packed)


@pytest.mark.parametrize("name", WORST)
@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
def test_worst_cases(cpu, name, dtype):
    x, W_enc, b_enc, b_dec = worst(name, dtype)
    check(cpu, x, W_enc, b_enc, b_dec, k=20, threshold=5.0)


@pytest.mark.parametrize("isa", ["avx512", *BYTES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(isa, kind, dtype):
    cpu = emulated_ops(isa)
    for seed, (n, d, n_latents, k) in enumerate([(9, 64, 700, 5), (3, 300, 1500, 32), (130, 40, 257, 17)]):
        x, W_enc, b_enc, b_dec = make_data(kind, n, d, n_latents, dtype, seed)
        check(cpu, x, W_enc, b_enc, b_dec if seed % 2 else None, k=k, threshold=1.0)


@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "not_finite"])
def test_intervals_hold_every_pre_activation(api, kind, dtype):
    for d, n_latents in ((96, 600), (33, 257)):
        violations, pairs = count_violations(kind, dtype, 12, d, n_latents, seed=3)
        assert violations == 0
        assert pairs > 0 or kind in ("denormal", "zero", "tiny")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ROWS)
def test_intervals_of_hard_rows_with_gains(api, kind, dtype):
    g = torch.Generator().manual_seed(0)
    gain = (torch.randn(256, generator=g) * 3).exp().to(dtype)
    gain[::9], gain[1::9] = 0, -gain[1::9]
    for exponent in (0, 1, 14):
        x, weights = (scaled(rows_of(kind, n, 70, dtype, g), exponent, dtype) for n in (3, 256))
        b_enc, b_dec = (scaled(torch.randn(n, generator=g).double(), exponent, dtype) for n in (256, 70))
        outside, looked_at = count_outside(Problem(x, weights.mT.contiguous(), b_enc, b_dec, gain))
        assert outside == 0
        assert looked_at > 0 or exponent > 0


def rotated(rows):
    """Rows [F, d] as the screen rotates them: padded to 64s, signs, the orthonormal Hadamard transform of blocks."""
    n, d = rows.shape
    padded = -(-d // 64) * 64
    signs = torch.tensor([-1.0 if SIGNS >> e & 1 else 1.0 for e in range(64)], dtype=torch.float64)
    block = max(size for size in (64, 128, 256) if padded % size == 0)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < block:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    wide = torch.zeros(n, padded, dtype=torch.float64)
    wide[:, :d] = rows
    wide *= signs.repeat(padded // 64)
    return (wide.reshape(n, -1, block) @ hadamard / block**0.5).reshape(n, padded)


def words_of(codes, d_padded, group):
    """The 16-bit codes [places, d_padded] from their bytes: two of each of a group of latents in turn."""
    return codes.view(torch.int16).reshape(-1, d_padded // 2, group, 2).permute(0, 2, 1, 3).reshape(-1, d_padded)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
@pytest.mark.parametrize(("d", "n_latents"), [(40, 300), (128, 1001), (200, 256)])
def test_packing(isa, dtype, d, n_latents):
    """Weight and bias as the real library's; codes are the (rotated) rows rounded, and their bounds hold, not loosely."""
    cpu = emulated_ops(isa)
    _, W_enc, b_enc, b_dec = gaussian(1, d, n_latents, dtype)
    weight, bias, codes, sums, bounds, groups = cpu.prepare_encoder(W_enc, b_enc, b_dec)
    same((weight, bias, groups), (part := torch.ops.darkmatter.prepare_encoder(W_enc, b_enc, b_dec))[:2] + part[5:])
    exact, group = W_enc.mT.double(), GROUP[isa]
    if isa in BYTES:
        exact = rotated(exact)
        padded = exact.shape[1]
        integers = codes[:-group].reshape(-1, padded // 4, group, 4).permute(0, 2, 1, 3).reshape(-1, padded).double()
        usual = exact.abs().amax(1) / 127
    else:
        exact = torch.nn.functional.pad(exact, (0, -d % 16))
        integers = words_of(codes[: -2 * group], exact.shape[1], group).double()
        usual = torch.maximum(exact.norm(dim=1) / 45000, exact.abs().amax(1) / 32767)
    assert len(integers) == len(sums) == -(-n_latents // 48) * 48
    assert not integers[n_latents:].any()
    integers, (scale, offset, norm, rounding, _) = integers[:n_latents], bounds[:, :n_latents].double()
    torch.testing.assert_close(scale, usual, rtol=1e-6, atol=0)
    assert (integers - exact / scale[:, None]).abs().max() < 0.5 + 1e-3
    assert torch.equal(
        sums[:n_latents], (128 * integers.sum(1)).int() if isa in BYTES else torch.zeros(n_latents).int()
    )
    assert torch.equal(offset, b_enc.double())
    removed = (exact - integers * scale[:, None]).norm(dim=1)
    assert (removed <= rounding).all()
    assert (rounding <= removed * 1.001 + 5e-7 * norm).all()
    assert (exact.norm(dim=1) <= norm).all()
    assert (norm <= exact.norm(dim=1) * 1.0001).all()


# Equal, dead and broken latents, gains, tokens left undecided


@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
@pytest.mark.parametrize("kind", EDITS)
def test_edited_weights(cpu, kind, dtype):
    for seed, n_latents in ((0, 300), (1, 1000)):
        x, W_enc = whole((90, 50), seed).to(dtype), whole((50, n_latents), seed + 1, 1).to(dtype)
        b_enc, b_dec = whole((n_latents,), seed + 2).to(dtype), whole((50,), seed + 3, 1).to(dtype)
        edited(kind, x, W_enc, b_enc, torch.Generator().manual_seed(seed))
        for packed in (True, False):
            check(cpu, x, W_enc, b_enc, b_dec if seed else None, k=9, threshold=3.0, packed=packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gains(cpu, dtype):
    x, W_enc, b_enc, b_dec = gaussian(40, 70, 900, dtype)
    gain = (torch.rand(900) * 3).to(dtype)
    gain[:30], gain[30:60] = 0, -gain[30:60]
    real = torch.ops.darkmatter
    ours, theirs = ((*packed.prepare_encoder(W_enc, b_enc, b_dec, gain), gain) for packed in (cpu, real))
    given, threshold = (x, W_enc, b_enc, b_dec), torch.tensor(20.0, dtype=dtype)
    assert ours[2].numel() > 0
    same(cpu.topk_encode(*given, 12, *ours), real.topk_encode(*given, 12, *theirs))
    same(cpu.threshold_encode(*given, threshold, *ours), real.threshold_encode(*given, threshold, *theirs))


@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
def test_tokens_left_undecided(cpu, dtype):
    """Which tokens are left depends on the codes; what the others are given does not."""
    g = torch.Generator().manual_seed(0)
    x, W_enc = 0.2 * torch.randn(70, 64, generator=g), torch.randn(64, 4000, generator=g)
    W_enc[0], x[:3, 0], x[8] = W_enc[0].abs(), 1000, 0
    W_enc[:, :3000] = W_enc[:, :1] + 1e-5 * W_enc[:, :3000]
    x[10:20] = W_enc[:, 0]
    x, W_enc, b_enc = x.to(dtype), W_enc.to(dtype), torch.zeros(4000).to(dtype)
    packed, threshold = cpu.prepare_encoder(W_enc, b_enc, None), torch.tensor(8.0).to(dtype)
    values, indices, left = cpu.try_topk_encode(x, W_enc, b_enc, None, 8, *packed)
    decided = torch.ones(70, dtype=torch.bool).index_fill(0, left, False)
    assert decided[8]
    assert decided.sum() > 30
    exact = torch.ops.darkmatter.topk_encode(x, W_enc, b_enc, None, 8, *[None] * N_PACKED)
    same((values[decided], indices[decided]), (exact[0][decided], exact[1][decided]))
    values, crow, col, left = cpu.try_threshold_encode(x, W_enc, b_enc, None, threshold, *packed)
    assert {0, 1, 2} <= set(left.tolist())
    assert len(left) < 60
    exact = torch.ops.darkmatter.threshold_encode(x, W_enc, b_enc, None, threshold, *[None] * N_PACKED)
    counts = exact[1].diff().index_fill(0, left, 0)
    kept = torch.repeat_interleave(torch.ones(70, dtype=torch.bool).index_fill(0, left, False), exact[1].diff())
    same((values, crow.diff(), col), (exact[0][kept], counts, exact[2][kept]))
