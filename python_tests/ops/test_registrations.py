"""What torch asks of every op: opcheck (schema, fakes, autograd registration, compile) and gradients, from one list."""

import pytest
import torch
from cases.ops import CASES, D, K, N, encoder, registered_ops
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import darkmatter_ext as dm
from darkmatter_ext.ops import reference


def each_case(condition=lambda case: True):
    chosen = [case for case in CASES if condition(case)]
    return pytest.mark.parametrize("case", chosen, ids=[case.id for case in chosen])


def with_gradients(case, dtype=torch.float64):
    arguments = list(case.make(dtype))
    for place in case.differentiable:
        arguments[place] = arguments[place].detach().clone().requires_grad_()
    return arguments


def outputs_of(case):
    """The op with its integer outputs left out, as a function of its differentiable arguments."""
    arguments = with_gradients(case)

    def function(*variables):
        filled = list(arguments)
        for place, variable in zip(case.differentiable, variables, strict=True):
            filled[place] = variable
        results = case.call()(*filled)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(result for result in results if result.is_floating_point())

    return function, tuple(arguments[place] for place in case.differentiable)


def test_every_op_has_a_case():
    assert {case.op for case in CASES} == registered_ops()


@pytest.mark.runs
@each_case()
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def test_opcheck(case, dtype):
    torch.library.opcheck(case.call(), tuple(with_gradients(case, dtype)))


@pytest.mark.runs
@each_case(lambda case: case.differentiable)
def test_gradients(case):
    function, variables = outputs_of(case)
    assert torch.autograd.gradcheck(function, variables, atol=1e-8, rtol=1e-6)


@pytest.mark.slow
@each_case(lambda case: case.differentiable)
def test_second_gradients(case):
    function, variables = outputs_of(case)
    assert torch.autograd.gradgradcheck(function, variables, atol=1e-8, rtol=1e-6)


@each_case()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_give_the_same_shapes(case, dtype):
    """16-bit input runs, and gives outputs of the shapes and kinds of float32 (their values: test_ops_properties)."""
    results, like = case.call()(*case.make(dtype)), case.call()(*case.make(torch.float32))
    results, like = (value if isinstance(value, tuple) else (value,) for value in (results, like))
    for result, other in zip(results, like, strict=True):
        assert result.is_floating_point() == other.is_floating_point()
        if "threshold_encode" not in case.op:  # a rounded pre-activation may cross the threshold
            assert result.shape == other.shape


def public_arguments(requires_grad=True, seed=0):
    torch.manual_seed(seed)
    arguments = torch.randn(2, 4, 6), torch.randn(6, 20), torch.randn(20), torch.randn(6), torch.randn(20, 6)
    return [argument.double().requires_grad_(requires_grad) for argument in arguments]


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("kind", ["topk", "threshold"])
def test_gradients_of_the_public_functions_equal_the_twins(kind, prepared):
    """Through encode and decode; a prepared encoder does not cut W_enc, b_enc, b_dec off."""

    def loss(module, x, W_enc, b_enc, b_dec, W_dec):
        extra = {"prepared": dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec)} if prepared and module is dm else {}
        if kind == "topk":
            acts = module.topk_encode(x, W_enc, b_enc, 5, b_dec=b_dec, **extra)
        else:
            acts = module.threshold_encode(x, W_enc, b_enc, 0.4, b_dec=b_dec, **extra)
        return (module.sparse_decode(acts, W_dec, b_dec) - x).square().sum()

    ours, twins = public_arguments(), public_arguments()
    loss(dm, *ours).backward()
    loss(reference, *twins).backward()
    for mine, twin in zip(ours, twins, strict=True):
        torch.testing.assert_close(mine.grad, twin.grad, rtol=1e-10, atol=1e-10)


def test_no_gradient_through_latents_that_relu_stops():
    """k beyond the positive pre-activations: the zeros are selected, but carry nothing back."""
    x = torch.ones(1, 1, requires_grad=True)
    W_enc, b_enc = torch.tensor([[2.0, -3.0]]), torch.zeros(2)
    acts = dm.topk_encode(x, W_enc, b_enc, 2)
    assert acts.values.tolist() == [[2.0, 0.0]]
    acts.values.sum().backward()
    assert x.grad.tolist() == [[2.0]]


