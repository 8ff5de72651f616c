"""The CPU ops with AVX-512 and its 8-bit dot products, run on AVX2 by the emulator: the real library's answer to the bit.

What the emulator cannot show is speed, and what a compiler makes of the same sources for the real instructions. On a
machine that has them the comparison is with them.
"""

import re
import shutil
import subprocess

import emulated
import pytest
import torch
from encoder_cases import SCREENED_DTYPES, WORST, check_encoders, gaussian, same
from op_cases import CASES, DTYPES, N_PACKED
from screening_cases import KINDS, count_violations, make_data

from darkmatter_ext import ops

CHECKS = emulated.X86 / "checks.cpp"
ISAS = ("avx512", "avx512_vnni")
SIGNS = 0x9E3779B97F4A7C15  # of the dimensions before the rotation, as in csrc/cpu


@pytest.fixture(params=ISAS)
def cpu(request):
    """torch.ops.darkmatter_emulated_cpu with one instruction set after the other."""
    emulated.cpu_library()
    emulated.set_cpu_isa(request.param)
    return torch.ops.darkmatter_emulated_cpu


@pytest.fixture
def vnni():
    """The same with 8-bit dot products."""
    emulated.cpu_library()
    emulated.set_cpu_isa("avx512_vnni")
    return torch.ops.darkmatter_emulated_cpu


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
def test_the_emulated_library_has_no_instruction_beyond_avx2(vnni):
    out = emulated.cpu_library()._name
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", out], capture_output=True, text=True, check=True
    ).stdout
    assert "%ymm1" in text
    assert not re.search(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])|vpdp", text)


ON_CPU = [case for case in CASES if case.op not in ("screen_intervals", "pack_encoder")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ON_CPU, ids=[case.id for case in ON_CPU])
def test_every_case_of_every_op(cpu, case, dtype):
    arguments = list(case.make(dtype))
    expected = case.call()(*arguments)
    if case.name == "packed":  # codes may be of another kind
        arguments[-N_PACKED:] = cpu.pack_encoder(*arguments[1:4])
    same(getattr(cpu, case.op)(*arguments), expected)


@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "d", "n_latents", "k"), [(9, 40, 1500, 5), (1, 70, 3001, 33), (17, 33, 1024, 128), (70, 512, 300, 3)]
)
@pytest.mark.parametrize("packed", [True, False])
def test_encoders(cpu, dtype, n, d, n_latents, k, packed):
    x, W_enc, b_enc, b_dec = gaussian(n, d, n_latents, dtype)
    threshold = torch.rand(n_latents) * d**0.5 * 3
    check_encoders(cpu, x, W_enc, b_enc, b_dec, k=k, threshold=threshold, packed=packed)


@pytest.mark.parametrize("name", WORST)
@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
def test_worst_cases(cpu, name, dtype):
    x, W_enc, b_enc, b_dec = (part.to(dtype) for part in WORST[name]())
    check_encoders(cpu, x, W_enc, b_enc, b_dec, k=20, threshold=5.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(vnni, kind, dtype):
    for seed, (n, d, n_latents, k) in enumerate([(9, 64, 700, 5), (3, 300, 1500, 32), (130, 40, 257, 17)]):
        x, W_enc, b_enc, b_dec = make_data(kind, n, d, n_latents, dtype, seed)
        check_encoders(vnni, x, W_enc, b_enc, b_dec if seed % 2 else None, k=k, threshold=1.0)


@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "not_finite"])
def test_intervals_hold_every_pre_activation(vnni, monkeypatch, kind, dtype):
    monkeypatch.setattr(ops, "_ops", vnni)
    for d, n_latents in ((96, 600), (33, 257)):
        violations, pairs = count_violations(kind, dtype, 12, d, n_latents, seed=3)
        assert violations == 0
        assert pairs > 0 or kind in ("denormal", "zero", "tiny")


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


@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
@pytest.mark.parametrize(("d", "n_latents"), [(40, 300), (128, 1001), (200, 256)])
def test_packing(vnni, dtype, d, n_latents):
    """Weight and bias as the real library's; codes are the rotated rows rounded, and their bounds hold, not loosely."""
    _, W_enc, b_enc, b_dec = gaussian(1, d, n_latents, dtype)
    weight, bias, codes, sums, bounds = vnni.pack_encoder(W_enc, b_enc, b_dec)
    same((weight, bias), torch.ops.darkmatter.pack_encoder(W_enc, b_enc, b_dec)[:2])
    exact = rotated(W_enc.mT.double())
    padded = exact.shape[1]
    integers = codes.reshape(-1, padded // 4, 48, 4).permute(0, 2, 1, 3).reshape(-1, padded).double()
    assert not integers[n_latents:].any()
    integers, (scale, offset, norm, rounding, _) = integers[:n_latents], bounds[:, :n_latents].double()
    torch.testing.assert_close(scale, exact.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert (integers - exact / scale[:, None]).abs().max() < 0.5 + 1e-3
    assert torch.equal(sums[:n_latents], (128 * integers.sum(1)).int())
    assert torch.equal(offset, b_enc.double())
    removed = (exact - integers * scale[:, None]).norm(dim=1)
    assert (removed <= rounding).all()
    assert (rounding <= removed * 1.001).all()
    assert (exact.norm(dim=1) <= norm).all()
    assert (norm <= exact.norm(dim=1) * 1.0001).all()
