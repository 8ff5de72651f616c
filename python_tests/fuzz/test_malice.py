"""Files made to harm whoever reads them: code in pickles and repositories, archives that unpack to gigabytes, claims of
size, depth, devices and pipes in place of files, names that lead elsewhere. Each is refused in one line, and nothing is run.

Text that is HTML is in report/test_page.py, damaged files in test_damaged_files.py.
"""

import functools
import io
import json
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import formats, models
from datasets import Dataset

import darkmatter_ext as dm
from darkmatter_ext.activations.contexts import ContextStore, tokenised_rows
from darkmatter_ext.activations.sources import CacheSource
from darkmatter_ext.activations.store import check_fits, load_lens, load_model, load_tokenizer
from darkmatter_ext.measurement.cost import known_model
from darkmatter_ext.report.explanations import read_explanations
from darkmatter_ext.runtime.checkpoint import CheckpointFolder
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.check import read_activations
from darkmatter_ext.saes.loading import describe_sae, load_sae

ROOM = 1 << 30  # bytes of memory a refusal may take beyond what the process has


def refused(call, *arguments, match=None):
    """One line that says what is wrong."""
    with pytest.raises((InputError, OSError), match=match) as told:
        call(*arguments)
    assert len(str(told.value).splitlines()) == 1


@pytest.fixture
def little_memory():
    """What follows may take ROOM more than the process has: gigabytes that a file claims are an error, not a dead machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def payload(tmp_path):
    """Pickled, an object that writes a file when it is unpickled; and the file."""
    mark = tmp_path / "run"

    class Payload:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    return Payload(), mark


# ---- code


def _saved(content, path):
    torch.save(content, path)


def _pickled(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [_saved, _pickled])
@pytest.mark.parametrize("layout", ["dictionary_learning", "openai", "qwen", "activations"])
def test_code_in_a_pickle_is_not_run(layout, write, payload, tmp_path):
    content, mark = payload
    if layout == "dictionary_learning":
        place = tmp_path / "sae"
        formats.write_dictionary(place, "AutoEncoder", formats.dictionary_weights())
        path = place / "ae.pt"
    elif layout == "openai":
        path = place = tmp_path / "resid" / "8.pt"
        formats.write_openai(path)
    elif layout == "qwen":
        formats.write_qwen_scope(tmp_path)
        path = place = next(tmp_path.rglob("*.pt"))
    else:
        path = place = tmp_path / "x.pt"
    write({"encoder.weight": content, "weights": [content]}, path)
    if layout == "activations":
        refused(read_activations, place, 8)
    else:
        refused(load_sae, place)
    assert not mark.exists()
    with path.open("rb") as file:  # it would have been
        torch.load(file, weights_only=False) if write is _saved else pickle.load(file)
    assert mark.exists()


def test_code_in_an_array_is_not_run(payload, tmp_path):
    content, mark = payload
    place, weights = formats.write_gemma_scope(tmp_path, "layer_1/width_16k")
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    np.savez(place / "params.npz", **arrays | {"threshold": np.array([content], dtype=object)})
    refused(load_sae, place)
    np.save(tmp_path / "x.npy", np.array([content], dtype=object), allow_pickle=True)
    refused(read_activations, tmp_path / "x.npy", 8)
    assert not mark.exists()


HOSTILE = """
open({mark!r}, "w")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "hostile"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


def test_code_beside_a_model_is_not_run(tmp_path, capfd):
    """`auto_map` names classes of a file in the folder. It is refused, and nobody is asked at a prompt."""
    models.save_model(tmp_path / "model")
    (tmp_path / "model" / "hostile.py").write_text(HOSTILE.format(mark=str(tmp_path / "run")))
    for name, entries in (
        ("config.json", {"model_type": "hostile", "architectures": ["Model"]}),
        ("tokenizer_config.json", {"tokenizer_class": "Tokenizer"}),
    ):
        path = tmp_path / "model" / name
        classes = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
        classes |= {"AutoTokenizer": ["hostile.Tokenizer", "hostile.Tokenizer"]}
        path.write_text(json.dumps(json.loads(path.read_text()) | entries | {"auto_map": classes}))
    model = str(tmp_path / "model")
    refused(functools.partial(load_model, model, device="cpu", dtype=torch.float32))
    refused(load_tokenizer, model)
    assert "custom code" not in "".join(capfd.readouterr())  # the question
    check_fits(model, context_length=10**6)  # cannot tell, and says nothing
    assert not (tmp_path / "run").exists()


