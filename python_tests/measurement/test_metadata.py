"""What SAEs say about their inputs is followed, overridden by a flag or refused, and said; the same in every preset."""

import json

import pytest
import torch
from cases.models import flags, saved_sae, small_sae
from hypothesis import given
from hypothesis import strategies as st

from darkmatter_ext import cli
from darkmatter_ext.activations.text import bos_id, bos_note, special_token_ids
from darkmatter_ext.measurement import opening
from darkmatter_ext.measurement.decompose import decompose
from darkmatter_ext.measurement.metadata import InputFlags, given_positions, usage
from darkmatter_ext.measurement.run import measured, prepare
from darkmatter_ext.measurement.settings import Settings, replaced
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.measurement.tokens import kept_positions
from darkmatter_ext.report.result import load_result
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import as_encoder
from darkmatter_ext.saes.flat_activations import SCALED, WHITENED
from darkmatter_ext.saes.loading import SaeDescription, describe_sae, load_sae

HOOK = "blocks.1.hook_resid_post"
ENDS = st.none() | st.integers(-12, 12)


def described(normalize_activations="none", **metadata):
    return SaeDescription("sae", "sae", 16, 24, "topk", metadata, normalize_activations)


def used(*saes, **more):
    own = {name: more.pop(name) for name in ("model", "hook", "stored", "others") if name in more}
    return usage(saes, InputFlags(**more), **own)


# ---- positions


@given(st.lists(ENDS, min_size=1, max_size=2) | st.tuples(ENDS, ENDS, st.integers(-4, 4).filter(bool) | st.none()))
def test_every_slice_means_what_it_means_in_saelens(cut):
    """SAELens keeps slice(*seqpos_slice) of the context."""
    positions = used(described(seqpos_slice=list(cut))).positions
    assert kept_positions(10, positions=positions) == sorted(range(10)[slice(*cut)])
    assert kept_positions(10, positions=positions, first=3) == [p for p in sorted(range(10)[slice(*cut)]) if p >= 3]


def test_slices_that_mean_the_same_agree_and_others_need_a_flag():
    same = [described(seqpos_slice=cut) for cut in ([None], [0, None], [None, None, 1], None)]
    assert used(*same).positions == ()
    differing = described(seqpos_slice=[5, -5]), described(seqpos_slice=[4, None])
    with pytest.raises(
        ValueError, match=r"positions: must be given, the SAEs were made with \[5, -5\] and \[4, None\]"
    ):
        used(*differing)
    found = used(*differing, positions="5:-5")
    assert found.positions == (5, -5, 1)
    assert "overridden: seqpos_slice [4, None] (by positions)" in found.notes[0]


@pytest.mark.parametrize("text", ["5", "a:b", "1:2:0", "1:2:3:4", ""])
def test_positions_that_are_no_slice(text):
    with pytest.raises(ValueError, match="positions: must be auto, START:STOP"):
        given_positions(text)


# ---- what cannot be followed


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"seqpos_slice": 5}, "seqpos_slice must be one to three integers or null, got 5"),
        ({"seqpos_slice": [1, 2, 0]}, "seqpos_slice must have a step other than 0"),
        ({"seqpos_slice": ["a"]}, "seqpos_slice must be one to three"),
        ({"exclude_special_tokens": "bos"}, "exclude_special_tokens must be true, false or a list of ids, got 'bos'"),
        ({"prepend_bos": "yes"}, "prepend_bos must be true or false"),
        ({"context_size": 0}, "context_size must be a number of tokens"),
        (
            {"model_from_pretrained_kwargs": {"revision": "step1000"}},
            "model: must be given, sae was made on other weights",
        ),
        ({"normalize_activations": SCALED}, "activation_scale: must be given, sae was made on activations scaled"),
        ({"normalize_activations": WHITENED}, "sae: must have its whitening folded in"),
    ],
)
def test_metadata_that_cannot_be_followed_is_refused(metadata, message):
    with pytest.raises(ValueError, match=r"^\w+: ") as caught:
        used(described(**metadata))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "values", "flag"),
    [
        ("prepend_bos", (True, False), "bos"),
        ("exclude_special_tokens", (True, False), "exclude_special_tokens"),
        ("exclude_special_tokens", ([3], [4]), "exclude_special_tokens"),
        ("model_from_pretrained_kwargs", ({}, {"fold_ln": True}), "backend"),
    ],
)
def test_saes_that_do_not_agree_need_a_flag(key, values, flag):
    with pytest.raises(ValueError, match=rf"^{flag}: must be "):
        used(*(described(**{key: value}) for value in values))


