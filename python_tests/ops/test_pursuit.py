"""Pursuit against its dense float64 twin on friendly and adversarial dictionaries, hand-computed steps, stops and errors."""

import math

import pytest
import torch
from cases.pursuit import DICTIONARIES, correlated, duplicates, made_of, targets, tied, unit, zero_atoms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import darkmatter_ext as dm
from darkmatter_ext.ops import pursuit, pursuit_choice, pursuit_steps, reference
from darkmatter_ext.saes.encoders import as_encoder, pursuit_encoder, refit_encoder

VARIANTS = {
    "gradient": {},
    "gradient-keep": {"method": "gradient", "keep_chosen": True},
    "matching": {"method": "matching"},
    "matching-stop": {"method": "matching", "stop_on_duplicate": True},
    "orthogonal": {"method": "orthogonal"},
    "orthogonal-nonnegative": {"method": "orthogonal", "nonnegative": True},
}
SIXTEEN_BITS = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16)]
# A large dictionary is read by screened products; a small one has a Gram form, in gradient pursuit alone.
FORMS = [(name, form) for name in VARIANTS for form in ("products", "gram") if form == "products" or "gradient" in name]
each_variant = pytest.mark.parametrize(
    ("options", "form"),
    [(VARIANTS[name], form) for name, form in FORMS],
    ids=[f"{name}-{form}" for name, form in FORMS],
    indirect=["form"],
)


def assert_same_support(acts, twin):
    """The same atoms for every token, and the weights up to their rounding."""
    found = acts.to_dense()
    assert torch.equal(found != 0, twin != 0)
    torch.testing.assert_close(found, twin.to(found.dtype), rtol=1e-6, atol=1e-6)


def assert_the_path_of_the_twin(x, D, steps, options):
    """Own l0 of each token, and the same support after every step as `reference.pursuit_path`."""
    paths = [[w.clone() for w in reference.pursuit_path(row.double(), D.double(), steps, **options)] for row in x]
    for l0 in range(1, steps + 1):
        own = torch.arange(len(x)) % 2 * (steps - l0) + l0  # every other token goes on to the end
        twin = torch.stack([path[min(len(path), int(n)) - 1] for path, n in zip(paths, own, strict=True)])
        assert_same_support(dm.pursuit(x, D, own, **options), twin)


@pytest.fixture(params=["products", "gram"], autouse=True)
def form(request, monkeypatch):
    """Every test with the screened products of a large dictionary, and with the Gram form of a small one."""
    if request.param == "products":
        monkeypatch.setattr(pursuit_steps, "GRAM_ATOMS", 0)
    return request.param


@each_variant
@pytest.mark.parametrize("make", DICTIONARIES, ids=lambda make: make.__name__.strip("_"))
@pytest.mark.parametrize(("n_atoms", "d"), [(40, 8), pytest.param(300, 40, marks=pytest.mark.runs)])
def test_every_step_is_that_of_the_twin(options, make, n_atoms, d):
    D = make(n_atoms, d)
    x = targets(12, d)
    if make is zero_atoms:
        x[1] = D[1] * 3  # one atom and converged
    before = x.clone(), D.clone()
    for l0 in (0, 1, 2, 3, 5, 8):
        ours = dm.pursuit(x, D, l0, **options)
        assert torch.equal(x, before[0])
        assert torch.equal(D, before[1])
        twin = reference.pursuit(x, D, l0, **options)
        torch.testing.assert_close(
            ours.to_dense(), twin, rtol=1e-7, atol=1e-9, msg=lambda m, step=l0: f"step {step}: {m}"
        )
        assert bool((ours.l0() <= l0).all())


@each_variant
def test_as_many_steps_as_atoms(options):
    D, x = unit(12, 6), targets(5, 6)
    ours = dm.pursuit(x, D, 12, **options)
    torch.testing.assert_close(ours.to_dense(), reference.pursuit(x, D, 12, **options), rtol=1e-6, atol=1e-7)


