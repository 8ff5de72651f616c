"""The build: what is in it, what it says about itself, and how it fails."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases.children import run_python

import darkmatter_ext as dm

PACKAGE = Path(dm.__file__).parent
ISAS = ("scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx_int8")
TESTS = Path(__file__).resolve().parent  # `python -c` imports from its folder first: not the root, the source is there
SETUP = TESTS.parent / "setup.py"


@pytest.fixture
def setup_module(monkeypatch):
    """setup.py as a module, its call of setup() left out."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("darkmatter_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_info():
    info = dm.build_info()
    assert set(info) == {
        "version", "commit", "torch", "python", "compiler", "cuda_built", "cuda_archs", "nvcc", "cuda_loaded",
        "cuda_ops", "cpu_isa", "cpu_isa_best", "threads",
    }  # fmt: skip
    assert info["torch"] == torch.__version__
    assert info["cpu_isa"] in ISAS
    assert info["cuda_built"] == (PACKAGE / "libdarkmatter_cuda.so").exists() == bool(info["cuda_archs"])
    assert info["cuda_loaded"] == (info["cuda_built"] and torch.version.cuda is not None)
    assert info["compiler"].split()[0] in ("g++", "clang")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set_override(isa):
    program = "import darkmatter_ext as dm\ntry: print(dm.build_info()['cpu_isa'])\nexcept RuntimeError as e: print(e)"
    run = run_python(program, DARKMATTER_CPU_ISA=isa)
    best = dm.build_info()["cpu_isa_best"]
    missing = f"DARKMATTER_CPU_ISA: must be supported by this machine ({best}), got {isa}"
    assert run.stdout.strip() in ((isa,) if isa in ("scalar", best) else (isa, missing))


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")
def test_each_library_needs_only_what_its_torch_has():
    """A CPU torch has no libtorch_cuda.so; the CUDA library must name it, or its symbols are not found at load."""

    def needed(name):
        return subprocess.run(["readelf", "-d", PACKAGE / name], capture_output=True, text=True, check=True).stdout

    assert "libtorch_cpu.so" in needed("libdarkmatter_cpu.so")
    assert "libtorch_cuda" not in needed("libdarkmatter_cpu.so")
    assert "libpython" not in needed("libdarkmatter_cpu.so")
    if (PACKAGE / "libdarkmatter_cuda.so").exists():
        assert "libtorch_cuda.so" in needed("libdarkmatter_cuda.so")
        assert "libcudart" not in needed("libdarkmatter_cuda.so"), "the CUDA runtime is linked statically"


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")
def test_the_cpu_library_needs_no_newer_glibc_than_its_wheel_says():
    command = ["readelf", "--wide", "--dyn-syms", "--version-info", PACKAGE / "libdarkmatter_cpu.so"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    if "__isoc23_" in run.stdout:
        pytest.skip("built with glibc 2.38 or newer, which renames strtol and others")
    needed = {tuple(map(int, each)) for each in re.findall(r"GLIBC_(\d+)\.(\d+)", run.stdout)}
    assert needed
    assert max(needed) <= (2, 28)


# AVX and later, whose mnemonics begin with v, and AMX.
WIDE = re.compile(r"^\s+[0-9a-f]+:\s+(\{\w+\} )?(v[a-z]|tdp|tile|ldtile)")
AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b")
# In a mangled name: the unnamed namespace, or a name of internal linkage (L and its length).
INTERNAL = re.compile(r"12_GLOBAL__N_1|L\d+[A-Za-z]")


def _instructions(path):
    """Each function's mangled name and its lines of instructions."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    name, functions = "", {}
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if line.endswith(">:"):
            name = line[line.index("<") + 1 : -2]
        else:
            functions.setdefault(name, []).append(line)
    return functions


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)")
def test_wide_instructions_stay_in_functions_that_only_dispatch_reaches():
    """A function that other files can call or share may run on a machine that has no such instruction.

    An inline function of the standard library compiled among kernels, for one: the linker keeps one copy for everybody.
    """
    functions = _instructions(PACKAGE / "libdarkmatter_cpu.so")
    if not any("12_GLOBAL__N_1" in name for name in functions):
        pytest.skip("the library is stripped: no names to tell its functions by")
    wide = {name for name, lines in functions.items() if any(WIDE.match(line) for line in lines)}
    assert [name for name in wide if not INTERNAL.search(name) or name.startswith("_GLOBAL__sub_I")] == []
    beyond = {name for name in wide if any(AVX512.search(line) for line in functions[name])}
    assert beyond, "no AVX-512 at all: the test looks at the wrong thing"
    assert [name for name in beyond if re.search(r"avx2|avx_vnni|6scalar", name)] == []
    products = {name for name, lines in functions.items() if any("vpdp" in line for line in lines)}
    assert [name for name in products if not re.search(r"words_avx_vnniL|12_GLOBAL__N_1", name)] == []
    of_avx = [line for name in products if "words_avx_vnni" in name for line in functions[name] if "vpdp" in line]
    assert of_avx, "no AVX-VNNI at all"
    assert [line for line in of_avx if "{vex}" not in line] == []  # else it takes AVX-512


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
@pytest.mark.skipif(not (PACKAGE / "libdarkmatter_cuda.so").exists(), reason="built without CUDA kernels (no nvcc)")
def test_the_cuda_library_asks_for_names_torch_has():
    """Built without a CUDA torch, it links against an empty stand-in: a name torch lacks would show at load only."""

    def symbols(path, kind):
        run = subprocess.run(["nm", "-D", kind, path], capture_output=True, text=True, check=True)
        return {line.split()[-1].split("@")[0] for line in run.stdout.splitlines()}

    torch_folder = Path(torch.__file__).parent
    wanted = {name for name in symbols(PACKAGE / "libdarkmatter_cuda.so", "--undefined-only") if "torch_" in name}
    exported = symbols(torch_folder / "lib/libtorch_cpu.so", "--defined-only")
    include = torch_folder / "include/torch/csrc"
    headers = [include / "inductor/aoti_torch/c/shim.h", include / "stable/c/shim.h"]
    declared = {name for path in headers for name in re.findall(r"\b(?:aoti_)?torch_\w*cuda\w*", path.read_text())}
    assert wanted - exported <= declared
    assert "torch_get_current_cuda_blas_handle" in wanted


def test_cuda_switch(setup_module, monkeypatch):
    monkeypatch.setattr(setup_module, "find_nvcc", lambda: None)
    for value in ("auto", "0"):
        monkeypatch.setenv("DARKMATTER_CUDA", value)
        assert setup_module.cuda_choice() is None
    monkeypatch.setenv("DARKMATTER_CUDA", "1")
    with pytest.raises(SystemExit, match=r"^darkmatter_ext: DARKMATTER_CUDA=1 needs nvcc, and none was found"):
        setup_module.cuda_choice()
    monkeypatch.setenv("DARKMATTER_CUDA", "yes")
    with pytest.raises(SystemExit, match=r"^darkmatter_ext: DARKMATTER_CUDA: must be auto, 1 or 0, got 'yes'$"):
        setup_module.cuda_choice()
    monkeypatch.setattr(setup_module, "find_nvcc", lambda: "/opt/cuda/bin/nvcc")
    monkeypatch.setenv("DARKMATTER_CUDA", "0")
    assert setup_module.cuda_choice() is None
    monkeypatch.setenv("DARKMATTER_CUDA", "auto")
    assert setup_module.cuda_choice() == "/opt/cuda/bin/nvcc"


def test_cuda_architectures(setup_module, monkeypatch):
    monkeypatch.delenv("DARKMATTER_CUDA_ARCHS", raising=False)
    assert setup_module.cuda_archs() == ["80", "90a"]
    monkeypatch.setenv("DARKMATTER_CUDA_ARCHS", "86;100")
    assert setup_module.cuda_archs() == ["86", "100"]
    monkeypatch.setenv("DARKMATTER_CUDA_ARCHS", "sm_80")
    with pytest.raises(SystemExit, match=r"^darkmatter_ext: DARKMATTER_CUDA_ARCHS: must be like 80;90a, got 'sm_80'$"):
        setup_module.cuda_archs()


def test_old_torch_is_refused(setup_module, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    with pytest.raises(SystemExit, match=r"^darkmatter_ext: torch must be 2.11 or later, got 2.10.1\+cpu$"):
        setup_module.torch_folder()


@pytest.mark.slow
def test_missing_ops_are_one_line(tmp_path):
    """A source folder without compiled ops in front of the installed package."""
    shutil.copytree(PACKAGE, tmp_path / "darkmatter_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = "import darkmatter_ext as dm\ntry: dm.topk_encode\nexcept RuntimeError as e: print(e)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("darkmatter_ext: the compiled ops are missing")
    assert run.stdout.count("\n") == 1


def test_setup_refuses_in_one_line(tmp_path):
    """The command itself: the refusal comes before anything is compiled, and without a traceback."""
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path,
    ]
    run = subprocess.run(
        command,
        env={**os.environ, "DARKMATTER_CUDA": "maybe"},
        cwd=SETUP.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "darkmatter_ext: DARKMATTER_CUDA: must be auto, 1 or 0, got 'maybe'"
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.rglob("*.o"))


PTXAS = """ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_ZN10darkmatter4cuda18filter_topk_kernelENS0_10ScoreChunkEi' for 'sm_90a'
ptxas info    : Function properties for _ZN10darkmatter4cuda18filter_topk_kernelENS0_10ScoreChunkEi
    160 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 160 bytes cumulative stack size
ptxas info    : Compile time = 191.835 ms
ptxas info    : Compiling entry function '_ZN10darkmatter4cuda4runsI6__halfLi4ELb0EEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN10darkmatter4cuda4runsI6__halfLi4ELb0EEEvPKT_
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 512 bytes smem, 400 bytes cmem[0]
"""


def test_resources_of_kernels(setup_module):
    found = setup_module.kernel_resources(PTXAS)
    assert [tuple(each) for each in found] == [
        ("filter_topk_kernel", "90a", 80, 0, 160, 0),
        ("runs<half, 4, 0>", "80", 64, 512, 0, 8),
    ]
    assert setup_module.kernel_name("_ZN1a6kernelINS_3oddEEEvv") == "kernel<..>"
