"""What reads files that come from elsewhere: for each, how a good one is made, and how it is read to the end."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from cases import formats, measured, models
from darkmatter_ext.experiments import write_report
from darkmatter_ext.measurement.probe_tasks import read_tasks
from darkmatter_ext.measurement.word_pairs import read_pairs
from darkmatter_ext.report.result import load_result
from darkmatter_ext.saes.loading import describe_sae, load_sae


def _read_sae(spec: Path) -> None:
    describe_sae(str(spec))
    sae = load_sae(spec)
    with torch.no_grad():
        sae(torch.zeros(2, sae.cfg.d_in, dtype=sae.dtype))


def _read_result(folder: Path) -> None:
    result = load_result(folder / "decomposition.json")
    with tempfile.TemporaryDirectory() as own:
        write_report([result], Path(own) / "page.html")


def _make_result(folder: Path) -> None:
    docs = Path(__file__).parents[2] / "docs/results"
    for name in ("decomposition.json", "decomposition.npz"):
        shutil.copy(docs / name, folder / name)


def _read_caches(folder: Path) -> None:
    source = measured.open_caches(folder)
    for number in range(source.n_contexts):
        source.read([number])


READERS = {
    "saelens": (lambda folder: models.saved_sae(folder / "sae"), lambda folder: _read_sae(folder / "sae")),
    "saelens-jumprelu": (
        lambda folder: models.saved_sae(folder / "sae", architecture="jumprelu"), lambda folder: _read_sae(folder / "sae"),
    ),
    "sparsify": (
        lambda folder: formats.write_sparsify(folder / "run"), lambda folder: _read_sae(folder / "run" / "layers.1")
    ),
    "dictionary-learning": (
        lambda folder: formats.write_dictionary(
            folder / "sae", "AutoEncoderNew",
            formats.dictionary_weights() | {"decoder.bias": formats.noise(formats.D, seed=3)},
        ),
        lambda folder: _read_sae(folder / "sae"),
    ),
    "gemma-scope": (
        lambda folder: formats.write_gemma_scope(folder, "google/gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_4"),
        lambda folder: _read_sae(folder / "google/gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_4"),
    ),
    "llama-scope": (
        lambda folder: formats.write_llama_scope(folder / "L1R"), lambda folder: _read_sae(folder / "L1R")
    ),
    "openai": (
        lambda folder: formats.write_openai(folder / "resid" / "8.pt"), lambda folder: _read_sae(folder / "resid" / "8.pt")
    ),
    "circuit-tracer": (
        lambda folder: formats.write_circuit_tracer(folder / "set"),
        lambda folder: _read_sae(folder / "set" / "layer_0.safetensors"),
    ),
    "result": (_make_result, _read_result),
    "activation-caches": (measured.write_caches, _read_caches),
    "tasks": (lambda folder: models.write_tasks(folder / "tasks.csv"), lambda folder: read_tasks(str(folder / "tasks.csv"))),
    "pairs": (lambda folder: models.write_pairs(folder / "pairs.csv"), lambda folder: read_pairs(str(folder / "pairs.csv"))),
}  # fmt: skip
