"""What csrc/sass.py reads in the machine code of kernels, on code written here."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "csrc"


@pytest.fixture(scope="module")
def sass():
    spec = importlib.util.spec_from_file_location("darkmatter_sass", FOLDER / "sass.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listing(*lines, name="filter_topk_kernel"):
    """As nvdisasm -c prints a kernel; lines that end in a colon are labels."""
    text = [f'\t.section\t.text.{name},"ax",@progbits', f".text.{name}:"]
    for at, line in enumerate(lines):
        text.append(line if line.endswith(":") else f"        /*{16 * at:04x}*/              {line} ;")
    return "\n".join(text)


def a_filter(sass, padding, comparisons=32, loads=10):
    """A loop before the scan's own, the scan with `padding` instructions to spare, and a comparison after it."""
    lines = [".L_x_1:", "MOV R1, R2", "@P0 BRA `(.L_x_1)", ".L_x_2:"]
    lines += ["LDG.E.128.CONSTANT R4, desc[UR4][R2.64+0x10]"] * loads + ["FADD R0, R1, R2"] * padding
    lines += ["@!P0 FSETP.GEU.AND P1, PT, R4, R5, PT"] * comparisons
    lines += ["BAR.SYNC.DEFER_BLOCKING 0x0", "@P1 BRA `(.L_x_2)", "FSETP.GEU.AND P0, PT, R1, R2, PT", "EXIT"]
    return sass.read(listing(*lines))[0]


def test_kernels_are_read(sass):
    first = listing("MOV R1, R2", "STG.E.EF.128 [R2.64], R4", "B2R.RESULT RZ, P0", name="a")
    codes = sass.read(first + "\n" + listing("EXIT", name="b"))
    assert [(code.mangled, len(code.instructions)) for code in codes] == [("a", 3), ("b", 1)]
    assert (codes[0].wide_loads, codes[0].wide_stores, len(codes[0].barriers)) == (0, 1, 1)


def test_a_scan_is_counted_from_the_head_of_its_loop(sass):
    code = a_filter(sass, padding=100)
    assert code.scan(sass.SCANS["filter_topk_kernel"]) == 10 + 100 + 32
    assert sass.faults("filter_topk_kernel", code, "80") == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"padding": 300}, "scans a tile in 342 instructions, allowed are 253"),
        ({"padding": 9, "comparisons": 30}, "has no scan of 32 comparisons"),
        ({"padding": 9, "loads": 8}, "has 8 loads of 16 bytes, its scan alone needs 10"),
    ],
)
def test_what_is_wrong_with_a_scan_is_told(sass, change, fault):
    assert sass.faults("filter_topk_kernel", a_filter(sass, **change), "80") == [fault]


def test_loads_that_are_no_longer_wide_are_told(sass):
    narrow = sass.read(listing("LDG.E R4, desc[UR4][R2.64]", "EXIT"))[0]
    assert sass.faults("sparse_decode_kernel<float, 4, 8>", narrow, "80") == ["has no load of 16 bytes"]
    assert sass.faults("sparse_decode_kernel<float, 1, 8>", narrow, "80") == []


def test_the_fused_scan_is_of_one_architecture(sass):
    code = sass.read(listing("EXIT"))[0]
    assert sass.faults("fused_filter_kernel", code, "80") == []
    assert sass.faults("fused_filter_kernel", code, "90a") == ["has no scan of 128 comparisons"]


def test_other_barriers_are_told(sass):
    code = sass.read(listing("BAR.SYNC.DEFER_BLOCKING 0x1, 0x80", "EXIT"))[0]
    assert sass.faults("finish_topk_kernel<float, 2048>", code, "80") == [
        "waits at another barrier than the block's own"
    ]
