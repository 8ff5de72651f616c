"""An SAE that a run trains is kept for runs that would train the same one, and for no others."""

import pytest
import torch

from darkmatter_ext.measurement.run import prepare
from darkmatter_ext.measurement.settings import Settings, replaced
from darkmatter_ext.measurement.tokens import SAE_TRAINING
from darkmatter_ext.runtime.progress import Stages

pytestmark = pytest.mark.runs
SITE = "blocks.1.hook_resid_post"
SAME = {  # the same tokens train; the others are used in other ways
    "two readings": {"passes": 2},
    "one reading": {"passes": 1},
    "another share fits the map": {"fit_fraction": 0.3},
    "the loss too": {"loss": True},
    "another hook point too": {"hook": "", "layers": (0, 1)},
}
OTHERS = {
    "seed": {"seed": 1},
    "tokens that train": {"sae_fraction": 0.5},
    "positions": {"drop_positions": 3},
    "steps": {"steps": 4},
    "width": {"widths": (25,)},
    "hook point": {"hook": "blocks.0.hook_resid_post"},
    "norms": {"max_norm_ratio": 1.1},
}


def _trained(workplace, **more):
    """Folder of the SAE at SITE (or the only one), and the rows that train it."""
    usual = {"hook": SITE, "widths": (24,), "k": 4, "steps": 3, "context_length": 32, "tokens": 16000}
    settings = replaced(Settings(), model=str(workplace / "model"), text=str(workplace / "text.txt"), **(usual | more))
    inputs = prepare(settings, Stages(show=False))
    sae = next((sae for sae in inputs.saes if sae.hook == SITE), inputs.saes[0])
    return sae.folder, inputs.stored[sae.hook].roles == SAE_TRAINING


@pytest.fixture(scope="module")
def first(workplace):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARKMATTER_CACHE", str(workplace / "trained"))
        yield _trained(workplace)


@pytest.mark.parametrize("name", SAME)
def test_the_same_tokens_train_one_sae(workplace, first, name):
    folder, rows = _trained(workplace, **SAME[name])
    assert torch.equal(rows, first[1])
    assert folder == first[0]


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_changes_the_sae_trains_another(workplace, first, name):
    assert _trained(workplace, **OTHERS[name])[0] != first[0]
