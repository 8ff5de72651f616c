"""Transcoders: errors of what they write, regressed on what they read, with their skip; planted truths and whole runs."""

import pytest
import torch
from cases.formats import unit, write_circuit_tracer, write_sparsify
from cases.models import save_model, saved_sae, word_tokenizer, write_text
from cases.planted import PlantedSource

import darkmatter_ext as dm
from darkmatter_ext import cli
from darkmatter_ext.activations import hook_points
from darkmatter_ext.activations.store import load_model
from darkmatter_ext.estimators.least_squares import fit_linear
from darkmatter_ext.measurement import engine
from darkmatter_ext.measurement.error import NORM_TARGETS
from darkmatter_ext.measurement.run import measured, prepare
from darkmatter_ext.measurement.settings import Measure, Settings, replaced
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT, TokenRoles
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.report.result import load_result
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import Encoded, Encoder, pursuit_encoder, refit_encoder
from darkmatter_ext.saes.loading import load_sae

READ, WRITTEN = "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"
SITE = f"{READ} to {WRITTEN}"
D_READ, D_WRITTEN, TOKENS = 6, 9, 6000
SETTINGS = Measure(drop_positions=0, max_norm_ratio=0, block_contexts=7)


def _transcoder(name, output):
    """One whose output is a function of what it reads."""

    def encode(x):
        return Encoded(output(x), torch.zeros(len(x)), SparseActs.from_dense(torch.zeros(len(x), 1)))

    return Encoder.of_site(name, READ, 1, lambda: encode, writes=WRITTEN)


@pytest.fixture(scope="module")
def planted():
    """x read, y = A x + c + bend(x) written, where the bend is no linear function of x."""
    g = torch.Generator().manual_seed(0)
    x = 2 + torch.randn(TOKENS, D_READ, generator=g)
    A, bend = torch.randn(D_READ, D_WRITTEN, generator=g), torch.randn(D_READ, D_WRITTEN, generator=g)
    y = x @ A + 3 + ((x - 2).square() - 1) @ bend
    return x, y, A, bend


def _measure(x, y, transcoders, folder, settings=SETTINGS):
    source = PlantedSource({READ: x, WRITTEN: y})
    roles = TokenRoles.decide(source, settings, [READ, WRITTEN])
    return engine.measure(source, transcoders, roles, folder=folder), roles


def test_what_is_linear_in_what_is_read_is_explained_whole(planted, tmp_path):
    """The error A x + 3 of a transcoder that gives the bend is linear in x, to rounding; the bend as error is nonlinear."""
    x, y, A, bend = planted
    transcoders = [
        _transcoder("bend", lambda x: ((x - 2).square() - 1) @ bend),
        _transcoder("map", lambda x: x @ A + 3),
        _transcoder("nothing", lambda x: torch.zeros(len(x), D_WRITTEN)),
        _transcoder("all", lambda x: x @ A + 3 + ((x - 2).square() - 1) @ bend),
    ]
    found, _ = _measure(x, y, transcoders, tmp_path)
    assert list(found) == [SITE]
    site = found[SITE]
    first, second, nothing, every = (site.decomposition(sae.name) for sae in transcoders)
    assert first.linear_share == pytest.approx(1, abs=1e-6)
    assert first.r2_vec == pytest.approx(1, abs=1e-6)
    assert second.linear_share == pytest.approx(0, abs=0.01)
    assert second.fvu == pytest.approx(second.fvu_nonlinear, rel=0.01)
    assert every.fvu == pytest.approx(0, abs=1e-9)
    assert nothing.fvu > 1  # about zero instead of the mean
    assert site.written_fit().r2 == pytest.approx(nothing.r2_vec, abs=1e-9)  # the error of nothing is what is written
    torch.testing.assert_close(site.maps["bend"].weight, A.double(), rtol=1e-3, atol=1e-3)