def test_code_of_a_dataset_is_not_run(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nimport datasets\n")
    refused(lambda: list(tokenised_rows(str(folder), context_length=4)))
    refused(lambda: list(tokenised_rows(str(folder / "rows.py"), context_length=4)))
    assert not (tmp_path / "run").exists()


# ---- size


def _bomb(path, member, header=b""):
    """A zip file with a member of 8 GiB of zeros in 8 MiB."""
    archive = zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open(member, "w", force_zip64=True) as file:
        file.write(header)
        block = bytes(1 << 26)
        for _ in range(128):
            file.write(block)


def _array_header(shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


@pytest.mark.slow
def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path, little_memory):
    place, _ = formats.write_gemma_scope(tmp_path, "layer_1/width_16k")
    path = place / "params.npz"
    with np.load(path) as arrays:
        kept = {name: array for name, array in arrays.items() if name != "W_enc"}
        d_in = arrays["W_enc"].shape[0]
    np.savez(path, **kept)
    _bomb(path, "W_enc.npy", _array_header((d_in, (8 << 30) // 4 // d_in)))
    refused(load_sae, place, match="unpack")
    refused(describe_sae, str(place), match="unpack")

    formats.write_openai(tmp_path / "resid" / "8.pt")
    _bomb(tmp_path / "resid" / "8.pt", "archive/data/99")
    refused(load_sae, tmp_path / "resid" / "8.pt", match="unpack")

    result = tmp_path / "decomposition.json"
    content = {"format": 1, "experiment": "decomposition", "arrays": "decomposition.npz"}
    result.write_text(json.dumps(content | {"config": {}, "numbers": {}}))
    _bomb(tmp_path / "decomposition.npz", "x.npy", _array_header((8 << 28,)))
    refused(dm.load_result, result, match="unpack")


@pytest.mark.parametrize("claim", [{"d_sae": 1 << 31}, {"d_in": 1 << 31}, {"d_in": 1 << 20, "d_sae": 1 << 20}])
def test_a_size_that_the_weights_do_not_have_is_refused(claim, tmp_path, little_memory):
    """Before memory of that size is asked for."""
    models.saved_sae(tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | claim))
    refused(load_sae, tmp_path / "sae", match="size")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_without_end_are_refused(kind, tmp_path, little_memory):
    """transformers makes a model's layers before it reads a weight, one after the other."""
    models.save_model(tmp_path / "model", kind)
    path = tmp_path / "model" / "config.json"
    name = {"llama": "num_hidden_layers", "gpt2": "n_layer"}[kind]
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: 10**30}))
    model = str(tmp_path / "model")
    refused(functools.partial(load_model, model, device="cpu", dtype=torch.float32), match="layers")
    lens = functools.partial(load_lens, processing={}, device="cpu", dtype=torch.float32)
    refused(lens, model, ["blocks.0.hook_resid_post"], match="layers")


@pytest.mark.parametrize("length", [1 << 40, (1 << 63) - 1, 1 << 27])
def test_a_header_longer_than_its_file_is_refused(length, tmp_path, little_memory):
    models.saved_sae(tmp_path / "sae")
    weights = tmp_path / "sae" / "sae_weights.safetensors"
    weights.write_bytes(struct.pack("<Q", length) + weights.read_bytes()[8:])
    refused(load_sae, tmp_path / "sae")


def test_tensors_beyond_the_file_are_refused(tmp_path, little_memory):
    models.saved_sae(tmp_path / "sae")
    header = json.dumps({"W_enc": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "sae" / "sae_weights.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    refused(load_sae, tmp_path / "sae")


@pytest.mark.parametrize("depth", [2_000, 200_000])
def test_nesting_without_end_is_refused(depth, tmp_path):
    """Python's reader of JSON goes down a level for each bracket."""
    models.saved_sae(tmp_path / "sae")
    deep = "[" * depth + "]" * depth
    (tmp_path / "sae" / "cfg.json").write_text('{"metadata": ' + deep + "}")
    refused(load_sae, tmp_path / "sae")
    refused(describe_sae, str(tmp_path / "sae"))
    path = tmp_path / "read.json"
    path.write_text('{"format": 1, "numbers": ' + deep + "}")
    refused(dm.load_result, path)
    refused(read_explanations, path, "sae", 24)
    (tmp_path / "config.json").write_text(path.read_text())
    refused(known_model, str(tmp_path))
    (tmp_path / "contexts.json").write_text(path.read_text())
    refused(ContextStore.open, tmp_path)
    (tmp_path / "meta.json").write_text(path.read_text())
    refused(CacheSource.open, [tmp_path])
    (tmp_path / "run.json").write_text(path.read_text())
    refused(CheckpointFolder(tmp_path).start, {"a": 1})


# ---- what is no file, and names that lead elsewhere


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "circle", "folder"])
def test_what_is_no_file_is_not_waited_for(name, kind, tmp_path):
    models.saved_sae(tmp_path / "sae")
    path = tmp_path / "sae" / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)  # opening it would wait for a writer
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "circle":
        path.symlink_to(path)
    else:
        path.mkdir()
    refused(load_sae, tmp_path / "sae")


@pytest.mark.parametrize("name", ["../outside.npz", "/etc/passwd", "a/b.npz", ".."])
def test_arrays_of_a_result_are_beside_it(name, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    np.savez(tmp_path / "outside.npz", secret=np.ones(3))
    content = {"format": 1, "experiment": "decomposition", "arrays": name, "config": {}, "numbers": {}}
    (folder / "decomposition.json").write_text(json.dumps(content))
    refused(dm.load_result, folder / "decomposition.json")


def test_a_name_of_a_site_leads_nowhere(tmp_path):
    """Sites name folders in the cache and files of figures: what is no site of a model is refused."""
    models.saved_sae(tmp_path / "sae", hook_name="blocks.0.hook_resid_post/../../../../outside")
    from darkmatter_ext import cli

    Dataset.from_dict({"input_ids": [[1] * 8] * 40}).save_to_disk(str(tmp_path / "rows"))
    models.save_model(tmp_path / "model")
    command = ["run", "decomposition", "--preset", "one-pass", "--sae", str(tmp_path / "sae"), "--model"]
    command += [str(tmp_path / "model"), "--tokenised", str(tmp_path / "rows"), "--tokens", "320"]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert cli.main([*command, "--context-length", "8", "--out", str(tmp_path / "rows" / "out")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before
