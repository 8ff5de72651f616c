"""What the machine code of the CUDA kernels (SASS) shows without a GPU. Used by `make cuda-check`; needs nvdisasm.

Counted: instructions of a kernel, accesses of 16 bytes, barriers, and the scan of the screens' filters: the instructions
a thread takes for one tile of scores, which is most of what a filter costs. The limits fail the check.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?(.*?)\s*;")
LABEL = re.compile(r"(\.L_x_\d+):")
KERNEL = re.compile(r"\.text\.(\S+):")
BRANCH = re.compile(r"^BRA\b.*`\((\.L_x_\d+)\)")
COMPARISON = re.compile(r"^FSETP\.GEU\b")  # a score with the least that is let in
PACKETS = re.compile(r"<(float, 4|double, 2|half, 8|bfloat16, 8)[,>]")  # a thread moves 16 bytes at once
LOAD, STORE = re.compile(r"^LDG\.E\.(\w+\.)*128\b"), re.compile(r"^STG\.E\.(\w+\.)*128\b")


class Scan(NamedTuple):
    """How a filter looks at the scores of a tile: comparisons a thread, loads of 16 bytes, instructions at most."""

    comparisons: int
    loads: int
    most: int
    arch: str = ""  # the only one that has it


# 253: of the first form of this scan (filter.cuh). 520: 500 and what compilers differ by (fused_filter.cuh).
SCANS = {
    "filter_topk_kernel": Scan(32, 10, 253),
    "filter_threshold_kernel": Scan(32, 10, 253),
    "fused_filter_kernel": Scan(128, 0, 520, "90a"),
}


def scan_of(name: str) -> Scan | None:
    """Of a kernel, whatever its template arguments."""
    return SCANS.get(name.partition("<")[0])


class Code(NamedTuple):
    """Of a kernel on one architecture."""

    mangled: str
    instructions: list[str]  # without predicates
    labels: dict[str, int]

    @property
    def wide_loads(self) -> int:
        return sum(bool(LOAD.match(each)) for each in self.instructions)

    @property
    def wide_stores(self) -> int:
        return sum(bool(STORE.match(each)) for each in self.instructions)

    @property
    def barriers(self) -> list[str]:
        return [each for each in self.instructions if each.startswith(("BAR.", "B2R"))]

    def scan(self, of: Scan) -> int | None:
        """Instructions from the head of the loop to the last comparison; None where that many comparisons are not there."""
        code = self.instructions
        if of.loads:
            start = next((at for at, each in enumerate(code) if LOAD.match(each)), None)
        else:
            start = max((at for at, each in enumerate(code) if each.startswith("HGMMA")), default=None)
        if start is None:
            return None
        compared = [at for at in range(start, len(code)) if COMPARISON.match(code[at])][: of.comparisons]
        if len(compared) < of.comparisons:
            return None
        heads = self._loop_heads(start) if of.loads else [at for at in self.labels.values() if at <= compared[0]]
        return compared[-1] - max(heads, default=0) + 1

    def _loop_heads(self, inside: int) -> list[int]:
        """Where loops that hold this instruction begin."""
        targets = (BRANCH.match(each) for each in self.instructions[inside:])
        return [self.labels[match[1]] for match in targets if match and self.labels[match[1]] <= inside]


def find_nvdisasm(nvcc: str) -> str | None:
    """Beside nvcc, on PATH, or where pip puts nvidia-cuda-nvdisasm."""
    pip = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"))
    folders = [Path(nvcc).resolve().parent, Path("/usr/local/cuda/bin"), *pip]
    return shutil.which("nvdisasm", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))


def read(text: str) -> list[Code]:
    """The kernels in what `nvdisasm -c` prints."""
    found: list[Code] = []
    for line in text.splitlines():
        if kernel := KERNEL.match(line):
            found.append(Code(kernel[1], [], {}))
        elif found and (label := LABEL.match(line)):
            found[-1].labels[label[1]] = len(found[-1].instructions)
        elif found and (instruction := INSTRUCTION.match(line)):
            found[-1].instructions.append(instruction[1])
    return found


def disassembled(nvdisasm: str, cubin: Path) -> list[Code]:
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
    return read(done.stdout)


def faults(name: str, code: Code, arch: str) -> list[str]:
    """What is wrong with a kernel; `name` as setup.py's kernel_name has it: finish_topk_kernel<float, 2048>."""
    wrong = []
    if any(not re.search(r"\b0x0\b", each) for each in code.barriers if each.startswith("BAR.SYNC")):
        wrong.append("waits at another barrier than the block's own")
    if PACKETS.search(name) and not code.wide_loads:
        wrong.append("has no load of 16 bytes")
    scan = scan_of(name)
    if scan is None or scan.arch not in ("", arch):
        return wrong
    length = code.scan(scan)
    if length is None:
        wrong.append(f"has no scan of {scan.comparisons} comparisons")
    elif length > scan.most:
        wrong.append(f"scans a tile in {length} instructions, allowed are {scan.most}")
    if code.wide_loads < scan.loads:
        wrong.append(f"has {code.wide_loads} loads of 16 bytes, its scan alone needs {scan.loads}")
    return wrong
