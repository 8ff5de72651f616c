"""Facts about the build in both ways that a Python can read them, and a library that torch cannot load."""

import pytest

from darkmatter_ext.ops import _library, facts
from darkmatter_ext.runtime.inputs import StateError


@pytest.mark.parametrize(
    "name",
    ["compiler", "cuda_archs", "nvcc", "commit", "cpu_isa", "cpu_isa_best", "bound_rows", "min_tokens_to_pack"],
)
def test_the_library_says_what_the_module_says(name):
    """A wheel has only the library."""
    assert facts.by_library(name) == facts.fact(name)


@pytest.mark.parametrize("ask", [facts.fact, facts.by_library])
def test_an_unknown_fact_is_told(ask):
    with pytest.raises(RuntimeError, match="nothing") as caught:
        ask("nothing of the kind")
    assert "\n" not in str(caught.value)


def test_a_library_that_does_not_load_is_one_line_with_the_way_out(tmp_path):
    damaged = tmp_path / "libdarkmatter_cpu.so"
    damaged.write_bytes(b"no library")
    with pytest.raises(StateError, match=r"libdarkmatter_cpu.so must load with torch .*; build again with") as caught:
        _library._load(damaged)
    assert "\n" not in str(caught.value)