def test_what_became_of_every_key_is_said():
    sae = described(
        context_size=24, prepend_bos=False, exclude_special_tokens=[5], model_name="a/b", hook_name=HOOK,
        sequence_separator_token="eos", model_class_name="HookedMamba", dataset_path="pile", surprise=3,
        model_from_pretrained_kwargs={"center_writing_weights": True, "revision": "x", "device": "cuda"},
    )  # fmt: skip
    found = used(
        sae, described(context_size=32), bos="yes", model="c/d", hook="blocks.2.hook_resid_post", backend="huggingface"
    )
    assert (found.context_length, found.bos, found.special_tokens, found.processing) == (24, True, (5,), {})
    (note,) = found.notes
    for part in (
        "followed: context_size 24 (the shortest of 24, 32), exclude_special_tokens [5]",
        "prepend_bos False (by bos)", "processed weights (center_writing_weights) (by backend)",
        "model_name a/b (by model)", f"hook_name {HOOK} (by hook)", "not said: seqpos_slice",
        "revision x", "sequence_separator_token eos (contexts never cross documents)",
        "model_class_name HookedMamba", "surprise 3",
    ):  # fmt: skip
        assert part in note, part
    assert "cuda" not in note
    assert "pile" not in note
    stored = used(sae, stored="cache", model="c/d").notes[0]
    assert "as cache was made: context_size 24, prepend_bos False, processed weights" in stored


# ---- BOS and special tokens


def test_a_tokenizer_without_bos_starts_with_eos():
    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = None, 0, 7

    assert bos_id(Tokenizer()) == 0
    assert bos_note(Tokenizer(), True) == "with EOS in front (the tokenizer has no BOS)"
    assert special_token_ids(Tokenizer()) == (0, 7)
    Tokenizer.eos_token_id = None
    assert bos_id(Tokenizer()) is None
    assert bos_note(Tokenizer(), True) == "without BOS (the tokenizer has neither BOS nor EOS)"
    assert bos_note(Tokenizer(), False) == "without BOS"


# ---- scaling


def scaled_sae(folder, kind=SCALED):
    sae = small_sae("topk", 16, 24, 0, bias=0.0)
    sae.save_model(folder)
    content = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(content | {"normalize_activations": kind}))
    return sae


@pytest.mark.runs
def test_a_missing_factor_is_given_or_found_beside_the_weights_or_refused(tmp_path):
    sae, x = scaled_sae(tmp_path / "sae"), torch.randn(50, 16)
    for call in (as_encoder, lambda own: decompose(x, own)):
        with pytest.raises(
            ValueError, match=r"sae: must have its activation scaling folded in .*, got normalize_activations"
        ):
            call(load_sae(tmp_path / "sae"))
    right = sae(3 * x) / 3
    torch.testing.assert_close(load_sae(tmp_path / "sae", activation_scale=3.0)(x), right, rtol=1e-5, atol=1e-5)
    (tmp_path / "sae" / "activation_scaler.json").write_text('{"scaling_factor": 3.0, "has_whitening": false}')
    torch.testing.assert_close(load_sae(tmp_path / "sae")(x), right, rtol=1e-5, atol=1e-5)
    assert used(describe_sae(str(tmp_path / "sae"))).scales == (None,)
    with pytest.raises(ValueError, match="activation_scale: must be left out"):
        used(describe_sae(str(tmp_path / "sae")), activation_scale=(2.0,))