@pytest.mark.runs
@each_variant
@pytest.mark.parametrize("make", DICTIONARIES, ids=lambda make: make.__name__.strip("_"))
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
def test_every_step_has_the_support_of_the_twin_in_lower_precision(options, make, dtype):
    D = make(300, 40).to(dtype)
    x = torch.cat([targets(6, 40), made_of(make(300, 40), 6)]).to(dtype)
    assert_the_path_of_the_twin(x, D, 8, options)


@pytest.mark.slow
@each_variant
@pytest.mark.parametrize("make", [unit, correlated], ids=["random", "correlated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_thousand_rows_have_the_supports_of_the_twin(options, make, dtype, form):
    """A cosine of about 0.8 between atoms; targets of noise, of a few atoms, and of many."""
    D, n = make(1100, 64).to(dtype) if form == "products" else make(300, 64).to(dtype), 2000
    parts = targets(n // 2, 64), made_of(D.double(), n // 4), made_of(D.double(), n // 4, active=40)
    x = torch.cat(parts).to(dtype)
    assert_the_path_of_the_twin(x, D, 12, options)
    assert_the_path_of_the_twin(
        x[::8], D, 12, options | {"residual_threshold": float(x.double().norm(dim=1).median()) / 2}
    )


@each_variant
def test_dtypes_are_not_mixed_by_rounding(options):
    """x and bias finer than the dictionary: the difference is not rounded to float32 on the way in."""
    D, bias = correlated(300, 40).float(), torch.linspace(-300, 300, 40, dtype=torch.float64)
    x = made_of(correlated(300, 40), 12) + bias
    ours = dm.pursuit(x, D, 8, bias=bias, residual_threshold=0.1, **options)
    assert_same_support(ours, reference.pursuit(x, D, 8, bias=bias, residual_threshold=0.1, **options))


@each_variant
def test_own_l0_shapes_bias_and_chunks(options, monkeypatch):
    D, bias = unit(300, 40), torch.linspace(-1, 1, 40, dtype=torch.float64)
    x = targets(30, 40).reshape(2, 15, 40)
    l0 = torch.arange(30).reshape(2, 15) % 7
    whole = dm.pursuit(x, D, l0, bias=bias, **options)
    assert whole.shape == (2, 15, 300)
    twin = reference.pursuit(x, D, l0, bias=bias, **options)
    torch.testing.assert_close(whole.to_dense(), twin, rtol=1e-6, atol=1e-8)
    monkeypatch.setattr(pursuit, "CHUNK_TOKENS", 4)
    finished = []
    parts = dm.pursuit(x, dm.prepare_dictionary(D), l0, bias=bias, progress=finished.append, **options)
    assert finished == [4] * 7 + [2]
    assert torch.equal(whole.col_indices, parts.col_indices)
    torch.testing.assert_close(whole.values, parts.values)
    assert dm.pursuit(x[:0], D, 3, **options).shape == (0, 15, 300)
    assert dm.pursuit(x[0, 0], D, 3, **options).shape == (300,)


@each_variant
def test_stop_by_residual(options):
    D, x = unit(300, 40), targets(20, 40)
    threshold = float(x.norm(dim=1).median()) * 0.8
    ours = dm.pursuit(x, D, 30, residual_threshold=threshold, **options)
    twin = reference.pursuit(x, D, 30, residual_threshold=threshold, **options)
    torch.testing.assert_close(ours.to_dense(), twin, rtol=1e-6, atol=1e-7)
    free = dm.pursuit(x, D, 30, **options)
    assert int(ours.l0().sum()) < int(free.l0().sum())


# The choice of an atom


def near_ties(n_atoms, d, near, apart, dtype, seed=0):
    """Atoms [F, d] of dtype and residuals [n, d] float64 with `near` products within about `apart` of the largest."""
    D = unit(n_atoms, d, seed).to(dtype)
    g = torch.Generator().manual_seed(seed + 1)
    residuals = []
    for _ in range(20):
        atoms = D[torch.randperm(n_atoms, generator=g)[:near]].double()
        wanted = 1 + apart * torch.rand(near, generator=g, dtype=torch.float64)
        residuals.append(torch.linalg.lstsq(atoms, wanted[:, None], driver="gelsd").solution[:, 0])  # least norm
    return D, torch.stack(residuals)


@pytest.mark.parametrize("either_sign", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-42, 1e37, -1.0])
@pytest.mark.parametrize(("near", "apart"), [(2, 1e-3), (2, 1e-9), (40, 1e-8), (90, 1e-9), (90, 1e-16)])
def test_the_choice_is_that_of_all_float64_products(near, apart, scale, either_sign):
    D, residual = near_ties(400, 128, near, apart, torch.float32)
    residual = residual * scale
    dictionary = dm.prepare_dictionary(D)
    noise = pursuit_choice.noise_of(residual, dictionary)
    found = pursuit_choice.best_atoms(residual, noise, dictionary, either_sign=either_sign)
    every = residual @ D.double().mT
    expected = pursuit_choice.lowest_of_the_best(every.abs() if either_sign else every, noise)
    assert torch.equal(found, expected)
    if (near, apart, scale, either_sign) == (2, 1e-9, 1.0, False):  # ranks of rounded residuals would not do
        ranked = dm.topk_encode(residual.float(), D.mT, dictionary.no_bias, 1).indices[:, 0]
        assert not torch.equal(ranked, expected)


def test_a_dictionary_whose_steps_diverge_ends():
    """Matching pursuit over long atoms doubles the residual and more in every step, beyond float32."""
    D, x = unit(300, 40).float() * 100, targets(5, 40).float()
    weights = dm.pursuit(x.double(), D.double(), 60, method="matching").values
    assert weights.abs().max() > 1e100
    dm.pursuit(x, D, 120, method="matching")


# By hand


def test_a_clamped_atom_leaves_the_support():
    # D = e1, e2 and (e1 + e2) slightly longer; x = (1, 0.2). Step 1: products 1, 0.2, 1.2 choose atom 2, the line search
    # gives 0.6: r = (0.4, -0.4). Step 2: products 0.4, -0.4, 0: atom 0 joins, gradient (0.4 at 0, 0 at 2).
    D = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.2]], dtype=torch.float64)
    assert torch.allclose(dm.pursuit(x, D, 1).to_dense(), torch.tensor([[0.0, 0.0, 0.6]], dtype=torch.float64))
    assert torch.allclose(dm.pursuit(x, D, 2).to_dense(), torch.tensor([[0.4, 0.0, 0.6]], dtype=torch.float64))
    # A negative largest product: D = -e1, x = e1. g = -1, c = e1, step = 1, w = max(0, -1) = 0: clamped at once.
    negative = torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
    clamped = dm.pursuit(torch.tensor([[1.0, 0.0]], dtype=torch.float64), negative, 1)
    assert clamped.values.numel() == 0


