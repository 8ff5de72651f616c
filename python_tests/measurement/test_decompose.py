"""Decomposition on synthetic data with a known answer, and against the definitions written out on stored tensors."""

import pytest
import torch

import darkmatter_ext as dm
from darkmatter_ext.measurement.decompose import TokenBatch, decompose_stream
from darkmatter_ext.measurement.error import NORM_TARGETS
from darkmatter_ext.saes.encoders import Encoded


def _planted(n=30_000, d=12, linear_share=0.6, seed=0):
    """x and an x_hat whose error is a linear map of x plus independent noise, with a known share of energy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    scale = 0.3  # FVU = scale^2
    linear = scale * linear_share**0.5 * (x @ rotation)
    noise = scale * (1 - linear_share) ** 0.5 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, x - linear - noise


def test_recovers_the_planted_linear_share():
    x, x_hat = _planted()
    found = dm.decompose(x, x_hat)
    assert found.fvu == pytest.approx(0.09, rel=0.03)
    assert found.fvu_nonlinear == pytest.approx(0.09 * 0.4, rel=0.03)
    assert found.linear_share == pytest.approx(0.6, abs=0.02)
    assert found.r2_vec == pytest.approx(0.6, abs=0.02)
    assert found.r2_norm["error"] == pytest.approx(0.0, abs=0.02)  # even in x: no linear map predicts it


def test_equals_the_definitions_on_stored_tensors():
    """Every number once more with whole matrices and lstsq, from the definitions alone."""
    x, x_hat = _planted(n=3000)
    x_hat = x_hat + 0.1 * x.abs() + 0.5  # a bias and a nonlinearity, so that no number is trivially 0
    x = x + 3
    train = torch.arange(3000) % 5 < 3
    found = dm.decompose(x, x_hat, train=train, batch_size=700)

    def regress(y):
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        design = torch.cat([x, ones], dim=1)
        return design @ torch.linalg.lstsq(design[train], y[train], driver="gelsd").solution

    def r2(y):
        held_out = ~train
        residual = (y - regress(y))[held_out].square().sum(0)
        return 1 - residual / (y[held_out] - y[held_out].mean(0)).square().sum(0)

    error, test = x - x_hat, ~train
    variance = (x[test] - x[test].mean(0)).square().sum()
    linear = regress(error)
    assert found.fvu == pytest.approx((error[test].square().sum() / variance).item(), rel=1e-9)
    assert found.fvu_nonlinear == pytest.approx(((error - linear)[test].square().sum() / variance).item(), rel=1e-9)
    ratio = error[test].square().mean(1) / x[test].square().mean(1)
    assert found.normalised_mse == pytest.approx(ratio.mean().item(), rel=1e-9)
    assert found.r2_vec == pytest.approx(r2(error).mean().item(), rel=1e-8)
    vectors = {
        "x": x,
        "sae": x_hat,
        "error": error,
        "linear": linear,
        "nonlinear": error - linear,
        "sae_plus_nonlinear": x_hat + error - linear,
    }
    for name in NORM_TARGETS:
        squared_norm = vectors[name].square().sum(1, keepdim=True)
        assert found.r2_norm[name] == pytest.approx(r2(squared_norm).item(), rel=1e-7), name
        assert found.mean_squared_norm[name] == pytest.approx(squared_norm[test].mean().item(), rel=1e-9), name
    assert (found.n_train, found.n_test) == (1800, 1200)


def test_many_saes_in_one_pass_equal_one_at_a_time():
    x, x_hat = _planted(n=2000)
    stored = {"good": x_hat, "poor": 0.5 * x_hat}
    train = torch.arange(2000) < 1200
    batches = [TokenBatch(x[i : i + 450], train[i : i + 450], i) for i in range(0, 2000, 450)]

    def read(tensor):
        def own(batch):
            rows = slice(batch.start, batch.start + len(batch.x))
            return Encoded(tensor[rows], torch.zeros(len(batch.x)), acts=None)

        return own

    together = decompose_stream(batches, {name: read(tensor) for name, tensor in stored.items()})
    for name, tensor in stored.items():
        alone = dm.decompose(x, tensor, train=train)
        for key, value in alone.numbers().items():
            if key != "l0":
                assert together[name].numbers()[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


def test_a_perfect_reconstruction_is_not_an_error():
    x, _ = _planted(n=500)
    found = dm.decompose(x, x)
    assert found.fvu == 0
    assert found.fvu_nonlinear == 0
    assert found.linear_share != found.linear_share  # 0 / 0 is shown as not a number


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: dm.decompose(x[0], x[0]), ValueError, "x: must be a tensor of shape [n, d], got [12]"),
        (lambda x: dm.decompose(x, x[:, :-1]), ValueError, "x_hat: must have the shape of x [500, 12], got [500, 11]"),
        (lambda x: dm.decompose(x, x[:-1]), ValueError, "x_hat: must have the shape of x [500, 12], got [499, 12]"),
        (lambda x: dm.decompose(x, "sae"), TypeError, "sae: must be a tensor Sae(x) or an SAE"),
        (lambda x: dm.decompose(x, x, train=torch.ones(3).bool()), ValueError, "train: must be bool of shape [500]"),
        (lambda x: dm.decompose(x, x / 0), ValueError, "must be finite"),
        (lambda x: decompose_stream([], {"a": lambda b: b}), ValueError, "x: must hold at least one token"),
        (lambda x: decompose_stream([], {}), ValueError, "saes: must name at least one SAE"),
    ],
)
def test_bad_input_is_named_in_one_line(call, error, message):
    x, _ = _planted(n=500)
    with pytest.raises(error) as caught:
        call(x)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
