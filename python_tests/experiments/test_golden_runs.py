"""The numbers of the experiments are those written down in cases/golden_runs.json, on any machine, but for the last digits.

A child runs them all: the instruction set of the ops and of torch's products is decided once a process.
"""

import json
import math

import pytest
from cases.children import run_python
from cases.golden_runs import GOLDEN, RUNS

from darkmatter_ext import experiments

RELATIVE, ABSOLUTE = 1e-6, 2e-6
# Products of torch in another order move float32 activations in their last digit. Small differences of losses, silhouettes,
# medians and correlations of few tokens show it most; seen: up to 3e-5.
LOOSER = dict.fromkeys(
    ("downstream", "geometry", "intrinsic-dimension", "latent-alignment", "pathology", "per-token"), 1e-4
)
UNSTABLE = "scarcity/quiver_gain"  # of probing: which of two probes is better on few texts turns on such a digit
# Trained inside: the last digit of a product goes into every later step.
TRAINED_INSIDE = {"adapt", "diff", "error-saes"}
# The ops by DARKMATTER_CPU_ISA, torch's own products by the others. Every instruction set gives the same bits of the ops
# (ops/test_golden.py), so the best and the lowest two are enough.
ISAS = {
    "best": {},
    "avx2": {
        "DARKMATTER_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "scalar": {
        "DARKMATTER_CPU_ISA": "scalar", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}  # fmt: skip


def test_every_experiment_has_golden_numbers_or_a_reason_for_none():
    assert sorted([*RUNS, *TRAINED_INSIDE]) == experiments.names()
    assert list(json.loads(GOLDEN.read_text())) == list(RUNS)


def _differs(experiment: str, own: float, golden: float) -> bool:
    relative = LOOSER.get(experiment, RELATIVE)
    return not (
        math.isclose(own, golden, rel_tol=relative, abs_tol=ABSOLUTE) or (math.isnan(own) and math.isnan(golden))
    )


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_the_numbers_are_the_golden_ones(isa):
    run = run_python(
        "import runpy; runpy.run_module('cases.golden_runs', run_name='__main__')", check=False, OMP_NUM_THREADS="1",
        DARKMATTER_PROGRESS="0", **ISAS[isa],
    )  # fmt: skip
    if "DARKMATTER_CPU_ISA: must be supported" in run.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert run.returncode == 0, run.stderr[-2000:]
    found, golden = json.loads(run.stdout), json.loads(GOLDEN.read_text())
    assert {name: sorted(numbers) for name, numbers in found.items()} == {
        name: sorted(numbers) for name, numbers in golden.items()
    }
    others = {
        f"{name}/{key}": (found[name][key], value)
        for name, numbers in golden.items()
        for key, value in numbers.items()
        if UNSTABLE not in key and _differs(name, found[name][key], value)
    }
    assert others == {}