def test_every_number_equals_its_definition(planted, tmp_path):
    x, y, A, _ = planted
    half = _transcoder("half", lambda x: 0.5 * (x @ A))
    found, roles = _measure(x, y, [half], tmp_path)
    own = found[SITE].decomposition("half")
    fit = (roles.contexts == FIT).repeat_interleave(50)
    held = (roles.contexts == HELD_OUT).repeat_interleave(50)
    error = (y - 0.5 * (x @ A)).double()
    b_star = fit_linear(x, error, train=fit).map
    variance = (y[held] - y[held].mean(0)).double().square().sum()
    rest = error - b_star(x.double())
    assert own.fvu == pytest.approx((error[held].square().sum() / variance).item(), rel=1e-6)
    assert own.fvu_nonlinear == pytest.approx((rest[held].square().sum() / variance).item(), rel=1e-6)
    parts = (y, 0.5 * (x @ A), error, b_star(x.double()), rest, 0.5 * (x @ A) + rest)
    for name, part in zip(NORM_TARGETS, parts, strict=True):
        norms = part.double().square().sum(1)
        assert own.mean_squared_norm[name] == pytest.approx(norms[held].mean().item(), rel=1e-5), name
        assert own.r2_norm[name] == pytest.approx(fit_linear(x, norms[:, None], train=fit).r2, abs=1e-5), name
    relative = error.square().sum(1) / y.double().square().sum(1)
    assert own.normalised_mse == pytest.approx(relative[held].mean().item(), rel=1e-6)
    interval = found[SITE].intervals("half")["fvu"]
    assert interval.value == pytest.approx(own.fvu, rel=1e-9)
    assert interval.low < own.fvu < interval.high
    table = read_tokens(found[SITE].per_token)
    assert torch.tensor(table["x"].to_pylist()).mean() == pytest.approx(own.mean_squared_norm["x"], rel=1e-5)


def test_a_norm_at_either_end_leaves_a_token_out(planted, tmp_path):
    x, y, A, _ = planted
    x, y = x.clone(), y.clone()
    x[60] *= 100
    y[61] *= 100
    ratio = Measure(drop_positions=0, max_norm_ratio=20, block_contexts=7)
    found, _ = _measure(x, y, [_transcoder("map", lambda x: x @ A)], tmp_path, ratio)
    assert found[SITE].left_out.by_norm == 2


def test_saes_and_transcoders_are_measured_side_by_side(planted, tmp_path):
    """An SAE at the hook point that a transcoder writes has a site of its own: its error is regressed on what it reads."""
    x, y, A, _ = planted

    def encode(given):
        return Encoded(0.5 * given, torch.zeros(len(given)), SparseActs.from_dense(torch.zeros(len(given), 1)))

    sae = Encoder.of_site("sae", WRITTEN, 1, lambda: encode)
    found, _ = _measure(x, y, [sae, _transcoder("map", lambda x: x @ A)], tmp_path)
    assert list(found) == [WRITTEN, SITE]
    assert found[WRITTEN].decomposition("sae").linear_share == pytest.approx(1, abs=1e-6)
    assert not found[WRITTEN].transcodes


# ---- whole runs, on a small Llama


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcoders")
    save_model(folder / "model", "llama")
    write_text(folder / "text.txt", words=900)
    write_sparsify(folder / "run", module="layers.1.mlp", transcode=True, skip_connection=True)
    saved_sae(folder / "sae", hook_name="blocks.1.hook_mlp_out")
    return folder


@pytest.fixture(autouse=True)
def _cache(place, monkeypatch):
    monkeypatch.setenv("DARKMATTER_CACHE", str(place / "cache"))


def _settings(place, *specs, **more):
    return replaced(
        Settings(), sae=tuple(map(str, specs)), model=str(place / "model"), text=str(place / "text.txt"), tokens=4000,
        drop_positions=0, **more,
    )  # fmt: skip


def _mlp(place):
    """The MLP of block 1."""
    network = load_model(str(place / "model"), device="cpu", dtype=torch.float32)
    return hook_points.transformer_blocks(network)[1].mlp


@pytest.mark.runs
def test_a_sparsify_transcoder_with_a_skip_is_measured_as_one(place, tmp_path):
    stages = Stages(show=False)
    inputs = prepare(_settings(place, place / "run" / "layers.1.mlp"), stages, transcoders=True)
    found = measured(inputs, stages)
    (sae,) = found.saes
    assert sae["hook"] == f"{READ} to blocks.1.hook_mlp_out"
    batch = inputs.source.read(range(inputs.source.n_contexts))
    x, y = (batch.activations[hook] for hook in (READ, "blocks.1.hook_mlp_out"))
    torch.testing.assert_close(_mlp(place)(x), y)  # both ends of one forward pass
    loaded = inputs.saes[0].load()
    torch.testing.assert_close(inputs.saes[0].own(x.flatten(0, 1)).x_hat, loaded(x.flatten(0, 1)), rtol=1e-5, atol=1e-6)
    own = found[sae["name"]]
    held = inputs.roles.of(batch, READ, "blocks.1.hook_mlp_out")[0] == HELD_OUT
    error = (y - loaded(x))[held]
    assert own.fvu == pytest.approx(
        (error.square().sum() / (y[held] - y[held].mean(0)).square().sum()).item(), rel=1e-4
    )
    assert any("looks misloaded: FVU" in note for note in found.notes)  # its weights are random
    headings, row = repr(found).splitlines()  # a table, not the tensors
    assert headings.split()[:4] == ["SAE", "hook", "L0", "FVU"]
    assert row.startswith(sae["name"])
    assert f"{own.fvu:.4g}" in row