def test_an_atom_chosen_again_makes_a_pure_gradient_step():
    # atoms e1 and (e1 + e2)/sqrt(2), x = (1, 1): step 1 takes atom 1 with sqrt(2) and r is 0; a second step is 0 / 0.
    D = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    D[1] /= math.sqrt(2)
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    once, twice = dm.pursuit(x, D, 1), dm.pursuit(x, D, 2)
    torch.testing.assert_close(once.to_dense(), torch.tensor([[0.0, math.sqrt(2)]], dtype=torch.float64))
    torch.testing.assert_close(twice.to_dense(), once.to_dense())
    # atoms (2, 0) and (1, 1), x = (1, 0.9): products 2, 1.9 choose atom 0: w0 = 0.5, r = (0, 0.9). Products 0, 0.9: atom 1,
    # gradient (0, 0.9): w1 = 0.45, r = (-0.45, 0.45). Products -0.9, 0: atom 1 again, gradient (-0.9, 0), c = (-1.8, 0),
    # step = 0.81 / 3.24 = 0.25, w0 = 0.5 - 0.225 = 0.275.
    D = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    third = dm.pursuit(torch.tensor([[1.0, 0.9]], dtype=torch.float64), D, torch.tensor([2])).to_dense()
    torch.testing.assert_close(third, torch.tensor([[0.5, 0.45]], dtype=torch.float64))


