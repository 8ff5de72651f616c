"""Build of the compiled parts; project metadata is in pyproject.toml.

Three libraries, placed inside the package:
  _C                     a small pybind11 module: how it was built, what the CPU can do (the CPU library tells it too)
  libdarkmatter_cpu.so   the ops on the CPU, on libtorch's stable ABI: one build serves torch 2.11 and later
  libdarkmatter_cuda.so  the ops on CUDA, when nvcc is found; built without a CUDA torch, loaded only by one

Environment:
  DARKMATTER_CUDA        auto (default): build CUDA kernels when nvcc is found; 1: fail without it; 0: leave them out
  DARKMATTER_CUDA_ARCHS  architectures, default "80;90a"; PTX of the first is added for GPUs not listed
  CUDA_HOME              where the CUDA toolkit is; default: nvcc on PATH, then /usr/local/cuda
  DARKMATTER_ANY_PYTHON  1: leave out _C, so that a wheel serves every Python (`make wheel`)
  DARKMATTER_TORCH       the folder of another torch to build against, of another processor with CXX a cross compiler
  DARKMATTER_SANITIZE    address (and undefined behaviour) or thread: a slow build that watches itself (`make sanitize`);
                         fuzzer: address, and it tells every edge that it takes (`make fuzz-native`)
  MAX_JOBS               compilers at a time
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TARGET_TORCH = "0x020B000000000000"  # stable ABI of torch 2.11
# Without these, nvcc puts random names and the number of its process into an object. They overrule cuda_check's --keep-dir.
SAME_BYTES = "--frandom-seed=$out --objdir-as-tempdir"
DEFAULT_CUDA_ARCHS = "80;90a"
CHECKED_CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")  # of `make cuda-check`, where nvcc has them
SHOWN_CUDA_ARCH = "90a"  # whose resources it prints
MAX_SPILL_BYTES = 0


def fail(message: str) -> NoReturn:
    """Stop the build with one line instead of a traceback."""
    sys.exit(f"darkmatter_ext: {message}")


def torch_folder() -> Path:
    """Where torch is installed. An isolated build does not see it: then look where this interpreter keeps packages."""
    if given := os.environ.get("DARKMATTER_TORCH"):
        if not (Path(given) / "include").is_dir():
            fail(f"DARKMATTER_TORCH: must be a folder with torch's include and lib, got {given}")
        return Path(given)
    try:
        import torch
    except ModuleNotFoundError:
        sys.path.append(sysconfig.get_path("purelib"))
        try:
            import torch
        except ModuleNotFoundError:
            fail("torch must be installed first: pip install torch, then pip install --no-build-isolation .")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        fail(f"torch must be 2.11 or later, got {torch.__version__}")
    return Path(torch.__file__).parent


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin/nvcc"] if home else []
    candidates += [Path(path) for path in [shutil.which("nvcc")] if path]
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(path) for path in candidates if path.is_file()), None)


def cuda_choice() -> str | None:
    """nvcc when CUDA kernels are to be built, else None."""
    wanted = os.environ.get("DARKMATTER_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        fail(f"DARKMATTER_CUDA: must be auto, 1 or 0, got {wanted!r}")
    nvcc = None if wanted == "0" else find_nvcc()
    if wanted == "1" and nvcc is None:
        fail("DARKMATTER_CUDA=1 needs nvcc, and none was found: set CUDA_HOME, or DARKMATTER_CUDA=0")
    return nvcc


def cuda_archs() -> list[str]:
    archs = [arch for arch in os.environ.get("DARKMATTER_CUDA_ARCHS", DEFAULT_CUDA_ARCHS).split(";") if arch]
    for arch in archs:
        if not arch.rstrip("af").isdigit():
            fail(f"DARKMATTER_CUDA_ARCHS: must be like 80;90a, got {arch!r}")
    return archs


def for_every_python() -> bool:
    """Whether a wheel is built that serves every version of Python: without _C, which is of one."""
    wanted = os.environ.get("DARKMATTER_ANY_PYTHON", "0")
    if wanted not in ("0", "1"):
        fail(f"DARKMATTER_ANY_PYTHON: must be 1 or 0, got {wanted!r}")
    return wanted == "1"


WATCHED = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
SANITIZERS = {
    "": "-O3 -DNDEBUG",
    "address": WATCHED,
    "fuzzer": f"{WATCHED} -fsanitize-coverage=trace-pc,trace-cmp",
    "thread": "-O1 -g -fno-omit-frame-pointer -fsanitize=thread -DDARKMATTER_OWN_THREADS",
}


def optimisation() -> str:
    """How the CPU library is compiled and linked: fast, or watched by a sanitizer."""
    wanted = os.environ.get("DARKMATTER_SANITIZE", "")
    if wanted not in SANITIZERS:
        fail(f"DARKMATTER_SANITIZE: must be address, thread or fuzzer, got {wanted!r}")
    return SANITIZERS[wanted]


def find_ninja() -> str:
    """ninja from pip is in this environment's scripts folder, which is on PATH only when the environment is active."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ModuleNotFoundError:
        return shutil.which("ninja") or fail("ninja must be installed first: pip install ninja")


