"""One pass over many SAEs against one SAE at a time with stored tensors, and against the two-pass stream."""

import dataclasses

import pyarrow
import pyarrow.parquet
import pytest
import torch
from cases.measured import HOOKS, LENGTH, decided, measure, numbers, saes, write_caches
from cases.models import small_sae

from darkmatter_ext.estimators.least_squares import fit_linear
from darkmatter_ext.measurement import engine
from darkmatter_ext.measurement.decompose import TokenBatch, decompose_stream
from darkmatter_ext.measurement.engine import tokens_to_read
from darkmatter_ext.measurement.error import NORM_TARGETS
from darkmatter_ext.measurement.settings import Measure, Regressions
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT, NORM_FIT
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.encoders import Encoded

SETTINGS = Measure(drop_positions=1, block_contexts=7, batch_tokens=40, token_means=True, table_contexts=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_caches(tmp_path_factory.mktemp("caches"))


def _tokens(source, hook, settings):
    """All measured tokens of a site in the order of the text: x, roles, ids, contexts, positions."""
    batch = source.read(range(source.n_contexts))
    x = batch.activations[hook]
    norms = x.norm(dim=-1)
    typical = norms[:16, settings.drop_positions :].median()
    used = (torch.arange(LENGTH) >= settings.drop_positions).expand(norms.shape)
    used = used & (norms <= settings.max_norm_ratio * typical)
    roles = decided(source, saes(), settings).contexts[:, None].expand(norms.shape)
    contexts = torch.arange(source.n_contexts)[:, None].expand(norms.shape)
    return (
        x[used],
        roles[used],
        batch.tokens[used],
        contexts[used],
        torch.arange(LENGTH).expand(norms.shape)[used],
        used,
    )


def _sae(name):
    architecture, d_sae, seed = {"small": ("topk", 24, 0), "large": ("topk", 64, 1), "jump": ("jumprelu", 32, 2),
                                 "mlp": ("topk", 24, 3)}[name]  # fmt: skip
    return small_sae(architecture, 12, d_sae, seed)


def test_two_passes_equal_the_stream(source, tmp_path):
    found = measure(source, saes(), SETTINGS, folder=tmp_path)
    for hook, names in zip(HOOKS, (["small", "large", "jump"], ["mlp"]), strict=True):
        x, roles, *_ = _tokens(source, hook, SETTINGS)
        functions = {}
        for name in names:
            sae = _sae(name)
            acts = sae.encode(x)
            stored = sae.decode(acts), (acts != 0).sum(-1)
            functions[name] = lambda batch, stored=stored: Encoded(
                *(part[batch.start : batch.start + len(batch.x)] for part in stored), acts=None
            )
        batches = [TokenBatch(x[i : i + 100], (roles == FIT)[i : i + 100], i) for i in range(0, len(x), 100)]
        expected = decompose_stream(batches, functions)
        for name in names:
            own = found[hook].decomposition(name)
            for key, value in expected[name].numbers().items():
                assert own.numbers()[key] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, key)  # float32 SAEs
            assert (own.n_train, own.n_test) == (expected[name].n_train, expected[name].n_test)
    assert found[HOOKS[0]].left_out.by_norm == 1
    assert found[HOOKS[0]].left_out.by_position == source.n_contexts
    assert tokens_to_read(source, SETTINGS) == 2 * 60 * 16


def test_one_pass_reads_every_token_once_and_keeps_three_parts_apart(source, tmp_path):
    """b* from the first part, norm tests from the second, scores on the third: written out on stored tensors."""
    settings = dataclasses.replace(SETTINGS, passes=1, split="contexts")
    read = []

    class Counting:
        def __getattr__(self, name):
            return getattr(source, name)

        def read(self, which):
            read.extend(which)
            return source.read(which)

    found = measure(Counting(), saes()[:1], settings, folder=tmp_path)[HOOKS[0]]
    assert sorted(read[16:]) == list(range(60))  # after the pilot
    x, roles, *_ = _tokens(source, HOOKS[0], settings)
    x_hat = _sae("small").forward(x).double()
    x = x.double()
    error = x - x_hat
    first, held_out = fit_linear(x, error, train=roles == FIT), roles == HELD_OUT
    assert {FIT, NORM_FIT, HELD_OUT} == set(roles.tolist())
    linear = first.map(x)
    vectors = {"x": x, "sae": x_hat, "error": error, "linear": linear, "nonlinear": error - linear}
    vectors["sae_plus_nonlinear"] = x_hat + error - linear
    own = found.decomposition("small")
    variance = (x[held_out] - x[held_out].mean(0)).square().sum()
    assert own.fvu == pytest.approx((error[held_out].square().sum() / variance).item(), rel=1e-5)
    assert own.fvu_nonlinear == pytest.approx(((error - linear)[held_out].square().sum() / variance).item(), rel=1e-5)
    rows = (roles == NORM_FIT) | held_out
    for name in NORM_TARGETS:
        target = vectors[name].square().sum(1, keepdim=True)
        expected = fit_linear(x[rows], target[rows], train=(roles == NORM_FIT)[rows]).r2
        assert own.r2_norm[name] == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    assert found.n_norm_fit == int((roles == NORM_FIT).sum())


