"""Acceptance: the demo's pipeline on the embedded language model, at a smaller setting."""

import pytest

from darkmatter_ext import cli
from darkmatter_ext.report.result import load_result

pytestmark = pytest.mark.slow  # downloads 93 MB once, then about a minute and a half on two cores


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    arguments = ["run", "decomposition", "--tokens", "60000", "--widths", "512", "2048", "--steps", "150"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    return load_result(out / "decomposition.json")


def test_the_dark_matter_effect_is_there_on_a_real_model(result):
    """Bounds far outside the spread over seeds, far inside what a broken step gives (0 or 1)."""
    for name in ("topk-512", "topk-2048"):
        numbers = {key.removeprefix(f"{name}/"): value for key, value in result.numbers.items() if key.startswith(name)}
        assert 0.1 < numbers["fvu"] < 0.4
        assert 0.2 < numbers["linear_share"] < 0.75
        assert 0.2 < numbers["r2_vec"] < 0.8
        assert numbers["r2_vec"] < numbers["r2_vec_train"]
        assert 0.5 < numbers["r2_norm/error"] < numbers["r2_norm/x"] < 1
        assert numbers["r2_norm/x"] > 0.9
    assert result.numbers["topk-2048/fvu"] < result.numbers["topk-512/fvu"]


def test_its_saes_are_ordinary_saelens_folders(result):
    from sae_lens import SAE

    for entry in result.series["saes"]:
        sae = SAE.load_from_disk(entry["folder"])
        assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) == (576, entry["d_sae"], 32)
        assert sae.cfg.metadata.hook_name == "blocks.10.hook_resid_post"


def test_the_embedded_model_is_a_language_model():
    """Its loss on its own kind of text is far below that of guessing (ln 49152 = 10.8)."""
    import torch

    from darkmatter_ext.activations.store import load_model, load_tokenizer

    tokens = load_tokenizer("smollm2-135m")(
        "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid.",
        return_tensors="pt",
    )["input_ids"]
    network = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        loss = network(tokens, labels=tokens).loss.item()
    assert loss < 3.5