def test_whitening_beside_the_weights_is_folded_in(tmp_path):
    from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

    sae, x = scaled_sae(tmp_path / "sae", WHITENED), torch.randn(50, 16)
    matrix, mean = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0] * 2, torch.ones(16, dtype=torch.float64)
    scaler = ActivationScaler(whitening=ActivationWhitening(mean, matrix, torch.linalg.inv(matrix)))
    scaler.save(str(tmp_path / "sae" / "activation_scaler.json"))
    right = scaler.unscale(sae(scaler.scale(x)))
    torch.testing.assert_close(load_sae(tmp_path / "sae")(x), right, rtol=1e-4, atol=1e-4)


def test_old_files_are_understood_as_saelens_does(tmp_path):
    """Top-level keys, an activation function by name, a boolean where a name stands today."""
    small_sae("topk", 16, 24, 0).save_model(tmp_path / "old")
    old = json.loads((tmp_path / "old" / "cfg.json").read_text())
    for key in ("metadata", "architecture", "reshape_activations", "k"):
        old.pop(key, None)
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "hook_point": HOOK, "context_size": 24}
    old |= {"prepend_bos": False, "model_name": "gpt2-small", "dtype": "torch.float32", "normalize_activations": True}
    (tmp_path / "old" / "cfg.json").write_text(json.dumps(old))
    found = describe_sae(str(tmp_path / "old"))
    assert (found.architecture, found.normalize_activations, found.expected_l0) == ("topk", SCALED, 4)
    assert {key: found.metadata[key] for key in ("hook_name", "context_size", "prepend_bos")} == {
        "hook_name": HOOK, "context_size": 24, "prepend_bos": False,
    }  # fmt: skip
    assert load_sae(tmp_path / "old").cfg.k == 4


# ---- the caller's object, degenerate activations, load errors


def test_an_encoder_leaves_the_callers_sae_as_it_was(tmp_path):
    sae = small_sae("topk", 64, 128, 0, bias=0.0)
    sae.cfg.reshape_activations = "hook_z"
    sae.save_model(tmp_path / "sae")
    sae = load_sae(tmp_path / "sae")
    kind, x = type(sae), torch.randn(2, 3, 4, 16)
    before = sae(x)
    encoded = as_encoder(sae)(x.flatten(0, 1).flatten(1))
    assert type(sae) is kind
    torch.testing.assert_close(encoded.x_hat.view(2, 3, 4, 16), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(sae(x), before)
    assert decompose(torch.randn(200, 64), sae).fvu > 0
    assert torch.equal(sae(x), before)
    with pytest.raises(ValueError, match=r"x: must be of shape \[n, 64\] as the SAE's d_in, got \[200, 16\]"):
        decompose(torch.randn(200, 16), sae)


def test_constant_activations_are_told():
    for x in (torch.ones(500, 16), 3 + 1e-9 * torch.randn(500, 16, dtype=torch.float64)):
        with pytest.raises(ValueError, match="x: must vary over the train tokens, got a constant"):
            decompose(x, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("change", "extra", "reason"),
    [
        ({}, {"threshold": torch.rand(24)}, 'Unexpected key(s) in state_dict: "threshold"'),
        ({"d_in": 32}, {}, "size mismatch for b_dec"),
        ({}, {"scaling_factor": torch.rand(24)}, "Scaling factor is present but finetuning_scaling_factor is False"),
        ({"architecture": "none"}, {}, "none"),
        ({"dtype": None}, {}, "Invalid dtype: None"),
    ],
)
def test_load_errors_keep_their_reason(tmp_path, change, extra, reason):
    from safetensors.torch import load_file, save_file

    small_sae("standard", 16, 24, 0).save_model(tmp_path / "sae")
    path = tmp_path / "sae" / "sae_weights.safetensors"
    save_file(load_file(path) | extra, path)
    content = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match="sae: must be a complete SAE in SAELens format") as caught:
        load_sae(tmp_path / "sae")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- runs