def test_the_table_has_every_held_out_token_with_its_numbers(source, tmp_path):
    found = measure(source, saes(), SETTINGS, folder=tmp_path)[HOOKS[0]]
    table = read_tokens(found.per_token)
    x, roles, ids, contexts, positions, _ = _tokens(source, HOOKS[0], SETTINGS)
    held_out = roles == HELD_OUT
    assert table["context"].to_pylist() == contexts[held_out].tolist()
    assert table["position"].to_pylist() == positions[held_out].tolist()
    assert table["token"].to_pylist() == ids[held_out].tolist()
    sae = _sae("large")
    acts = sae.encode(x[held_out])
    error = (x[held_out] - sae.decode(acts)).double()
    nonlinear = error - found.maps["large"](x[held_out])
    for name, expected in (
        ("large/error", error.square().sum(1)),
        ("large/nonlinear", nonlinear.square().sum(1)),
        ("large/l0", (acts != 0).sum(1)),
        ("x", x[held_out].double().square().sum(1)),
    ):
        column = torch.tensor(table[name].to_pylist(), dtype=torch.float64)
        torch.testing.assert_close(column, expected.double(), rtol=1e-5, atol=1e-6)
    assert str(table.schema.field("large/error").type) == "float"
    assert str(table.schema.field("large/l0").type) == "int32"
    few = read_tokens(found.per_token, ["small/error"])
    assert few.column_names == ["context", "position", "small/error"]
    with pytest.raises(ValueError, match="per_token: must be a folder of parquet parts"):
        read_tokens(tmp_path / "none")


