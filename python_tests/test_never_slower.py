"""The benchmark of the promise: what it measures, divides and writes, on the smallest cells."""

import argparse
import json

import field_saes
import never_slower
import pytest
import torch

import darkmatter_ext as dm

TINY = {"n": 2, "d_in": 16, "d_sae": 64}


def _busy(milliseconds):
    """A call that takes that long by the benchmark's own clock."""

    def call():
        start = never_slower.time.perf_counter()
        while 1e3 * (never_slower.time.perf_counter() - start) < milliseconds:
            pass

    return call


def test_ratio_is_plain_over_accelerated():
    row = never_slower.in_turns(_busy(6.0), _busy(2.0), seconds=0.1)
    assert row["ratio"] == row["plain_ms"] / row["accelerated_ms"]
    assert row["plain_ms"] >= 6
    assert row["accelerated_ms"] >= 2
    assert row["rounds"] >= never_slower.MIN_ROUNDS
    assert row["ratio"] > 1


def test_short_calls_are_repeated_within_a_round():
    assert never_slower.in_turns(lambda: None, lambda: None, seconds=0.01)["repeats"] > 100


def test_summary_and_report():
    cell = never_slower.asdict(never_slower.Cell("topk", "float32", 1, 16, 64, "sparse"))
    timed = {"plain_ms": 1.0, "accelerated_ms": 1.0, "first_call_ms": 2.0}
    rows = [
        {**cell, "call": "encode", **timed, "ratio": ratio, "by_sae_lens": why}
        for ratio, why in ((2.0, {}), (0.97, {}), (0.5, {"encode: mixed dtypes": 3}), (4.0, {}))
    ]
    found = never_slower.summary(rows)
    assert found == {
        "cells": 4,
        "median": pytest.approx(1.485),
        "least": 0.5,
        "share_below_1": 0.5,
        "share_below_0.95": 0.25,
    }
    lines = never_slower.report("avx2", rows).splitlines()
    assert lines[0] == "avx2: 2 of 4 below 1"
    assert lines[1].lstrip().startswith("0.50  topk float32 N=1 d=16 F=64 sparse, encode")
    assert "encode: mixed dtypes" in lines[1]
    assert lines[2].lstrip().startswith("0.97")
    assert never_slower.summary([]) == {"cells": 0}


@pytest.mark.parametrize("architecture", field_saes.ARCHITECTURES)
@pytest.mark.parametrize("data", field_saes.INPUTS)
def test_twins_answer_alike(architecture, data):
    case = field_saes.make_case(architecture, data, n=4, d=16, n_latents=64, dtype=torch.float32)
    assert dm.is_accelerated(case.accelerated)
    assert not dm.is_accelerated(case.plain)
    assert case.plain.W_enc is case.accelerated.W_enc
    with torch.no_grad():
        for x in case.inputs:
            torch.testing.assert_close(case.accelerated(x), case.plain(x), rtol=1e-4, atol=1e-3, equal_nan=True)


def test_a_run_in_this_process(monkeypatch, tmp_path):
    cells = [never_slower.Cell("jumprelu", "float32", **TINY, data=data) for data in ("sparse", "alternating")]
    cells.append(never_slower.Cell("topk", "bfloat16", **TINY, data="sparse", grad=True))
    monkeypatch.setattr(never_slower, "quick_cells", lambda: cells)
    settings = {"quick": True, "only": ["jumprelu", "N=2"], "minutes": 1.0, "threads": torch.get_num_threads()}
    content = json.loads(json.dumps(never_slower.run_here(argparse.Namespace(**settings))))
    assert content["isa"] == dm.build_info()["cpu_isa"]
    assert {"torch", "sae_lens"} <= content["provenance"]["versions"].keys()
    assert content["provenance"]["commit"]
    assert content["cells_not_measured"] == 0
    assert len(content["rows"]) == 2 * len(never_slower.CALLS)
    assert content["summary"]["cells"] == len(content["rows"])
    for row in content["rows"]:
        assert row["ratio"] == row["plain_ms"] / row["accelerated_ms"]
        assert row["first_call_ms"] > 0


def test_time_that_is_up_leaves_cells_out(capsys):
    cells = [never_slower.Cell("topk", "float32", **TINY, data="sparse")]
    assert list(never_slower.measured(cells, deadline=0.0, seconds=0.01)) == []
    assert "1 cells are not measured" in capsys.readouterr().err


def test_cells_are_distinct_and_of_known_kinds():
    for cells in (never_slower.all_cells(), never_slower.quick_cells()):
        assert len(set(cells)) == len(cells)
        assert {cell.data for cell in cells} == set(field_saes.INPUTS)
        assert {cell.architecture for cell in cells} == set(field_saes.ARCHITECTURES)


def test_an_instruction_set_is_forced_on_both_sides():
    forced = never_slower.environment("avx2")
    assert [forced[name] for name in ("DARKMATTER_CPU_ISA", "ATEN_CPU_CAPABILITY")] == ["avx2", "avx2"]
    assert never_slower.available()[0] == "scalar"
