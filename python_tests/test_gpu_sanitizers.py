"""The kernels under compute-sanitizer, which runs them a hundred times slower: apart from test_gpu.py, `make gpu-sanitize`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
    pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer (of the CUDA toolkit), not found"),
]

SANITIZED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from cases.encoders import check_encoders, gaussian, WORST
import darkmatter_ext as dm
from darkmatter_ext.ops.decode import decoder_outer, find_support, to_dense
check_encoders(torch.ops.darkmatter, *gaussian(10, 48, 2100), k=20, threshold=10.0, device="cuda")
for d, n_latents in ((40, 1100), (37, 1099)):  # rows that are aligned, and that are not
    x, W_enc, b_enc, b_dec = (part.cuda() for part in gaussian(6, d, n_latents))
    acts = dm.topk_encode(x, W_enc, b_enc, 5)
    dm.sparse_decode(acts, W_enc.mT.contiguous(), b_dec)
    decoder_outer(acts, x)
    find_support(to_dense(acts))
    dm.pursuit(x, W_enc.mT.contiguous(), 3)
torch.cuda.synchronize()
print("sanitized run finished")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool, tmp_path):
    """Kernels of this package only: torch's own are not ours to check, and there are many."""
    program = tmp_path / "sanitized.py"
    program.write_text(SANITIZED.format(tests=str(TESTS)))
    command = [
        str(SANITIZER), "--tool", tool, "--kernel-name", "kernel_substring=darkmatter", "--error-exitcode", "3",
        "--report-api-errors", "no",  # torch probes the driver when it is imported, and is refused: not our error
        sys.executable, str(program),
    ]  # fmt: skip
    # racecheck (CUDA 13.0) itself fails on the fused kernel's clusters ("failed to handle a hardware exception").
    fused = "0" if tool == "racecheck" else "1"
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "DARKMATTER_CUDA_FUSED": fused,
    }  # fmt: skip
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    if "Device not supported" in run.stdout + run.stderr:
        pytest.skip(f"compute-sanitizer does not support this device: {(run.stdout + run.stderr).splitlines()[-1]}")
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    assert "sanitized run finished" in run.stdout