@pytest.mark.parametrize("contexts", [pyarrow.array([[1], [2]]), pyarrow.array(["a", "b"]).dictionary_encode()])
def test_columns_that_arrow_cannot_sort_are_told_in_one_line(contexts, tmp_path):
    """Arrow has errors of its own for what it does not implement: neither OSError nor ValueError."""
    table = pyarrow.table({"context": contexts, "position": [0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "part-0000-000000.parquet")
    with pytest.raises(InputError, match="per_token: must be a folder of parquet parts"):
        read_tokens(tmp_path)


def test_baselines_and_latents_equal_the_tokens_own(source, tmp_path):
    """Scalar regressions, token means and latent values against the stored tokens."""
    found = measure(source, saes(), SETTINGS, folder=tmp_path)[HOOKS[0]]
    x, roles, ids, *_ = _tokens(source, HOOKS[0], SETTINGS)
    values = {}
    for name in ("small", "large"):
        sae = _sae(name)
        acts = sae.encode(x)
        values[name] = ((x - sae.decode(acts)).double(), acts)
    small, large = (values[name][0].norm(dim=1, keepdim=True) for name in ("small", "large"))
    expected = fit_linear(small, large, train=roles == FIT)
    assert found.scalar_fit(["small/error_norm"], ["large/error_norm"]).r2 == pytest.approx(expected.r2, rel=1e-4)
    joined = torch.cat([small, (values["small"][0] - found.maps["small"](x)).norm(dim=1, keepdim=True)], dim=1)
    expected = fit_linear(joined, large, train=roles == FIT)
    both = found.scalar_fit(["small/error_norm", "small/nonlinear_norm"], ["large/error_norm"])
    assert both.r2 == pytest.approx(expected.r2, rel=1e-4)
    target = small.square().flatten()
    mean = torch.stack([target[(ids == i) & (roles == FIT)].mean() for i in range(40)])
    held_out = roles == HELD_OUT
    residual = (target - mean[ids])[held_out].square().sum()
    r2 = 1 - residual / (target[held_out] - target[held_out].mean()).square().sum()
    assert found.token_mean_r2()["small/error"] == pytest.approx(r2.item(), rel=1e-4)
    acts = values["small"][1]
    assert found.latents["small"].fired.tolist() == (acts > 0).sum(0).tolist()
    torch.testing.assert_close(found.latents["small"].values, acts.double().sum(0), rtol=1e-5, atol=1e-5)
    a_star = fit_linear(x, target[:, None], train=roles == FIT).map.weight
    torch.testing.assert_close(found.norm_map("small", "error").weight, a_star, rtol=1e-3, atol=1e-4)


def _group_scores(found, x, roles, contexts, source, settings):
    """FVU, FVU_nonlinear, share and R2 of every set of held-out tokens that leaves one group of contexts out."""
    groups = decided(source, saes(), settings).groups
    error = (x - _sae("large").forward(x)).double()
    nonlinear = error - found.maps["large"](x)
    x = x.double()
    for left_out in (None, *groups[contexts[roles == HELD_OUT]].unique().tolist()):
        kept = (roles == HELD_OUT) & (groups[contexts] != (-1 if left_out is None else left_out))
        variance, total = ((part[kept] - part[kept].mean(0)).square().sum(0) for part in (x, error))
        residual = nonlinear[kept].square().sum(0)
        fvu, rest = error[kept].square().sum() / variance.sum(), residual.sum() / variance.sum()
        yield torch.stack([fvu, rest, 1 - rest / fvu, (1 - residual / total).mean()])


def test_intervals_leave_out_whole_groups_of_contexts(source, tmp_path):
    settings = dataclasses.replace(SETTINGS, interval_groups=4)
    found = measure(source, saes(), settings, folder=tmp_path)[HOOKS[0]]
    x, roles, _, contexts, *_ = _tokens(source, HOOKS[0], settings)
    every, *without = _group_scores(found, x, roles, contexts, source, settings)
    without = torch.stack(without)
    n = len(without)
    assert n == 4
    half = 3.1824 * ((n - 1) / n * (without - without.mean(0)).square().sum(0)).sqrt()  # t of 3 degrees of freedom
    for i, name in enumerate(("fvu", "fvu_nonlinear", "linear_share", "r2_vec")):
        interval = found.intervals("large")[name]
        assert interval.value == pytest.approx(every[i].item(), rel=1e-5)
        assert interval.value == pytest.approx(found.decomposition("large").numbers()[name], rel=1e-5)
        assert interval.high - interval.value == pytest.approx(half[i].item(), rel=1e-3), name
    norms = found.decomposition("large").r2_norm
    for name, value in norms.items():
        interval = found.intervals("large")[f"r2_norm/{name}"]
        assert interval.value == pytest.approx(value, rel=1e-6)
        assert interval.low < value < interval.high
    fit = found.scalar_fit(["small/l0", "x_norm"], ["large/error_norm"])
    interval = found.scalar_interval(["small/l0", "x_norm"], "large/error_norm")
    assert interval.value == pytest.approx(fit.r2, rel=1e-6)
    assert interval.low < fit.r2 < interval.high


def _shares_without(count, x, held_out, error, nonlinear, fit):
    """FVU, FVU_nonlinear and linear share after projecting the top directions of the fit tokens' covariance away."""
    top = torch.linalg.svd(x[fit] - x[fit].mean(0), full_matrices=False).Vh[:count]
    rest = [part - part @ top.mT @ top for part in (x[held_out], error[held_out], nonlinear[held_out])]
    variance = (rest[0] - rest[0].mean(0)).square().sum()
    fvu, fvu_nonlinear = ((part.square().sum() / variance).item() for part in rest[1:])
    return [fvu, fvu_nonlinear, 1 - fvu_nonlinear / fvu]


@pytest.mark.runs
@pytest.mark.parametrize("products", ["float64", "float32"])
def test_shares_without_the_top_directions_equal_those_of_projected_tokens(source, tmp_path, products):
    settings = dataclasses.replace(SETTINGS, interval_groups=4, products=products)
    found = measure(source, saes(), settings, folder=tmp_path)[HOOKS[0]]
    x, roles, *_ = _tokens(source, HOOKS[0], settings)
    fit, held_out = roles == FIT, roles == HELD_OUT
    error = x.double() - _sae("large").forward(x).double()
    x = x.double()
    nonlinear = error - fit_linear(x, error, train=fit).map(x)
    for count in (1, 6):
        own = found.without_top("large", count)
        expected = _shares_without(count, x, held_out, error, nonlinear, fit)
        assert [interval.value for interval in own.values()] == pytest.approx(expected, rel=1e-4), count
        assert all(interval.low < interval.value < interval.high for interval in own.values())
    assert list(own) == ["fvu", "fvu_nonlinear", "linear_share"]
    assert own["fvu"].value > 1.2 * found.decomposition("large").fvu  # the test could not tell them apart otherwise
    assert found.without_top("large", 7) == {}  # half of 12 dimensions are kept


def test_groups_keep_documents_whole_and_one_group_has_no_interval(source, tmp_path):
    settings = dataclasses.replace(SETTINGS, interval_groups=5)
    own = decided(source, saes(), settings)
    roles, groups = own.contexts, own.groups
    held_out = roles == HELD_OUT
    for document in source.documents[held_out].unique():
        assert len(groups[held_out & (source.documents == document)].unique()) == 1
    counts = torch.bincount(groups[held_out], minlength=5)
    assert int(counts.min()) > 0
    assert int(counts.max() - counts.min()) <= 3  # a document
    assert groups[~held_out].tolist() == [0] * int((~held_out).sum())
    alone = measure(source, saes()[:1], dataclasses.replace(SETTINGS, interval_groups=1), folder=tmp_path)[HOOKS[0]]
    interval = alone.intervals("small")["fvu"]
    assert interval.value == pytest.approx(alone.decomposition("small").fvu)
    assert str(interval.low) == str(interval.high) == "nan"


@pytest.mark.runs
def test_the_released_codes_regressions_have_no_bias_and_see_held_out_tokens(source, tmp_path):
    """b* of the vector test on fit tokens, of the norm tests on all, FVU on all, nowhere a bias: against torch.linalg.lstsq."""
    settings = dataclasses.replace(SETTINGS, parity="released-code")
    regressions = Regressions(bias=False, map_on_all=True, fvu_of_all=True)
    found = measure(source, saes(), settings, folder=tmp_path, regressions=regressions)[HOOKS[0]]
    x, roles, _, _, positions, _ = _tokens(source, HOOKS[0], settings)
    kept = positions < LENGTH - 1  # it never keeps the last position
    x, fit = x[kept].double(), (roles == FIT)[kept]
    x_hat = _sae("large").forward(x.float()).double()
    error = x - x_hat

    def r2(target, prediction, rows):
        rest = (target - prediction)[rows].square().sum(0)
        return 1 - rest / (target[rows] - target[rows].mean(0)).square().sum(0)

    b_star = torch.linalg.lstsq(x[fit], error[fit], driver="gelsd").solution
    own = found.decomposition("large")
    assert own.r2_vec == pytest.approx(r2(error, x @ b_star, ~fit).mean().item(), rel=1e-4)
    variance = (x - x.mean(0)).square().sum()
    assert own.fvu == pytest.approx((error.square().sum() / variance).item(), rel=1e-5)
    assert own.fvu_nonlinear == pytest.approx(((error - x @ b_star).square().sum() / variance).item(), rel=1e-5)
    linear = x @ torch.linalg.lstsq(x, error, driver="gelsd").solution
    targets = {
        "error": error,
        "linear": linear,
        "nonlinear": error - linear,
        "sae_plus_nonlinear": x_hat + error - linear,
    }
    for name, vector in targets.items():
        norm = vector.square().sum(1, keepdim=True)
        a_star = torch.linalg.lstsq(x[fit], norm[fit], driver="gelsd").solution
        assert own.r2_norm[name] == pytest.approx(r2(norm, x @ a_star, ~fit).item(), rel=1e-3), name
        assert found.intervals("large")[f"r2_norm/{name}"].value == pytest.approx(own.r2_norm[name], rel=1e-6)
    assert found.intervals("large")["r2_vec"].value == own.r2_vec
    scaling = measure(source, saes(), settings, folder=tmp_path / "scaling")[
        HOOKS[0]
    ]  # by default the scaling script's
    assert scaling.decomposition("large").fvu_nonlinear == own.fvu_nonlinear
    fitted = x @ torch.linalg.lstsq(x[fit], error[fit], driver="gelsd").solution
    expected = (error - fitted).square().sum(1, keepdim=True)
    a_star = torch.linalg.lstsq(x[fit], expected[fit], driver="gelsd").solution
    r2_nonlinear = r2(expected, x @ a_star, ~fit).item()
    assert scaling.decomposition("large").r2_norm["nonlinear"] == pytest.approx(r2_nonlinear, rel=1e-3)
    with_bias = measure(source, saes(), SETTINGS, folder=tmp_path / "paper")[HOOKS[0]].decomposition("large")
    assert abs(with_bias.r2_norm["error"] - own.r2_norm["error"]) > 1e-3


def test_outputs_of_other_saes_predict_every_part_of_the_error(source, tmp_path):
    """Earlier-layer predictors: b* and the linear and nonlinear part come from the same sums."""
    every = saes()
    predictors = {HOOKS[0]: [every[3], dataclasses.replace(every[0], name="self")]}
    found = measure(source, every[:3], SETTINGS, folder=tmp_path, predictors=predictors)[HOOKS[0]]
    x, roles, *_, used = _tokens(source, HOOKS[0], SETTINGS)
    mlp = source.read(range(source.n_contexts)).activations[HOOKS[1]][used]
    z = {"mlp": _sae("mlp").forward(mlp), "self": _sae("small").forward(x)}
    error = (x - _sae("large").forward(x)).double()
    linear = found.maps["large"](x)
    for names in (["mlp"], ["mlp", "self"]):
        given = torch.cat([z[name] for name in names], dim=1)
        for part, target in (("error", error), ("linear", linear), ("nonlinear", error - linear)):
            expected = fit_linear(given, target, train=roles == FIT).r2
            assert found.part_fit(names, "large", part).r2 == pytest.approx(expected, rel=1e-4, abs=1e-6), (names, part)
    with pytest.raises(ValueError, match="part: must be one of error, linear, nonlinear, got 'odd'"):
        found.part_fit(["mlp"], "large", "odd")


@pytest.mark.runs
def test_float32_products_and_small_budgets_change_nothing_that_matters(source, tmp_path):
    exact = numbers(measure(source, saes(), SETTINGS, folder=tmp_path / "a"))
    fast = dataclasses.replace(SETTINGS, products="float32", sae_memory_gb=1e-9, batch_tokens=1000, block_contexts=60)
    for key, value in numbers(measure(source, saes(), fast, folder=tmp_path / "b")).items():
        assert value == pytest.approx(exact[key], rel=1e-4, abs=1e-4), key


def test_tokens_can_be_split_at_random_as_in_the_paper(source, tmp_path):
    settings = dataclasses.replace(SETTINGS, split="tokens")
    site = measure(source, saes()[:1], settings, folder=tmp_path)[HOOKS[0]]
    assert site.n_fit + site.n_held_out == 60 * 15 - 1
    assert site.n_fit / (60 * 15) == pytest.approx(0.6, abs=0.05)
    contexts = read_tokens(site.per_token)["context"].to_pylist()
    assert len(set(contexts)) > 55  # nearly every context has tokens on both sides


def test_a_finished_measurement_gives_its_result_at_once(source, tmp_path):
    first = numbers(measure(source, saes(), SETTINGS, folder=tmp_path))
    done = []
    again = measure(source, saes(), SETTINGS, folder=tmp_path, progress=done.append)
    assert numbers(again) == first
    assert done == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": 3}, "passes: must be 1 or 2, got 3"),
        ({"passes": 1, "split": "tokens"}, "split: must be documents or contexts with passes 1, got 'tokens'"),
        ({"split": "rows"}, "split: must be documents, contexts or tokens, got 'rows'"),
        ({"fit_fraction": 1.0}, "fit_fraction: must be between 0 and 1, got 1.0"),
        ({"parity": "code"}, "parity: must be paper or released-code, got 'code'"),
        ({"parity": "released-code", "passes": 1}, "passes: must be 2 with parity released-code, got 1"),
        ({"interval_groups": 0}, "interval_groups: must be at least 1, got 0"),
        ({"products": "bf16"}, "products: must be float64 or float32, got 'bf16'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message.split(":")[0]) as caught:
        Measure(**changes)
    assert str(caught.value) == message


def test_no_sae_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="saes: must name at least one SAE, got none"):
        engine.measure(source, [], decided(source, saes(), SETTINGS), folder=tmp_path)
