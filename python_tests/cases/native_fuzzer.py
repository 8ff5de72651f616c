"""Builds and runs the fuzzer of the CPU library: `python -m cases.native_fuzzer SECONDS` (`make fuzz-native`).

The library is built with gcc's sanitizers, telling every edge that it takes (DARKMATTER_SANITIZE=fuzzer), and linked with
fuzz/native_target.cpp and libFuzzer, which Debian has in libfuzzer-14-dev. What is built, the inputs that took new edges
and those that failed are in build/fuzz-native; the same inputs are gone on from.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from cases.children import environment_of_children
from darkmatter_ext.runtime.storage import fingerprint

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build/fuzz-native"
TARGET = ROOT / "python_tests/fuzz/native_target.cpp"
TORCH = Path(torch.__file__).parent
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "DARKMATTER_POOL_MB": "0", "OMP_NUM_THREADS": "1"}


def libfuzzer() -> Path | None:
    """libFuzzer's library with its main function: LIBFUZZER, else the newest of the system's compilers."""
    if named := os.environ.get("LIBFUZZER"):
        return Path(named)
    places = ("llvm-*/lib/libFuzzer.a", "llvm-*/lib/clang/*/lib/linux/libclang_rt.fuzzer-x86_64.a")
    return next((path for place in places for path in sorted(Path("/usr/lib").glob(place), reverse=True)), None)


def build() -> Path:
    """The fuzzer; only what has changed is compiled."""
    library = WORK / "lib/darkmatter_ext/libdarkmatter_cpu.so"
    more = {"DARKMATTER_SANITIZE": "fuzzer", "DARKMATTER_CUDA": "0", "DARKMATTER_ANY_PYTHON": "1"}
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", WORK, "--build-lib", WORK / "lib"]
    subprocess.run(command, cwd=ROOT, env=environment_of_children(**more), check=True)
    compiler, program = os.environ.get("CXX", "c++"), WORK / "native_target"
    made = WORK / f"native_target-{fingerprint(source=TARGET.read_text(), torch=torch.__version__)}.o"
    if not made.exists():
        headers = [TORCH / "include", TORCH / "include/torch/csrc/api/include"]
        system = [word for folder in headers for word in ("-isystem", folder)]
        subprocess.run([compiler, "-std=c++20", "-O0", "-w", *system, "-c", TARGET, "-o", made], check=True)
    link = [compiler, "-fsanitize=address,undefined", made, libfuzzer(), "-Wl,--no-as-needed", library]
    link += [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}:{library.parent}"]
    # The library calls the target; libFuzzer has a __sanitizer_cov_trace_pc too, which only says that it takes no such calls.
    subprocess.run([*link, "-Wl,--export-dynamic", "-Wl,-z,muldefs", "-lpthread", "-o", program], check=True)
    return program


def run(program: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """Fuzz for so long; it fails at the first wrong answer, and keeps its input."""
    corpus, failed = WORK / "corpus", WORK / "failed"
    for folder in (corpus, failed):
        folder.mkdir(parents=True, exist_ok=True)
    command = [
        program, corpus, f"-max_total_time={seconds:.0f}", "-max_len=256", "-len_control=0", "-timeout=300",
        "-rss_limit_mb=6000", f"-artifact_prefix={failed}/", "-print_final_stats=1",
    ]  # fmt: skip
    return subprocess.run(command, env=os.environ | OPTIONS, stderr=subprocess.PIPE, text=True, check=False)


if __name__ == "__main__":
    if libfuzzer() is None:
        raise SystemExit(
            "make fuzz-native needs libFuzzer, found none: install libfuzzer-14-dev, or name it in LIBFUZZER"
        )
    done = run(build(), float(sys.argv[1]))
    sys.stderr.write("\n".join(done.stderr.splitlines()[-40:]) + "\n")
    if done.returncode:
        again = shlex.join([*(f"{name}={value}" for name, value in OPTIONS.items()), str(WORK / "native_target")])
        raise SystemExit(f"an input failed; run it again: {again} FILE, FILE of {WORK / 'failed'}")
