"""`darkmatter train`: SAEs of a model's activations, loadable with all their metadata say; what it plans and refuses."""

import json

import pytest
from cases.models import flags

from darkmatter_ext import cli
from darkmatter_ext.measurement.opening import stored_activations
from darkmatter_ext.measurement.resolved import resolve
from darkmatter_ext.measurement.settings import Settings, replaced
from darkmatter_ext.runtime.progress import Stages

pytestmark = pytest.mark.usefixtures("own_cache")
HOOK = "blocks.1.hook_resid_post"


def _arguments(workplace, out, *more):
    return [
        "train", "--model", str(workplace / "model"), "--hook", HOOK, "--text", str(workplace / "text.txt"),
        "--tokens", "16000", "--context-length", "32", "--d-sae", "48", "--k", "4", "--steps", "30",
        "--batch-size", "256", "--buffer-tokens", "4000", "--log-every", "10", "--out", str(out), *more,
    ]  # fmt: skip


@pytest.mark.runs
def test_saes_of_several_widths_from_one_stream_load_and_measure(workplace, tmp_path, capsys):
    from sae_lens import SAE

    out = tmp_path / "out"
    arguments = _arguments(workplace, out, "--widths", "24", "48", "--architecture", "batchtopk")
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "batchtopk-24" in said
    assert "FVU, held-out text" in said
    for width in (24, 48):
        folder = out / f"batchtopk-{width}"
        metadata = SAE.load_from_disk(folder).cfg.metadata
        assert metadata["model_name"] == str(workplace / "model")
        assert metadata["hook_name"] == HOOK
        assert (metadata["context_size"], metadata["prepend_bos"]) == (32, True)
        report = json.loads((folder / "training.json").read_text())["report"]
        assert 0 < report["held_out/fvu"] < 1
    weights = (out / "batchtopk-24" / "sae_weights.safetensors").read_bytes()
    assert cli.main(arguments) == 0  # done already
    assert (out / "batchtopk-24" / "sae_weights.safetensors").read_bytes() == weights
    saes = ["--sae", str(out / "batchtopk-24"), str(out / "batchtopk-48")]
    measured = flags(workplace, *saes, "--out", str(tmp_path / "measured"), hook="")
    assert cli.main(measured) == 0
    assert "batchtopk-48" in (tmp_path / "measured" / "decomposition.json").read_text()


@pytest.mark.runs
def test_a_cache_a_store_and_a_stream_give_the_same_sae(workplace, tmp_path):
    stored, streamed, cached = (tmp_path / name for name in ("stored", "streamed", "cached"))
    assert cli.main(_arguments(workplace, stored, "--store")) == 0
    assert cli.main(_arguments(workplace, streamed)) == 0
    settings = replaced(
        Settings(), model=str(workplace / "model"), text=str(workplace / "text.txt"), tokens=16000, context_length=32
    )
    cache = stored_activations(resolve(settings, train_at=[HOOK]), Stages(show=False))[HOOK].folder
    assert cli.main(_with_cache(workplace, cached, cache)) == 0
    reports = [
        json.loads((folder / "topk-48" / "training.json").read_text())["report"]
        for folder in (stored, streamed, cached)
    ]
    assert reports[0] == reports[2]
    assert reports[0]["held_out/fvu"] == pytest.approx(reports[1]["held_out/fvu"], rel=1e-3)


def _with_cache(workplace, out, cache):
    arguments = _arguments(workplace, out, "--cache", str(cache))
    for flag in ("--model", "--hook", "--text"):
        at = arguments.index(flag)
        del arguments[at : at + 2]
    return arguments


def test_dry_run_prints_the_plan_and_does_nothing(workplace, tmp_path, capsys):
    arguments = _arguments(workplace, tmp_path / "no", "--widths", "24", "96", "--dry-run", "--seed", "7")
    assert cli.main(arguments) == 0
    plan = capsys.readouterr().out
    for part in (HOOK, "topk-24: 24 latents, k 4, 30 steps", "topk-96", "hold out  5%", "seed      7"):
        assert part in plan
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "100"], "--k: must be from 1 to d_sae (48), got 100"),
        (
            ["--architecture", "relu"],
            "--architecture: must be one of topk, batchtopk, jumprelu, matryoshka, got 'relu'",
        ),
        (["--layout", "sparsify", "--architecture", "jumprelu"], "--layout: must be saelens for a jumprelu SAE"),
        (["--positions", "1:9"], "--positions: must be left out, see drop_positions, got 1:9"),
        (["--drop-positions", "32"], "--drop-positions: must be from 0 to 31, got 32"),
        (
            ["--batch-size", "100000", "--buffer-tokens", "100000"],
            "source: must hold at least one batch of 100000 tokens",
        ),
        (["--hook", "blocks.9.hook_resid_post"], "--hook: "),
        (["--tokens", "10000000"], "--tokens: the text gives"),
    ],
)
def test_bad_arguments_give_one_line_and_no_sae(more, message, workplace, tmp_path, refused):
    refused(_arguments(workplace, tmp_path / "out", *more), message)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_same_command_with_other_settings_is_refused(workplace, tmp_path, refused):
    assert cli.main(_arguments(workplace, tmp_path / "out")) == 0
    refused(_arguments(workplace, tmp_path / "out", "--k", "5"), "checkpoint: must hold a run of this configuration")
    assert (tmp_path / "out" / "topk-48" / "cfg.json").exists()