def last_line(command: list[str]) -> str:
    """Of what a command prints; empty when it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return (done.stdout.strip().splitlines() or [""])[-1] if done.returncode == 0 else ""


def ninja_path(path: Path | str) -> str:
    """A path in a build line of a ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell(path: Path | str) -> str:
    """A path in a command of a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")


def object_name(source: Path, suffix: str = "") -> str:
    """Of a source in csrc; two of the same name in different folders have different objects."""
    return f"{source.relative_to(ROOT / 'csrc')}{suffix}.o".replace("/", "_")


class Build:
    """The commands of the build, written as a ninja file: parallel, and only what changed."""

    def __init__(self, work: Path, out: Path, nvcc: str | None, archs: list[str]) -> None:
        self.work, self.out, self.nvcc, self.archs = work, out, nvcc, archs
        torch = torch_folder()
        self.own_include = ROOT / "csrc"
        self.torch_include = [torch / "include", torch / "include/torch/csrc/api/include"]
        self.torch_libs = f"-L{shell(torch / 'lib')} -ltorch -ltorch_cpu -lc10"
        self.cxx = os.environ.get("CXX", "c++")
        self.lines: list[str] = []

    def rule(self, name: str, command: str) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", "  depfile = $out.d", "  deps = gcc"]

    def objects(self, rule: str, sources: list[Path], suffix: str = "") -> str:
        names = []
        for source in sources:
            name = object_name(source, suffix)
            self.lines.append(f"build {name}: {rule} {ninja_path(source)}")
            names.append(name)
        return " ".join(names)

    def flags(self) -> tuple[str, str]:
        system = " ".join(f"-isystem {shell(path)}" for path in self.torch_include)
        common = f"-I{shell(self.own_include)} {system} -DTORCH_TARGET_VERSION={TARGET_TORCH}"
        return common, f"-std=c++20 {optimisation()} -fPIC -fvisibility=hidden -Wall -Wno-psabi {common}"

    def nvcc_command(self, archs: list[str], extra: str = "") -> str:
        targets = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
        return (
            f"{shell(self.nvcc or 'nvcc')} -O3 -DNDEBUG -lineinfo -std=c++20 -DUSE_CUDA -Xcompiler -fPIC,-fvisibility=hidden "
            f"{self.flags()[0]} {targets} {extra} -MD -MF $out.d -c $in -o $out"
        )

    def write(self) -> None:
        """The whole build file."""
        csrc = ROOT / "csrc"
        _, cxx_flags = self.flags()
        self.rule("cxx", f"{self.cxx} {cxx_flags} -MMD -MF $out.d -c $in -o $out")
        self.lines += ["rule link", f"  command = {self.cxx} -shared {optimisation()} $in -o $out $libs"]
        keep = "-Wl,--no-as-needed " if platform.system() == "Linux" else ""
        self.rule("facts", f"{self.cxx} {cxx_flags} {self._facts()} -MMD -MF $out.d -c $in -o $out")
        facts = self.objects("facts", [csrc / "facts.cpp"])
        cpu = self.objects(
            "cxx", [csrc / "ops.cpp", csrc / "single_threaded.cpp", *sorted((csrc / "cpu").rglob("*.cpp"))]
        )
        self.lines += [
            f"build {ninja_path(self.out)}/libdarkmatter_cpu.so: link {cpu} {facts}",
            f"  libs = {keep}{self.torch_libs}",
        ]
        if not for_every_python():
            self._python_module(csrc, cxx_flags, facts)
        if self.nvcc:
            self._cuda_library(csrc)
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "build.ninja").write_text("\n".join(self.lines) + "\n")

    def _facts(self) -> str:
        """What facts.cpp is told about the build."""
        describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+changes", "--abbrev=40", "--exclude=*"]
        facts = {
            "CUDA_ARCHS": ";".join(self.archs) if self.nvcc else "",
            "NVCC": last_line([self.nvcc, "--version"]) if self.nvcc else "",
            "COMMIT": last_line(describe),
        }
        return " ".join(f"-DDARKMATTER_{name}='\"{value}\"'" for name, value in facts.items())

    def _python_module(self, csrc: Path, cxx_flags: str, facts: str) -> None:
        import pybind11

        includes = f"-I{shell(pybind11.get_include())} -I{shell(sysconfig.get_path('include'))}"
        self.rule("pycxx", f"{self.cxx} {cxx_flags} {includes} -MMD -MF $out.d -c $in -o $out")
        module = self.objects("pycxx", [csrc / "module.cpp"])
        isa = self.objects("cxx", [csrc / "cpu/kernels/isa.cpp"], ".module")
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        self.lines += [f"build {ninja_path(self.out)}/_C{suffix}: link {module} {facts} {isa}", "  libs ="]

    def _cuda_library(self, csrc: Path) -> None:
        # A CPU torch has no libtorch_cuda.so to link; an empty library of that name records the dependency, so that
        # the loader resolves torch's CUDA symbols when a CUDA torch loads this one.
        self.lines += [
            "rule stub",
            f"  command = {self.cxx} -shared -Wl,-soname,libtorch_cuda.so -x c++ /dev/null -o $out",
            "build libtorch_cuda.so: stub",
        ]
        ptx = f"-gencode arch=compute_{self.archs[0].rstrip('af')},code=compute_{self.archs[0].rstrip('af')}"
        self.rule("nvcc", self.nvcc_command(self.archs, f"{ptx} {SAME_BYTES}"))
        objects = self.objects("nvcc", sorted((csrc / "cuda").rglob("*.cu")))
        # nvcc links, because only it knows where its static runtime library is.
        libs = f"{self.torch_libs} -L. -ltorch_cuda"
        self.lines += [
            "rule nvlink",
            f"  command = {shell(self.nvcc or 'nvcc')} -shared -cudart static -Xlinker --no-as-needed $in -o $out {libs}",
            f"build {ninja_path(self.out)}/libdarkmatter_cuda.so: nvlink {objects} | libtorch_cuda.so",
        ]

    def run(self) -> None:
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        command = [find_ninja(), "-C", str(self.work), "-j", jobs]
        if subprocess.run(command, check=False).returncode != 0:
            fail("the build failed; the compiler's message is above")


class BuildLibraries(build_ext):
    """`build_ext` that makes the three libraries with ninja."""

    def run(self) -> None:
        nvcc = cuda_choice()
        archs = cuda_archs() if nvcc else []
        out = ROOT / "darkmatter_ext" if self.inplace else Path(self.build_lib).resolve() / "darkmatter_ext"
        out.mkdir(parents=True, exist_ok=True)
        if nvcc is None:  # of an earlier build in the same folder
            (out / "libdarkmatter_cuda.so").unlink(missing_ok=True)
        build = Build(Path(self.build_temp).resolve(), out, nvcc, archs)
        build.write()
        build.run()
        made = f"CPU and CUDA kernels ({', '.join(archs)})" if nvcc else "CPU kernels; no CUDA kernels"
        reason = (
            "" if nvcc else " (DARKMATTER_CUDA=0)" if os.environ.get("DARKMATTER_CUDA") == "0" else " (no nvcc found)"
        )
        print(f"darkmatter_ext: built {made}{reason}", file=sys.stderr)


class AnyPythonWheel(bdist_wheel):
    """`bdist_wheel` whose tag says that nothing in it is of one version of Python, where that is so."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, machine = super().get_tag()
        return ("py3", "none", machine) if for_every_python() else (python, abi, machine)


