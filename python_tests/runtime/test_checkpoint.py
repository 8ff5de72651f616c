"""A state on disk is read by the format it was written in: a change of what is written must change FORMAT."""

import json

import pytest
import torch

from darkmatter_ext.runtime import checkpoint
from darkmatter_ext.runtime.checkpoint import CheckpointFolder
from darkmatter_ext.runtime.inputs import InputError, StateError

# What FORMAT 3 writes for the state below, as text. The cache folder of a run is named by FORMAT, so a newer version begins
# anew beside an old state. Were this text to change under the same FORMAT, every stopped run would be called damaged.
TENSORS = "state-0-of-1.000001.safetensors"
SHA256 = "d639b32fc3b25150973393bdefe521172b46827d1a2c73136ac6b4155ead1943"
POINTER = (
    f'{{"number": 1, "tensors": "{TENSORS}", "sha256": "{SHA256}", "state": {{"step": 7, "losses": [0.5]}}, '
    '"own": "e3efd4c3e3cb8a24"}'
)


def _save(folder):
    folder.start({"seed": 1})
    folder.save({"x": torch.arange(3.0)}, {"step": 7, "losses": [0.5]})
    return folder.folder / "state-0-of-1.json"


def test_what_format_3_writes_is_what_format_3_always_wrote(tmp_path):
    pointer = _save(CheckpointFolder(tmp_path))
    assert checkpoint.FORMAT == 3, "a new format: write its text above"
    assert pointer.read_text() == POINTER


def test_a_state_of_this_format_is_read_and_one_with_another_number_is_refused(tmp_path):
    folder = CheckpointFolder(tmp_path)
    pointer = _save(folder)
    pointer.write_text(POINTER)
    tensors, state = folder.load()
    assert tensors["x"].tolist() == [0, 1, 2]
    assert state == {"step": 7, "losses": [0.5]}
    pointer.write_text(POINTER.replace('"step": 7', '"step": 8'))
    with pytest.raises(StateError, match="is damaged"):
        folder.load()


def test_a_folder_of_another_format_is_refused_and_kept(tmp_path):
    folder = CheckpointFolder(tmp_path)
    _save(folder)
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run | {"format": checkpoint.FORMAT - 1}))
    with pytest.raises(InputError, match="must be of format 3, got 2"):
        folder.start({"seed": 1})
    assert (tmp_path / TENSORS).is_file()


@pytest.mark.parametrize("damaged", [None, 1, "topk", [], [1]])
def test_a_configuration_that_is_none_is_damage(damaged, tmp_path):
    """An entry of another type: found by cases/damage.py."""
    folder = CheckpointFolder(tmp_path)
    _save(folder)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": damaged, "hash": "of another run"}))
    before = path.read_bytes()
    with pytest.raises(StateError, match="is damaged") as caught:
        folder.start({"seed": 1})
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
