"""The fuzzer of the CPU library builds, takes edges and finds no wrong answer in seconds. `make fuzz-native` runs it longer."""

import re
import shutil

import pytest
from cases import native_fuzzer

SECONDS = 20


@pytest.mark.slow
def test_the_native_fuzzer_runs_and_finds_nothing():
    if native_fuzzer.libfuzzer() is None:
        pytest.skip("needs libFuzzer (Debian: libfuzzer-14-dev), found none")
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler, found none")
    done = native_fuzzer.run(native_fuzzer.build(), SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    runs, edges = re.search(r"Done (\d+) runs", done.stderr), re.findall(r" cov: (\d+) ", done.stderr)
    assert runs is not None
    assert int(runs[1]) > 10
    assert int(edges[-1]) > 1000  # of the library: it is what guides the fuzzer