TEMPLATE_TYPES = {"f": "float", "d": "double", "i": "int", "6__half": "half", "13__nv_bfloat16": "bfloat16"}


def kernel_name(mangled: str) -> str:
    """The last part of a kernel's name, with its template arguments: finish_topk_kernel<float>."""
    at, name = mangled.find("_ZN") + 3, mangled
    while number := re.match(r"\d+", mangled[at:]):
        start = at + number.end()
        at = start + int(number.group())
        name = mangled[start:at]
    if not mangled[at:].startswith("I"):
        return name
    arguments = re.match(r"I((?:6__half|13__nv_bfloat16|L[a-z]\d+E|[a-z])+)E", mangled[at:])
    if arguments is None:
        return f"{name}<..>"
    parts = re.findall(r"6__half|13__nv_bfloat16|L[a-z]\d+E|[a-z]", arguments.group(1))
    return f"{name}<{', '.join(TEMPLATE_TYPES.get(part, part.strip('LE')[1:]) for part in parts)}>"


class Resources(NamedTuple):
    """Of a kernel on one architecture, as `ptxas -v` reports them; bytes but for registers."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spilled: int


def kernel_resources(report: str) -> list[Resources]:
    """All that a compiler's report has; functions that are no kernels have a stack, but no registers of their own."""
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        head, properties = part.split("\n", 1)
        mangled, arch = re.findall(r"(\w+)' for 'sm_(\w+)'", head)[0]
        own = properties.split(f"Function properties for {mangled}", 1)[1]

        def number(pattern: str, text: str = own) -> int:
            match = re.search(pattern, text)
            return int(match.group(1)) if match else 0

        spilled = max(map(int, re.findall(r"(\d+) bytes spill", own)), default=0)
        found.append(
            Resources(
                kernel_name(mangled), arch, number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"),
                number(r"(\d+) bytes stack frame"), spilled,
            )
        )  # fmt: skip
    return found