@pytest.mark.runs
def test_a_skip_equal_to_what_is_between_leaves_no_error(place):
    """Between `ln2.hook_normalized` and `mlp.hook_in` is the norm's gain: a skip of it is all, others err linearly."""
    from transformers import AutoModelForCausalLM

    d, folder = 16, place / "gained"
    network, gain = AutoModelForCausalLM.from_pretrained(place / "model"), torch.linspace(0.5, 2, d)
    hook_points.transformer_blocks(network)[1].post_attention_layernorm.weight.data.copy_(gain)
    network.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    ends = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "mlp.hook_in"}
    silent = {"b_enc": torch.full((48,), -100.0), "b_dec": torch.zeros(d), "config": ends}
    specs = [
        write_circuit_tracer(place / name, layers=2, W_skip=skip, **silent)[0]
        for name, skip in (("exact", torch.diag(gain)), ("random", unit(d, d)))
    ]
    stages, settings = Stages(show=False), replaced(_settings(place, *specs), model=str(folder))
    found = measured(prepare(settings, stages, transcoders=True), stages)
    exact, random = (found[sae["name"]] for sae in found.saes)
    assert exact.fvu == pytest.approx(0, abs=1e-9)
    assert random.fvu > 0.1
    assert random.linear_share == pytest.approx(1, abs=1e-6)


@pytest.mark.runs
def test_the_command_line_measures_both_kinds(place, tmp_path):
    specs = [str(place / "run" / "layers.1.mlp"), str(place / "sae")]
    flags = ["--model", str(place / "model"), "--text", str(place / "text.txt"), "--tokens", "4000"]
    command = ["run", "decomposition", "--preset", "one-pass", "--sae", *specs, *flags, "--out", str(tmp_path)]
    assert cli.main(command) == 0
    found = load_result(tmp_path / "decomposition.json")
    assert [sae["hook"] for sae in found.series["saes"]] == [
        f"{READ} to blocks.1.hook_mlp_out",
        "blocks.1.hook_mlp_out",
    ]


@pytest.mark.parametrize(
    ("experiment", "more", "message"),
    [
        ("downstream", (), "--sae: must reconstruct its own input here, got the topk_skip_transcoder"),
        ("pursuit", (), "--sae: must reconstruct its own input here"),
        ("scaling", (), "--sae: must reconstruct its own input here"),
        ("norm-test", (), "--sae: must reconstruct its own input here"),
        ("decomposition", ("--store", "True"), "--store: must be False for a transcoder"),
        ("decomposition", ("--hook", "blocks.0.hook_mlp_out"), "--sae: must be of the site blocks.0.hook_mlp_out"),
    ],
)
def test_what_cannot_treat_transcoders_says_so(place, experiment, more, message, capsys):
    flags = ["--model", str(place / "model"), "--text", str(place / "text.txt"), "--tokens", "4000"]
    sae = [str(place / "run" / "layers.1.mlp")]
    assert cli.main(["run", experiment, "--sae", *sae, *flags, *more]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_transcoder_that_does_not_name_its_ends_is_refused(place, tmp_path, capsys):
    folder, _ = write_sparsify(tmp_path / "run", module="adapter", transcode=True)
    assert cli.main(["run", "decomposition", "--sae", str(folder), "--model", str(place / "model")]) == 2
    assert "must name what it reads and writes (hook_name, hook_name_out)" in capsys.readouterr().err.replace("\n", " ")


def test_calls_that_want_a_reconstruction_refuse_a_transcoder(place):
    """Its two widths are equal: no shape would tell."""
    sae = load_sae(place / "run" / "layers.1.mlp")
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="sae: must reconstruct x, got a topk_skip_transcoder"):
        dm.decompose(x, sae)
    for make in (pursuit_encoder, refit_encoder):
        with pytest.raises(ValueError, match="sae: must reconstruct its own input for pursuit, got a topk_skip"):
            make(sae)