def test_matching_adds_to_an_atom_chosen_again():
    # unit atoms e1, (0.8, 0.6); x = (1, 0.6). Products 1, 1.16: w1 = 1.16, r = (0.072, -0.096): products 0.072, 0:
    # w0 = 0.072, r = (0, -0.096).
    D = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.6]], dtype=torch.float64)
    found = dm.pursuit(x, D, 2, method="matching").to_dense()
    torch.testing.assert_close(found, torch.tensor([[0.072, 1.16]], dtype=torch.float64))


def test_orthogonal_refits():
    D = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.6]], dtype=torch.float64)
    found = dm.pursuit(x, D, 2, method="orthogonal").to_dense()
    torch.testing.assert_close(found, torch.tensor([[0.2, 1.0]], dtype=torch.float64))  # x = 0.2 e1 + 1 (0.8, 0.6)
    negative = dm.pursuit(-x, D, 2, method="orthogonal").to_dense()
    torch.testing.assert_close(negative, -found)
    assert dm.pursuit(-x, D, 2, method="orthogonal", nonnegative=True).values.numel() == 0


# Properties


@pytest.mark.runs
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])  # the fixture is a constant
@given(
    st.integers(0, 10_000),
    st.sampled_from(["matching", "orthogonal", "nonnegative"]),
    st.sampled_from([unit, duplicates, tied, correlated]),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_the_residual_never_grows(seed, method, make, dtype):
    D = make(48, 10).to(dtype)
    x = targets(6, 10, seed=seed).to(dtype)
    options = {"method": "orthogonal", "nonnegative": True} if method == "nonnegative" else {"method": method}
    last = x.double().norm(dim=1)
    for l0 in range(1, 14):
        norm = (x.double() - dm.pursuit(x, D, l0, **options).to_dense().double() @ D.double()).norm(dim=1)
        assert bool((norm <= last + (1e-6 if dtype == torch.float32 else 1e-12)).all())
        last = norm


def test_orthogonal_agrees_with_sklearn():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn, the oracle, is not installed")
    D, x = unit(60, 24), targets(10, 24)[1:]
    theirs = torch.from_numpy(linear_model.orthogonal_mp(D.mT.numpy(), x.mT.numpy(), n_nonzero_coefs=6)).mT
    torch.testing.assert_close(dm.pursuit(x, D, 6, method="orthogonal").to_dense(), theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{}, {"stop_on_duplicate_support": False}, {"max_iterations": 5}, {"residual_threshold": 2.0}]
)
def test_matching_agrees_with_saelens(options):
    from sae_lens.saes.matching_pursuit_sae import _encode_matching_pursuit

    D, x = unit(300, 40), targets(20, 40)
    full = {"residual_threshold": 1e-2, "max_iterations": 30, "stop_on_duplicate_support": True} | options
    theirs = _encode_matching_pursuit(x, D, **full)
    ours = dm.pursuit(
        x,
        D,
        full["max_iterations"],
        method="matching",
        residual_threshold=full["residual_threshold"],
        stop_on_duplicate=full["stop_on_duplicate_support"],
    )
    torch.testing.assert_close(ours.to_dense(), theirs, rtol=1e-9, atol=1e-12)


# Refit


