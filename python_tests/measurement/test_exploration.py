"""What the page explores, against each SAE's dense latents and the table of tokens."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from darkmatter_ext.measurement import exploration
from darkmatter_ext.measurement.exploration import explored
from darkmatter_ext.measurement.run import measured, prepare
from darkmatter_ext.measurement.settings import Settings, replaced
from darkmatter_ext.runtime.progress import Stages

pytestmark = pytest.mark.runs
STAGES = Stages(show=False)


def _settings(workplace, **more):
    return replaced(
        Settings(), model=str(workplace / "model"), text=str(workplace / "text.txt"), hook="blocks.1.hook_resid_post",
        tokens=16000, context_length=32, widths=(24, 48), k=4, steps=30, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(workplace):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARKMATTER_CACHE", str(workplace / "cache"))
        inputs = prepare(_settings(workplace), STAGES)
        return inputs, measured(inputs, STAGES)


def _dense(inputs, sae, contexts):
    """[C, L, F] the latents of plain SAELens code."""
    x = inputs.source.read(contexts).activations[sae.hook]
    loaded = sae.load()
    return type(loaded).encode(loaded, x.to(loaded.dtype)).detach().numpy()


def test_tokens_have_the_numbers_of_the_table_and_their_strongest_latents(run):
    inputs, found = run
    about, arrays = explored(inputs, found, STAGES)
    assert about["tokens"] == about["held_out"] == int(found.numbers["tokens/held_out"])
    assert [sae["name"] for sae in about["saes"]] == ["topk-24", "topk-48"]
    table = found.tokens()
    contexts, positions = arrays["page/contexts"], table["position"].to_numpy()
    rows = np.searchsorted(contexts, table["context"].to_numpy())
    assert list(contexts) == sorted(set(table["context"].to_pylist()))
    words = json.loads(arrays["page/vocabulary"].tobytes())
    text = [words[token] for token in arrays["page/tokens"][rows, positions]]
    assert {"sparse", "code", "of"} <= set(text)
    np.testing.assert_allclose(arrays["page/site0/x"][rows, positions], table["x"], rtol=2.0**-12)
    assert np.isfinite(arrays["page/site0/x"]).sum() == table.num_rows
    for number, name in enumerate(found.site_of("topk-24").saes):
        for part in exploration.PARTS:
            kept = arrays[f"page/sae{number}/{part}"][rows, positions]
            np.testing.assert_allclose(kept, table[f"{name}/{part}"], rtol=2.0**-12)
        dense = _dense(inputs, inputs.sae(name), contexts.tolist())
        latents, values = (arrays[f"page/sae{number}/{key}"][rows, positions] for key in ("latents", "values"))
        strongest = -np.sort(-dense[rows, positions], axis=1)[:, : exploration.TOKEN_LATENTS]
        np.testing.assert_allclose(values, strongest, rtol=1e-3)
        at = np.take_along_axis(dense[rows, positions], np.maximum(latents, 0), 1)
        np.testing.assert_allclose(values, np.where(latents < 0, 0, at), rtol=1e-3)


def test_latents_have_their_rates_contexts_and_neighbours(run):
    inputs, found = run
    _, arrays = explored(inputs, found, STAGES)
    sae, prefix = inputs.sae("topk-48"), "page/sae1/latent"
    dense = _dense(inputs, sae, arrays["page/contexts"].tolist())
    measured_here = np.isfinite(arrays["page/site0/x"])
    dense = np.where(measured_here[:, :, None], dense, 0)
    numbers = arrays[f"{prefix}/number"]
    np.testing.assert_array_equal(numbers, np.flatnonzero((dense > 0).any((0, 1))))
    np.testing.assert_array_equal(arrays[f"{prefix}/fired"], (dense > 0).sum((0, 1))[numbers])
    nonlinear = np.nan_to_num(arrays["page/sae1/nonlinear"])
    share = ((dense > 0) * nonlinear[:, :, None]).sum((0, 1)) / nonlinear.sum()
    np.testing.assert_allclose(arrays[f"{prefix}/nonlinear_share"], share[numbers], rtol=1e-3)
    best = -np.sort(-dense.max(1).T, axis=1)[numbers, : exploration.LATENT_CONTEXTS]
    np.testing.assert_allclose(arrays[f"{prefix}/values"], best, rtol=1e-3)
    places, flat = arrays[f"{prefix}/places"], dense.reshape(-1, sae.d_sae)
    there = np.where(places < 0, 0, flat[np.maximum(places, 0), numbers[:, None]])
    np.testing.assert_allclose(there, best, rtol=1e-3)
    rows = sae.load().W_dec.detach()
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1).fill_diagonal_(-2)[numbers][
        :, numbers
    ]
    np.testing.assert_allclose(arrays[f"{prefix}/cosines"], cosines.topk(exploration.NEAREST).values, rtol=2e-3)
    assert arrays[f"{prefix}/nearest"][0, 0] == numbers[cosines[0].argmax()]


def _with(inputs, **settings):
    changed = replaced(inputs.settings, **settings)
    return dataclasses.replace(inputs, resolved=dataclasses.replace(inputs.resolved, settings=changed))


def test_a_budget_is_kept(run):
    inputs, found = run
    for megabytes in (0.2, 0.02, 1e-6):
        about, arrays = explored(_with(inputs, page_megabytes=megabytes), found, STAGES)
        assert 1 <= about["contexts"] == len(arrays["page/tokens"])
        assert about["contexts"] == 1 or arrays["page/tokens"].size * (8 + 4 + 2 * 54) <= 0.75e6 * megabytes
        assert all(sae["latents_kept"] >= 1 for sae in about["saes"])
    assert explored(_with(inputs, page_megabytes=0.0), found, STAGES) is None


def test_settings_of_the_page_change_no_measurement(run):
    from darkmatter_ext.measurement.run import deciding

    inputs, _ = run
    assert "page_megabytes" not in deciding(inputs, inputs.saes, None, None)
    with pytest.raises(ValueError, match="page_megabytes: must be at least 0, got -1"):
        replaced(inputs.settings, page_megabytes=-1.0)


def test_documents_are_whole_and_evenly_spread():
    import pyarrow as pa

    table = pa.table({"context": pa.array([0, 0, 1, 2, 3, 4, 5, 6, 7])})
    documents = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert exploration._contexts(table, documents, 8) == list(range(8))
    assert exploration._contexts(table, documents, 4) == [0, 1, 4, 5]
    assert exploration._contexts(table, documents, 3) == [0, 1, 6]