def _saved(folder, **metadata):
    return saved_sae(folder, **({"hook_name": HOOK, "prepend_bos": False, "context_size": 24} | metadata))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.runs
def test_every_preset_follows_the_metadata(workplace, tmp_path):
    """Activations that are stored and that are streamed: the same tokens, the same numbers, the same notes."""
    sae = _saved(
        tmp_path / "sae", seqpos_slice=[5, -5, 2], exclude_special_tokens=[4],
        model_from_pretrained_kwargs={"center_writing_weights": True},
    )  # fmt: skip
    common = ["--sae", sae, "--model", str(workplace / "model"), "--text", str(workplace / "text.txt")]
    common += ["--tokens", "4800", "--max-norm-ratio", "0", "--drop-positions", "7"]
    results = []
    for preset, more in (("demo", ["--store", "True"]), ("one-pass", [])):
        out = tmp_path / preset
        assert cli.main(["run", "decomposition", "--preset", preset, *common, *more, "--out", str(out)]) == 0
        result = load_result(out / "decomposition.json")
        table = read_tokens(result.series["per_token"][HOOK])
        assert set(table["position"].to_pylist()) == {7, 9, 11, 13, 15, 17}
        assert 4 not in table["token"].to_pylist()
        text = " ".join(result.notes)
        assert "Contexts of 24 tokens, without BOS" in text
        assert "weights processed by TransformerLens (center_writing_weights)" in text
        assert (
            "followed: context_size 24, prepend_bos False, seqpos_slice [5, -5, 2], exclude_special_tokens [4]" in text
        )
        assert result.numbers["tokens/left_out_special"] > 0
        results.append(result.numbers)
    for key in ("fvu", "r2_vec", "l0"):
        assert results[0][f"sae/{key}"] == pytest.approx(results[1][f"sae/{key}"], rel=1e-4)


@pytest.mark.usefixtures("own_cache")
def test_what_the_model_cannot_take_is_told_before_it_runs(workplace, tmp_path, refused, monkeypatch):
    from datasets import Dataset

    for runs_the_model in ("ModelSource", "activation_caches"):
        monkeypatch.setattr(opening, runs_the_model, None)
    sae = _saved(tmp_path / "sae", context_size=4096)
    for more in ([], ["--store", "True"]):
        command = flags(workplace, "--sae", sae, *more, "--out", str(tmp_path / "out"))
        command[command.index("--context-length") + 1] = "0"
        refused(command, "--context-length: must be at most the 2048 positions of")
    Dataset.from_dict({"input_ids": [[5] * 24, [99] * 24] * 4}).save_to_disk(str(tmp_path / "rows"))
    config = replaced(
        Settings(),
        sae=(_saved(tmp_path / "short"),),
        model=str(workplace / "model"),
        tokenised=str(tmp_path / "rows"),
        tokens=192,
    )
    with pytest.raises(ValueError, match=r"tokens: must be ids of .*, 0 to 31, got 99"):
        prepare(config, Stages(show=False))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.runs
def test_a_run_tells_a_misloaded_sae_again_and_again(workplace, tmp_path):
    """The second time nothing is loaded: the signs are kept with the run."""
    sae = small_sae("jumprelu", 16, 24, 0, threshold=0.0)
    for key, value in {"hook_name": HOOK, "context_size": 24}.items():
        sae.cfg.metadata[key] = value
    sae.save_model(tmp_path / "sae")
    config = replaced(
        Settings(), sae=(str(tmp_path / "sae"),), model=str(workplace / "model"), text=str(workplace / "text.txt"), tokens=4800,
        split="contexts",
    )  # fmt: skip
    stages = Stages(show=False)
    for _ in range(2):
        notes = measured(prepare(config, stages), stages).notes
        assert any("sae looks misloaded: every threshold is 0" in note for note in notes), notes
    with pytest.raises(ValueError, match="activation_scale: must be left out"):
        prepare(replaced(config, activation_scale=(2.0,)), stages)
