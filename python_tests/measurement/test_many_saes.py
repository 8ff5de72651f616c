"""Many SAEs through the command line on small models, what their metadata decides, plans, and the public SAEs' names."""

import json
import re
import subprocess
import sys

import pytest
import torch
from cases.measured import store_activations
from cases.models import save_model, saved_sae, write_text

from darkmatter_ext import cli
from darkmatter_ext.estimators.sums import LinearSums
from darkmatter_ext.experiments import decomposition
from darkmatter_ext.measurement import opening
from darkmatter_ext.measurement.cost import PlannedSae, cost, duration, known_model
from darkmatter_ext.measurement.excerpt import excerpt
from darkmatter_ext.measurement.presets import GIVEN
from darkmatter_ext.measurement.run import measured, prepare, resolve
from darkmatter_ext.measurement.settings import Settings, replaced
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.report.result import load_result
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes import catalogue
from darkmatter_ext.saes.loading import describe_sae

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A small GPT-2 and Llama with a word tokenizer, a text of twelve documents, SAEs for two sites."""
    folder = tmp_path_factory.mktemp("many")
    for kind in ("gpt2", "llama"):
        save_model(folder / kind, kind)
    write_text(folder / "text.txt", words=900)
    made = {"context_size": 32, "prepend_bos": True}
    saved_sae(folder / "a", hook_name=HOOK, **made)
    saved_sae(folder / "b", seed=1, d_sae=48, architecture="jumprelu", hook_name=HOOK, **made)
    saved_sae(folder / "z", seed=2, hook_name="blocks.0.attn.hook_z", **made)
    return folder


@pytest.fixture(autouse=True)
def _cache(site, monkeypatch):
    """The cache folder beside them."""
    monkeypatch.setenv("DARKMATTER_CACHE", str(site / "cache"))


def _settings(**values):
    return replaced(Settings(), **values)


def _measured(settings):
    stages = Stages(show=False)
    return measured(prepare(settings, stages), stages)


def _flags(site, *more, model="llama", saes=("a", "b")):
    return [
        "run", "decomposition", "--preset", "one-pass", "--sae", *(str(site / name) for name in saes), "--model",
        str(site / model), "--text", str(site / "text.txt"), "--tokens", "8000", *more,
    ]  # fmt: skip


@pytest.mark.runs
def test_a_run_of_given_saes_equals_the_run_that_stores_activations(site, capsys):
    """The same SAEs, text, split and positions through both routes: a model that runs as it is read, and stored activations."""
    one = site / "one"
    assert cli.main(_flags(site, "--out", str(one))) == 0
    stored = ["run", "decomposition", *_flags(site)[4:], "--store", "True"]
    assert cli.main([*stored, "--out", str(site / "stored")]) == 0
    first, second = (load_result(site / name / "decomposition.json") for name in ("one", "stored"))
    for name in ("a", "b"):
        for key in ("fvu", "fvu_nonlinear", "r2_vec", "r2_norm/error", "r2_norm/nonlinear", "l0", "normalised_mse"):
            assert first.numbers[f"{name}/{key}"] == pytest.approx(second.numbers[f"{name}/{key}"], rel=1e-4), (
                name,
                key,
            )
    assert first.config["hook"] == HOOK
    assert {path.name for path in one.iterdir()} == {
        "decomposition.json", "decomposition_fvu.png", "decomposition_norm_test.png", "decomposition_per_token.png",
        "decomposition.npz",
        "report.html",
    }  # fmt: skip
    table = read_tokens(first.series["per_token"][HOOK])
    assert len(table) == first.numbers["tokens/held_out"]
    assert "with BOS" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.runs
def test_sites_come_from_the_saes_and_share_one_reading(site):
    config = _settings(
        sae=tuple(str(site / name) for name in ("a", "z")), model=str(site / "llama"),
        text=str(site / "text.txt"), tokens=4000, passes=1, loss=True, token_means=True, products="float32",
        table_contexts=2,
    )  # fmt: skip
    found = _measured(config)
    assert set(found.sites) == {HOOK, "blocks.0.attn.hook_z"}
    for name in ("a", "z"):
        assert found.site_of(name).decomposition(name).fvu_nonlinear > 0
    site = found.sites[HOOK]
    assert -0.5 < site.scalar_fit(["loss"], ["a/error"]).r2 < 1
    assert set(site.token_mean_r2()) == {"a/error", "a/linear", "a/nonlinear"}
    table = read_tokens(site.per_token)
    assert len(set(table["context"].to_pylist())) == 2
    assert min(table["loss"].to_pylist()) > 0
    assert max(table["position"].to_pylist()) == 30  # the last token has no next one
    assert excerpt(found) == {}


@pytest.mark.runs
def test_saes_of_other_sites_predict_the_error(site):
    config = _settings(sae=(str(site / "a"),), model=str(site / "llama"), text=str(site / "text.txt"), tokens=8000)
    with_others = replaced(config, predictor=(str(site / "z"), str(site / "b")))
    plain, found = (decomposition.run(own, Stages(show=False)).numbers for own in (config, with_others))
    assert found["a/fvu_nonlinear"] == pytest.approx(plain["a/fvu_nonlinear"], rel=1e-6)
    for part in ("error", "linear", "nonlinear"):
        one, both = (found[f"a/r2_from/{name}/{part}"] for name in ("z", "all predictors"))
        assert one < 1
        assert both < 1
    assert found["a/r2_from/b/linear"] > found["a/r2_from/b/nonlinear"]


@pytest.mark.runs
def test_metadata_decides_bos_length_positions_and_weights(site, tmp_path):
    plain = saved_sae(tmp_path / "plain", hook_name=HOOK, context_size=24, prepend_bos=False, seqpos_slice=[10, 20])
    centred = saved_sae(
        tmp_path / "centred", hook_name=HOOK, context_size=24, prepend_bos=False, seqpos_slice=[10, 20],
        model_from_pretrained_kwargs={"center_writing_weights": True},
    )  # fmt: skip
    results = {}
    for sae in (plain, centred):
        config = _settings(
            sae=(sae,), model=str(site / "gpt2"), text=str(site / "text.txt"), tokens=6000, max_norm_ratio=0
        )
        found = _measured(config)
        table = read_tokens(found.sites[HOOK].per_token)
        assert set(table["position"].to_pylist()) == set(range(10, 20))
        assert "Contexts of 24 tokens, without BOS" in found.notes[1]
        results[sae] = (found, table["x"].to_pylist())
    assert "processed by TransformerLens (center_writing_weights)" in results[centred][0].notes[1]
    ratio = sum(results[centred][1]) / sum(results[plain][1])
    assert 0.5 < ratio < 1  # the mean over dimensions is gone
    forced = _settings(
        sae=(centred,), model=str(site / "gpt2"), text=str(site / "text.txt"), tokens=6000,
        max_norm_ratio=0, backend="huggingface",
    )  # fmt: skip
    found = _measured(forced)
    assert read_tokens(found.sites[HOOK].per_token)["x"].to_pylist() == results[plain][1]
    with pytest.raises(ValueError, match="bos: must be given, the SAEs were made with"):
        _measured(_settings(sae=(plain, str(site / "a")), model=str(site / "gpt2")))


@pytest.mark.runs
def test_stored_activations_and_tokenised_datasets_are_sources_too(site, tmp_path):
    from datasets import Dataset

    text, model = str(site / "text.txt"), str(site / "llama")
    sae = (str(site / "a"),)
    plain = _settings(sae=sae, model=model, text=text, tokens=4000, split="contexts")
    streamed = _measured(plain)
    ids = [row for _, row in opening._rows(resolve(plain))]
    Dataset.from_dict({"input_ids": ids}).save_to_disk(str(tmp_path / "tokens"))
    tokenised = _settings(sae=sae, model=model, tokenised=str(tmp_path / "tokens"), tokens=4000, split="contexts")
    again = _measured(tokenised)
    first, second = (found.site_of("a").decomposition("a").numbers() for found in (streamed, again))
    assert first == pytest.approx(second, rel=1e-9)
    assert cli.main(["run", "decomposition", "--model", model, "--text", text, "--tokens", "4000", "--hook", HOOK,
                     "--context-length", "32", "--sae", *sae, "--store", "True",
                     "--out", str(tmp_path / "out")]) == 0  # fmt: skip
    folder = next(path for path in (site / "cache" / "activations").iterdir()
                  if json.loads((path / "meta.json").read_text())["n_contexts"] == 125)  # fmt: skip
    stored = _settings(sae=sae, cache=(str(folder),), tokens=4000, split="contexts")
    cached = _measured(stored).site_of("a").decomposition("a").numbers()
    assert cached == pytest.approx(first, rel=1e-4)


def test_gemma_scope_saes_are_described_without_a_download():
    for sae in catalogue.SAE_SETS["gemma-2-9b-l20"][::12] + catalogue.SAE_SETS["gemma-2-9b-all-layers"][::13]:
        found = describe_sae(sae.spec)
        assert (found.d_in, found.d_sae, found.metadata["hook_name"]) == (sae.d_in, sae.d_sae, sae.hook)
        assert (found.metadata["context_size"], found.metadata["prepend_bos"]) == (1024, True)


def test_the_presets_name_the_saes_of_the_paper_and_of_saelens_list():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    listed = get_pretrained_saes_directory()
    for name, saes in catalogue.SAE_SETS.items():
        assert len({sae.spec for sae in saes}) == len(saes)
        for sae in saes:
            release, _, sae_id = sae.spec.partition(":")
            if release != catalogue.GEMMA_9B_REPOSITORY:
                assert sae_id in listed[release].saes_map, (name, sae.spec)
    own = listed[catalogue.GEMMA_9B_RELEASE]
    assert own.repo_id == catalogue.GEMMA_9B_REPOSITORY
    layer_20 = catalogue.SAE_SETS["gemma-2-9b-l20"]
    assert len(layer_20) == 60
    ids = {sae.spec.partition(":")[2] for sae in layer_20}
    assert {sae_id for sae_id in own.saes_map if sae_id.startswith("layer_20/")} <= ids
    unlisted = {sae.spec.partition(":")[2] for sae in layer_20 if sae.spec.startswith("google/")}
    assert len(unlisted) == 26
    assert not unlisted & set(own.saes_map)
    for layer, sae in enumerate(catalogue.SAE_SETS["gemma-2-9b-all-layers"]):
        pattern = re.compile(rf"layer_{layer}/width_131k/average_l0_(\d+)")
        available = [int(match[1]) for match in map(pattern.fullmatch, own.saes_map) if match]
        nearest = min(available, key=lambda l0: abs(l0 - 60))
        assert sae.spec.endswith(f"layer_{layer}/width_131k/average_l0_{nearest}")
    assert catalogue.SAE_SETS["gemma-2-9b-all-layers"][20].spec.endswith("l0_62")  # the paper's choice at layer 20
    sizes = [sae.d_sae for sae in catalogue.SAE_SETS["gpt2-small"]]
    assert sizes == [768 * 2**i for i in range(8)]


@pytest.mark.runs
@pytest.mark.parametrize("name", [*GIVEN])
def test_every_preset_has_a_plan(name, capsys):
    assert cli.main(["run", "decomposition", "--preset", name, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    if name == "one-pass":
        assert "SAE       blocks.10.hook_resid_post  train topk, 1024 latents" in plan
        return
    assert plan.count("SAE  ") == len(catalogue.SAE_SETS[name])
    for line in ("download  ", "memory  ", "operations  ", "time  "):
        assert line in plan
    if name == "gemma-2-9b-l20":
        assert "download  461.5 GB" in plan  # 18.5 of the model, 443 of 15.4 million latents in float32
        assert "sums 13.5 GB" in plan


@pytest.mark.parametrize("sae", ["sae-16k", "no/such/folder"])
def test_a_plan_is_refused_for_an_sae_that_is_nowhere(sae, refused):
    refused(["run", "decomposition", "--sae", sae, "--dry-run"], "--sae: must be a folder with cfg.json")


def test_sizes_of_local_models_and_durations(site):
    assert known_model(str(site / "llama")).d_model == 16
    assert known_model(str(site / "gpt2")).n_layers == 3
    assert known_model("someone/model") is None
    gemma = catalogue.KNOWN_MODELS["google/gemma-2-9b"]
    assert gemma.layer_parameters * gemma.n_layers + gemma.other_parameters == pytest.approx(9.24e9, rel=0.002)
    llama = catalogue.KNOWN_MODELS["meta-llama/Llama-3.1-8B"]
    assert llama.layer_parameters * llama.n_layers + llama.other_parameters == pytest.approx(8.03e9, rel=0.002)
    assert [duration(s) for s in (30, 600, 9000, 2e6)] == ["30 s", "10.0 minutes", "2.5 hours", "23.1 days"]


def test_planned_sums_are_what_a_measurement_allocates():
    """With predictors every group of held-out contexts keeps errors of its own; without, only its Gram matrix."""
    target, others = PlannedSae("a", HOOK, 100, 400), [PlannedSae("p", "other", 50, 200)]
    options = {"depth": 1, "tokens": 10, "passes": 2, "groups": 6, "sae_bytes": 4, "download_saes": False}
    for predictors in ([], others):
        blocks = {"x": 100} | {sae.name: sae.d_in for sae in predictors}
        p = sum(blocks.values())
        allocated = [LinearSums.empty(blocks, {"error": 100}, torch.zeros(p))]  # fit tokens
        for number in range(6):
            targets = {"error": 100} if predictors or number == 0 else {}
            allocated.append(LinearSums.empty(blocks, targets, torch.zeros(p)))
        matrices = [tensor for sums in allocated for tensor in sums.tensors.values() if tensor.ndim == 2]
        found = cost(None, [target], predictors, **options)
        assert found.sum_bytes == sum(8 * matrix.numel() for matrix in matrices)
        assert found.weight_bytes == 4 * 2 * (100 * 400 + sum(sae.d_in * sae.d_sae for sae in predictors))


BAD = [
    (["--tokenised", "a"], "--sae: must be given with tokenised, SAEs are trained on text, got none"),
    (["--cache", "a"], "--sae: must be given with cache, SAEs are trained on text, got none"),
    (["--widths"], "--widths: must name at least one width when no sae is given, got none"),
    (
        ["--sae", "/nowhere"],
        "--sae: must be a folder with cfg.json and sae_weights.safetensors, or RELEASE:ID, got '/nowhere'",
    ),
    (["--sae", "gpt2-small-res-jb:none"], "--sae: must be an SAE that can be read, got gpt2-small-res-jb:none"),
    (["--hook", "layer3"], "--hook: must be like blocks.10.hook_resid_post"),
    (["--backend", "tf"], "--backend: must be one of auto, huggingface, transformer-lens, got 'tf'"),
    (["--dtype", "int8"], "--dtype: must be one of float32, bfloat16, float16, got 'int8'"),
    (["--passes", "1", "--split", "tokens"], "--split: must be documents or contexts with passes 1, got 'tokens'"),
    (["--text", "a", "--dataset", "b"], "--text: give one of text and dataset, got both"),
    (["--batch-tokens", "0"], "--batch-tokens: must be at least 1, got 0"),
    (["--device", "tpu"], "--device: must be cpu or cuda, got 'tpu'"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=lambda value: value[:40] if isinstance(value, str) else None)
def test_bad_settings_give_one_line(more, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(["run", "decomposition", "--preset", "one-pass", *more], message)


@pytest.mark.runs
def test_saes_that_do_not_fit_are_refused(site, tmp_path, refused):
    nowhere = saved_sae(tmp_path / "nowhere", hook_name="")
    saved_sae(tmp_path / "wide", d_in=20, hook_name=HOOK)
    out = ["--out", str(tmp_path / "out")]
    cases = [
        ([*_flags(site, *out)[:4], "--sae", nowhere], "--hook: must be given"),
        ([*_flags(site, *out)[:4], "--sae", str(site / "a")], "--model: must be given"),
        ([*_flags(site, *out), "--sae", str(tmp_path / "wide")], "--sae: must have d_in 16 as"),
        (_flags(site, *out, "--tokens", "900000"), "--tokens: the text gives"),
        (_flags(site, *out, "--tokens", "70"), "--tokens: must leave documents on every side of the split, got 1"),
        (
            _flags(site, *out, "--drop-positions", "40"),
            "--drop-positions: must be from 0 to 31 (context length 32), got 40",
        ),
        (
            _flags(site, *out, "--positions", "35:40"),
            "--drop-positions, --max-norm-ratio: must leave tokens to measure, got 8 of contexts of 32 within slice(35",
        ),
        (_flags(site, *out, "--max-norm-ratio", "0.0001"), "must leave tokens to measure"),
        (
            _flags(site, *out, "--sae", nowhere, "--hook", "blocks.9.hook_resid_pre"),
            "has blocks 0 to 2, got block 9",
        ),
        (
            _flags(site, *out, "--hook", "blocks.9.hook_resid_pre"),
            "--sae: must be of the site blocks.9.hook_resid_pre",
        ),
    ]
    for flags, message in cases:
        refused(flags, message)


def test_what_prepare_refuses_it_tells_in_one_line(site, tmp_path):
    text, one = str(site / "text.txt"), str(site / "a")
    given = {"sae": (one,), "model": str(site / "gpt2"), "text": text, "tokens": 4000}
    elsewhere = saved_sae(tmp_path / "elsewhere", hook_name=HOOK, model_name="openai-community/gpt2")
    other = saved_sae(tmp_path / "other", seed=1, hook_name=HOOK, model_name="google/gemma-2-2b")
    processed = saved_sae(
        tmp_path / "processed", hook_name=HOOK, context_size=32, model_from_pretrained_kwargs={"fold_ln": True}
    )
    x, nameless = torch.randn(6, 32, 16), torch.full((6, 32), -1)
    store_activations(tmp_path / "cache", HOOK, x, nameless, torch.arange(6))
    cache = {"sae": (one,), "cache": (str(tmp_path / "cache"),), "tokens": 192}
    cases = [
        (
            given | {"sae": (elsewhere, other), "model": ""},
            {},
            "model: must be given, the SAEs were made with openai-comm",
        ),
        (
            given | {"sae": (processed,)},
            {"splices": True},
            "backend: must be huggingface to splice into the model, got",
        ),
        (given | {"sae": (processed,), "loss": True}, {}, "loss: must be left out with TransformerLens' processed"),
        (cache | {"sae": (str(site / "z"),)}, {}, f"cache: must hold blocks.0.attn.hook_z, got {HOOK}"),
        (
            cache | {"exclude_special_tokens": "yes", "model": given["model"]},
            {},
            "exclude_special_tokens: must be no for",
        ),
        (
            cache | {"store": True},
            {},
            "cache: must be left out where activations are stored, they come from text, got it",
        ),
        (cache, {"splices": True}, "cache: must be left out where activations are stored, they come from text, got it"),
        (
            given | {"backend": "transformer-lens", "sae": ()},
            {},
            "backend: must be auto or huggingface without sae, got",
        ),
        (given | {"text": str(tmp_path / "none.txt")}, {}, "text: must be a readable file"),
        (given | {"tokens": 900_000, "store": True}, {}, "tokens: the text gives"),
        (given | {"hook": "blocks.1.hook_mlp_out"}, {}, "sae: must be of the site blocks.1.hook_mlp_out, got one of"),
    ]
    for values, more, message in cases:
        with pytest.raises(InputError) as caught:
            prepare(_settings(**values), Stages(show=False), **more)
        assert message in str(caught.value), message
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="tokns: must be one of the settings context_length, bos, "):
        _settings(tokns=5)


@pytest.mark.runs
def test_a_named_checkpoint_refuses_another_configuration(site, tmp_path, capsys):
    flags = _flags(site, "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    config = _settings(
        sae=tuple(str(site / name) for name in ("a", "b")), model=str(site / "llama"),
        text=str(site / "text.txt"), tokens=8000, checkpoint=str(tmp_path / "run"),
    )  # fmt: skip
    _measured(config)
    assert cli.main([*flags, "--fit-fraction", "0.5"]) == 2
    assert "fit_fraction 0.6 there, 0.5 here" in capsys.readouterr().err


@pytest.mark.runs
def test_another_sae_under_the_same_name_is_measured_anew(site, tmp_path):
    sae = saved_sae(tmp_path / "sae", hook_name=HOOK, context_size=32)
    config = _settings(sae=(sae,), model=str(site / "llama"), text=str(site / "text.txt"), tokens=4000)
    first = _measured(config).site_of("sae").decomposition("sae").fvu
    saved_sae(tmp_path / "sae", seed=5, hook_name=HOOK, context_size=32)
    second = _measured(config).site_of("sae").decomposition("sae").fvu
    assert first != second


@pytest.mark.slow
def test_torchrun_gives_the_table_of_one_process(site, tmp_path):
    """The command of the README in two processes: one result file, the same numbers."""
    results = []
    for n, name in ((1, "alone"), (2, "both")):
        flags = _flags(site, "--checkpoint", str(tmp_path / f"run-{n}"), "--out", str(tmp_path / name))
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", "--rdzv-backend=c10d",
                    "--rdzv-endpoint=localhost:0", "-m", "darkmatter_ext", *flags]  # fmt: skip
        # not from the source folder: `-m` would take the package there, which may have no compiled ops
        done = subprocess.run(launcher, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote") == 5  # once, not once a process
        results.append(load_result(tmp_path / name / "decomposition.json").numbers)
    assert results[1] == pytest.approx(results[0], rel=1e-7, abs=1e-9)
    flags = ["run", "decomposition", "--out", str(tmp_path / "demo")]
    launcher = [*launcher[: launcher.index("run")], *flags]
    done = subprocess.run(launcher, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert (
        "torchrun: must be used with SAEs that exist (sae) and activations that are streamed, got store" in done.stderr
    )