class CudaCheck(Command):
    """Compile every CUDA kernel for every supported architecture; fail on register spills, and where nvdisasm is there on
    what csrc/sass.py finds wrong in the machine code. Needs nvcc, no GPU."""

    description = "compile all CUDA kernels for all supported architectures"
    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            fail("cuda_check needs nvcc, and none was found: set CUDA_HOME")
        work = ROOT / "build/cuda_check"
        shutil.rmtree(work, ignore_errors=True)  # objects of sources that are gone would be linked
        work.mkdir(parents=True)
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        archs = [arch for arch in CHECKED_CUDA_ARCHS if f"sm_{arch.rstrip('af')}" in known]
        build = Build(work, work, nvcc, archs)
        sources = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
        sys.path.insert(0, str(ROOT / "csrc"))
        import sass

        self.sass, self.nvdisasm = sass, sass.find_nvdisasm(nvcc)
        self.scans: dict[str, dict[str, int]] = {}
        self.faults: list[str] = []
        print(
            f"{'kernel on sm_' + SHOWN_CUDA_ARCH:32}{'variants':>10}{'registers':>11}{'shared':>8}{'stack':>7}{'spilled':>9}"
            + (f"{'instructions':>14}{'16-byte':>9}{'barriers':>10}" if self.nvdisasm else "")
        )
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", str(os.cpu_count())))) as pool:
            results = pool.map(lambda each: self._compile(build, work, each), sources)
            for source, done in zip(sources, results, strict=True):
                if done.returncode != 0:
                    print(done.stderr)
                    fail(f"{source.name} does not compile")
                self._check_resources(source, done.stderr, self._check_code(work, source))
        print(f"no kernel spills on sm_{', sm_'.join(archs)}")
        self._print_scans()
        self._link(build, work)

    def _compile(self, build: Build, work: Path, source: Path) -> subprocess.CompletedProcess[str]:
        keep = self._keep(work, source)
        keep.mkdir()
        command = build.nvcc_command(build.archs, f"-Xptxas -v --keep --keep-dir {shell(keep)}")
        command = command.replace("$in", shell(source)).replace("$out", shell(work / object_name(source)))
        return subprocess.run(shlex.split(command.replace("$$", "$")), capture_output=True, text=True, check=False)

    def _link(self, build: Build, work: Path) -> None:
        """The whole library from these objects, as a build makes it: kernels defined twice or never show here."""
        objects = [str(path) for path in sorted(work.glob("*.o"))]
        stub, library = work / "libtorch_cuda.so", work / "libdarkmatter_cuda.so"
        empty = [build.cxx, "-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", "/dev/null", "-o", str(stub)]
        subprocess.run(empty, check=True)
        command = [str(build.nvcc), "-shared", "-cudart", "static", *objects, "-o", str(library)]
        command += [*shlex.split(build.torch_libs), f"-L{work}", "-ltorch_cuda"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(done.stderr)
            fail("the CUDA library does not link")
        print(f"libdarkmatter_cuda.so: {library.stat().st_size / 1e6:.1f} MB linked from {len(objects)} objects")

    @staticmethod
    def _keep(work: Path, source: Path) -> Path:
        return (work / object_name(source)).with_suffix(".parts")

    def _check_code(self, work: Path, source: Path) -> dict[str, list[Any]]:
        """The machine code of the architecture that is shown, kernel by kernel; fails on what is wrong in any."""
        keep, shown = self._keep(work, source), {}
        for cubin in sorted(keep.glob("*.cubin")) if self.nvdisasm else ():
            arch = cubin.stem.rpartition("_")[2]
            for code in self.sass.disassembled(self.nvdisasm, cubin):
                name = kernel_name(code.mangled)
                self.faults += [f"{name} {fault} on sm_{arch}" for fault in self.sass.faults(name, code, arch)]
                scan = self.sass.scan_of(name)
                if scan and (length := code.scan(scan)):
                    self.scans.setdefault(name, {})[arch] = length
                if arch == SHOWN_CUDA_ARCH:
                    shown.setdefault(name.split("<")[0], []).append(code)
        shutil.rmtree(keep)  # a hundred megabytes
        return shown

    def _print_scans(self) -> None:
        if not self.nvdisasm:
            print(
                "machine code not read: no nvdisasm (it comes with the CUDA toolkit, and as pip's nvidia-cuda-nvdisasm)"
            )
        for name, lengths in self.scans.items():
            each = ", ".join(f"{length} on sm_{arch}" for arch, length in lengths.items())
            print(f"{name}: instructions of a thread's scan of a tile: {each}; at most {self.sass.scan_of(name).most}")
        if self.faults:
            fail("; ".join(self.faults))

    def _check_resources(self, source: Path, report: str, code: dict[str, list[Any]]) -> None:
        found = kernel_resources(report)
        if not found and "__global__" in source.read_text():
            fail(f"{source.name} compiled to no kernel")
        for each in found:
            if each.spilled > MAX_SPILL_BYTES:
                fail(f"{each.kernel} spills {each.spilled} bytes on sm_{each.arch}, allowed are {MAX_SPILL_BYTES}")
        shown = [each for each in found if each.arch == SHOWN_CUDA_ARCH]
        for name in sorted({each.kernel.split("<")[0] for each in shown}):
            own = [each for each in shown if each.kernel.split("<")[0] == name]
            registers = sorted({each.registers for each in own})
            span = "-".join(str(each) for each in dict.fromkeys((registers[0], registers[-1])))
            shared, stack, spilled = (
                max(getattr(each, part) for each in own) for part in ("shared", "stack", "spilled")
            )
            line = f"{name:32}{len(own):10}{span:>11}{shared:8}{stack:7}{spilled:9}"
            if codes := code.get(name):
                length = max(len(each.instructions) for each in codes)
                wide = max(each.wide_loads + each.wide_stores for each in codes)
                line += f"{length:14}{wide:9}{max(len(each.barriers) for each in codes):10}"
            print(line)
        if "wgmma" in report and "serialized" in report:
            fail(f"{source.name}: the compiler serialises wgmma (C7510)")


setup(
    ext_modules=[Extension("darkmatter_ext._C", ["csrc/module.cpp"])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel, "cuda_check": CudaCheck},
)
