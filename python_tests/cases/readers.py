"""What reads files that come from elsewhere: for each, how a good one is made, and how it is read to the end."""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch

from cases import formats, measured, models
from darkmatter_ext.activations.store import load_model, load_tokenizer
from darkmatter_ext.experiments import write_report
from darkmatter_ext.measurement.cost import known_model
from darkmatter_ext.measurement.probe_tasks import read_tasks
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.measurement.word_pairs import read_pairs
from darkmatter_ext.report.explanations import read_explanations
from darkmatter_ext.report.result import load_result
from darkmatter_ext.runtime.checkpoint import CheckpointFolder
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


def _make_checkpoint(folder: Path) -> None:
    run = CheckpointFolder(folder / "run")
    run.start({"tokens": 1000, "hooks": ["a", "b"]})
    run.save({"gram": torch.eye(5), "n": torch.arange(3)}, {"block": 7, "seconds": 1.25, "seen": {"a": [1, 2]}})


def _read_checkpoint(folder: Path) -> None:
    """A state that can be read is the one that was written: its numbers decide a result."""
    run = CheckpointFolder(folder / "run")
    run.start({"tokens": 1000, "hooks": ["a", "b"]})
    if found := run.load():
        assert torch.equal(found[0]["gram"], torch.eye(5))
        assert found[1] == {"block": 7, "seconds": 1.25, "seen": {"a": [1, 2]}}


def _make_table(folder: Path) -> None:
    columns = {name: pyarrow.array(range(500)) for name in ("context", "position", "token")}
    columns["error"] = pyarrow.array([number / 7 for number in range(500)])
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "part-0000-000000.parquet")


def _make_explanations(path: Path) -> None:
    rows = [json.dumps({"index": number, "description": f"says <b>{number}</b>"}) for number in range(20)]
    content = "\n".join(rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def _read_model(folder: Path) -> None:
    known_model(str(folder))
    load_tokenizer(str(folder))
    load_model(str(folder), device="cpu", dtype=torch.float32, n_layers=1)


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
    "checkpoint": (_make_checkpoint, _read_checkpoint),
    "table": (_make_table, read_tokens),
    "explanations": (
        lambda folder: _make_explanations(folder / "said.jsonl"),
        lambda folder: read_explanations(folder / "said.jsonl", "sae", 24),
    ),
    "packed-explanations": (
        lambda folder: _make_explanations(folder / "said.jsonl.gz"),
        lambda folder: read_explanations(folder / "said.jsonl.gz", "sae", 24),
    ),
    "model": (lambda folder: models.save_model(folder / "model"), lambda folder: _read_model(folder / "model")),
    "result": (_make_result, _read_result),
    "activation-caches": (measured.write_caches, _read_caches),
    "tasks": (lambda folder: models.write_tasks(folder / "tasks.csv"), lambda folder: read_tasks(str(folder / "tasks.csv"))),
    "pairs": (lambda folder: models.write_pairs(folder / "pairs.csv"), lambda folder: read_pairs(str(folder / "pairs.csv"))),
}  # fmt: skip