def test_refit_is_non_negative_least_squares_on_the_support():
    from scipy.optimize import nnls

    D, x, bias = unit(300, 40), targets(30, 40), torch.linspace(-0.5, 0.5, 40, dtype=torch.float64)
    acts = dm.topk_encode(x, D.mT.contiguous(), torch.zeros(300, dtype=torch.float64), 12)
    found = pursuit.refit(x, acts, D, bias=bias).to_dense()
    for token in range(30):
        support = acts.to_dense()[token].nonzero()[:, 0]
        if len(support) == 0:  # scipy 1.17.1 frees memory that is not its own for a matrix without columns
            assert not found[token].any()
            continue
        best, _ = nnls(D[support].mT.numpy(), (x[token] - bias).numpy())
        expected = torch.zeros(300, dtype=torch.float64).index_put((support,), torch.from_numpy(best))
        torch.testing.assert_close(found[token], expected, rtol=1e-7, atol=1e-9)
    assert pursuit.refit(x[:0], dm.find_support(acts.to_dense()[:0]), D).shape == (0, 300)
    with pytest.raises(ValueError, match=r"^acts: must have shape \[3, 300\]"):
        pursuit.refit(x[:3], acts, D)


# Errors

X, DICTIONARY = torch.ones(3, 4), torch.eye(4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, DICTIONARY, 5), {}, ValueError, "l0: must be from 0 to 4"),
        ((X, DICTIONARY, -1), {}, ValueError, "l0: must be from 0 to 4"),
        ((X, DICTIONARY, 1.5), {}, TypeError, "l0: must be an int"),
        ((X, DICTIONARY, True), {}, TypeError, "l0: must be an int"),
        ((X, DICTIONARY, torch.ones(2, dtype=torch.int64)), {}, ValueError, r"l0: must have the tokens' shape \[3\]"),
        ((X[:, :3], DICTIONARY, 1), {}, ValueError, r"x: must have shape \[..., 4\]"),
        ((X.int(), DICTIONARY, 1), {}, TypeError, "x: must be a floating-point tensor"),
        ((X * math.nan, DICTIONARY, 1), {}, ValueError, "x: must be finite"),
        ((X, DICTIONARY * math.inf, 1), {}, ValueError, "dictionary: must be finite"),
        ((X, DICTIONARY[0], 1), {}, ValueError, r"dictionary: must have shape \[F, d\]"),
        ((X, DICTIONARY[:0], 0), {}, ValueError, r"dictionary: must have shape \[F, d\]"),
        ((X, [[1.0]], 1), {}, TypeError, "dictionary: must be a dense floating-point tensor"),
        ((X, DICTIONARY, 1), {"bias": torch.ones(3)}, ValueError, r"bias: must have shape \[4\]"),
        ((X, DICTIONARY, 1), {"method": "omp"}, ValueError, "method: must be one of gradient, matching, orthogonal"),
        ((X, DICTIONARY, 1), {"nonnegative": True}, ValueError, "nonnegative: must be False unless"),
        ((X, DICTIONARY, 1), {"residual_threshold": -1.0}, ValueError, "residual_threshold: must be at least 0"),
        ((X.clone().requires_grad_(), DICTIONARY, 1), {}, ValueError, "x: must not require a gradient"),
        ((X, DICTIONARY.clone().requires_grad_(), 1), {}, ValueError, "dictionary: must not require a gradient"),
        ((X.to("meta"), DICTIONARY, 1), {}, ValueError, "x: must be on cpu as the dictionary, got meta"),
    ],
)
def test_errors_are_one_line(arguments, options, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        dm.pursuit(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_a_16_bit_sae_is_pursued_in_float32():
    """Its decoder is widened as the pursuit's is: Sae(x) by pursuit errs less than by its own poor encoder."""
    from cases.models import small_sae

    sae = small_sae("topk", 16, 48, 0, bias=0.0).to(torch.bfloat16)
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    own, pursued, refitted = (make(sae)(x) for make in (as_encoder, pursuit_encoder, refit_encoder))
    assert pursued.x_hat.dtype == refitted.x_hat.dtype == torch.float32
    errors = [(x - found.x_hat).square().sum().item() for found in (own, pursued, refitted)]
    assert errors[1] < errors[0]
    assert errors[2] < errors[0]
    assert int(pursued.l0.max()) <= 4