def test_threshold_gets_no_gradient():
    x, W_enc, b_enc, _, _ = public_arguments()
    threshold = torch.full((20,), 0.1, dtype=torch.float64, requires_grad=True)
    dm.threshold_encode(x, W_enc, b_enc, threshold).values.sum().backward()
    assert threshold.grad is None
    assert x.grad is not None


def test_vmap_over_tokens():
    x, W_enc, b_enc, b_dec, W_dec = public_arguments(requires_grad=False)

    def reconstruct(rows):
        return dm.sparse_decode(dm.topk_encode(rows, W_enc, b_enc, 5, b_dec=b_dec), W_dec, b_dec)

    assert torch.equal(torch.vmap(reconstruct)(x), reconstruct(x))
    assert torch.equal(torch.vmap(torch.vmap(reconstruct))(x), reconstruct(x))
    assert torch.equal(torch.vmap(reconstruct, in_dims=1, out_dims=1)(x), reconstruct(x))


def test_gradients_pass_vmap():
    """A batched tensor does not say whether what it stands for wants a gradient."""
    W_enc, b_enc, _ = encoder(torch.float64)

    def loss(x, over):
        x_hat = over(lambda rows: dm.sparse_decode(dm.topk_encode(rows, W_enc, b_enc, K), W_enc.mT))(x)
        return x_hat.square().sum()

    x = torch.randn(2, N, D, dtype=torch.float64, requires_grad=True)
    mapped, plain = (torch.autograd.grad(loss(x, over), x)[0] for over in (torch.vmap, lambda function: function))
    assert mapped.abs().max() > 0
    torch.testing.assert_close(mapped, plain, rtol=1e-13, atol=1e-13)


def test_a_call_without_gradient_is_still_seen_by_dispatch_modes():
    W_enc, b_enc, _ = encoder(torch.float32)
    x = torch.randn(N, D)
    with torch.no_grad():
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(tensor) for tensor in (x, W_enc, b_enc)]
        with mode:
            assert isinstance(dm.topk_encode(*fakes, K).values, FakeTensor)
        graph = make_fx(lambda rows: dm.topk_encode(rows, W_enc, b_enc, K).values)(x).graph
    assert torch.ops.darkmatter.topk_encode.default in [node.target for node in graph.nodes]


def test_vmap_of_ragged_acts_says_why_not():
    x, W_enc, b_enc, _, W_dec = public_arguments(requires_grad=False)
    with pytest.raises(RuntimeError, match=r"^threshold_encode: .*vmap"):
        torch.vmap(lambda rows: dm.threshold_encode(rows, W_enc, b_enc, 0.1).values)(x)
    with pytest.raises(RuntimeError, match=r"^topk_encode: vmap may batch x only"):
        torch.vmap(lambda weight: dm.topk_encode(x, weight, b_enc, 2).values)(torch.stack([W_enc, W_enc]))
    acts = dm.threshold_encode(x, W_enc, b_enc, 0.1)
    with pytest.raises(RuntimeError, match=r"^sparse_decode: vmap"):
        torch.vmap(lambda weight: dm.sparse_decode(acts, weight))(torch.stack([W_dec, W_dec]))


def test_gradients_through_vmap():
    plain, mapped = public_arguments(), public_arguments()
    for (x, W_enc, b_enc, b_dec, W_dec), through in (
        (plain, lambda f, x: f(x)),
        (mapped, lambda f, x: torch.vmap(f)(x)),
    ):

        def reconstruct(rows, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec, W_dec=W_dec):
            return dm.sparse_decode(dm.topk_encode(rows, W_enc, b_enc, 5, b_dec=b_dec), W_dec, b_dec)

        through(reconstruct, x).square().sum().backward()
    for one, other in zip(plain, mapped, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.runs
def test_compile_without_graph_breaks():
    x, W_enc, b_enc, b_dec, W_dec = public_arguments(requires_grad=False)

    def reconstruct(rows):
        return dm.sparse_decode(dm.topk_encode(rows, W_enc, b_enc, 5, b_dec=b_dec), W_dec, b_dec)

    compiled = torch.compile(reconstruct, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), reconstruct(x))
