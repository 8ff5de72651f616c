"""On a real GPU: every op against the CPU (equal to the bit) and the twins; streams, graphs, compile, memory.

Run by `make gpu-test`. Needs torch, numpy, pytest and nothing else. Without a CUDA device every test is skipped.
"""

import pytest
import torch
from cases.encoders import SCREENED_DTYPES, WORST, check_encoders, gaussian, same, worst
from cases.ops import DTYPES, N_PACKED, ON_CUDA, TOLERANCE, if_torch_tells_why

import darkmatter_ext as dm
from darkmatter_ext.ops import _library, pursuit_cuda, reference
from darkmatter_ext.ops.decode import decoder_outer, to_dense
from darkmatter_ext.ops.encode import screen_intervals

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


def on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def gpu_arguments(case, dtype):
    """The arguments of a case on the GPU; packed weights are packed there."""
    arguments = [on_gpu(value) for value in case.make(dtype)]
    if case.name == "packed":
        arguments[-N_PACKED:] = torch.ops.darkmatter.prepare_encoder(*arguments[1:4])
    return arguments


CASES_HERE = [case for case in ON_CUDA if case.op != "screen_intervals"]
each_case = pytest.mark.parametrize("case", CASES_HERE, ids=[case.id for case in CASES_HERE])


def test_the_kernels_are_in():
    assert _library.CUDA_LOADED, "torch has CUDA, but the package was built without (DARKMATTER_CUDA=1 pip install ...)"
    assert {case.op for case in ON_CUDA} | {"pursuit_choose", "pursuit_step", "screen_intervals"} <= set(
        _library.cuda_ops()
    )


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_case_equals_the_cpu(case, dtype):
    mine, on_cpu = case.call()(*gpu_arguments(case, dtype)), case.call()(*case.make(dtype))
    mine, on_cpu = (value if isinstance(value, tuple) else (value,) for value in (mine, on_cpu))
    if case.op == "prepare_encoder":
        mine, on_cpu = mine[:2], on_cpu[:2]  # codes are each backend's own
    if dtype == torch.float64:  # the last bit may depend on fused multiply-add
        for one, other in zip(mine, on_cpu, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-14, atol=1e-14)
    else:
        same(mine, on_cpu)


@each_case
def test_opcheck(case):
    arguments = gpu_arguments(case, torch.float32)
    for place in case.differentiable:
        arguments[place] = arguments[place].detach().clone().requires_grad_()
    torch.library.opcheck(case.call(), tuple(arguments))


DIFFERENTIABLE = [case for case in CASES_HERE if case.differentiable]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=[case.id for case in DIFFERENTIABLE])
def test_gradients(case):
    arguments = gpu_arguments(case, torch.float64)
    variables = tuple(arguments[place].detach().clone().requires_grad_() for place in case.differentiable)

    def function(*given):
        filled = list(arguments)
        for place, variable in zip(case.differentiable, given, strict=True):
            filled[place] = variable
        results = case.call()(*filled)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(result for result in results if result.is_floating_point())

    assert torch.autograd.gradcheck(function, variables, atol=1e-8, rtol=1e-6, nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(function, variables, atol=1e-8, rtol=1e-6, nondet_tol=1e-12)


@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("n", "d", "n_latents", "k"),
    [
        (9, 40, 1500, 5),
        (1, 70, 3001, 33),
        (17, 33, 1024, 128),
        (260, 128, 5000, 40),  # several tiles of tokens, the last of them and of latents cut short
        (400, 200, 9001, 64),
        (300, 768, 24576, 32),
        (64, 2304, 65536, 64),
        (300, 128, 8200, 1024),  # long lists
    ],
)
def test_encoders_equal_the_cpu(dtype, centred, n, d, n_latents, k):
    x, W_enc, b_enc, b_dec = gaussian(n, d, n_latents, dtype)
    b_dec = b_dec if centred else None
    check_encoders(torch.ops.darkmatter, x, W_enc, b_enc, b_dec, k=k, threshold=3.3 * d**0.5, device="cuda")


@pytest.mark.parametrize("name", WORST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_worst_cases(name, dtype):
    x, W_enc, b_enc, b_dec = worst(name, dtype)
    check_encoders(torch.ops.darkmatter, x, W_enc, b_enc, b_dec, k=20, threshold=5.0, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hundreds_of_tokens_that_screening_cannot_help(dtype):
    """All latents tie: 38 groups of tokens share the few slots for their scores. Others, and odd ones, among them."""
    x, W_enc, b_enc, b_dec = gaussian(320, 64, 70000, dtype)
    W_enc[:, 1:] = W_enc[:, :1]
    b_enc[:] = b_enc[0]
    W_enc[:, 7] *= 1.5
    x[5, 3], x[6, 0], x[7] = float("nan"), float("inf"), 0
    check_encoders(torch.ops.darkmatter, x, W_enc, b_enc, b_dec, k=64, threshold=12.0, device="cuda")


def test_choices_of_pursuit():
    """The atom of the largest product as float64 products say, some tokens resting; and among thousands of ties the lowest."""
    torch.manual_seed(1)
    dictionary, residual = torch.randn(30000, 200).cuda(), torch.randn(500, 200, dtype=torch.float64).cuda()
    l0 = torch.full((500,), 2).cuda()
    noise, done = 1e-12 * residual.norm(dim=1), (torch.arange(500) % 5 == 0).int().cuda()

    def chosen(atoms):
        prepared = dm.prepare_dictionary(atoms)
        packed = prepared.packed
        return torch.ops.darkmatter.pursuit_choose(
            residual, prepared.rows, packed.codes, packed.bounds, noise, l0, 1, done
        )

    for atoms in (dictionary, dictionary.double()):
        expected = (residual @ atoms.double().mT).argmax(1).masked_fill(done != 0, -1)
        assert torch.equal(chosen(atoms), expected)
    copies = dictionary[:3].repeat(5000, 1)
    expected = (residual @ dictionary[:3].double().mT).argmax(1).masked_fill(done != 0, -1)
    assert torch.equal(chosen(copies), expected)


def test_several_tiles_of_tokens_and_the_float64_oracle():
    """More tokens than a tile (4096), compared with the dense float64 twin on the GPU."""
    x, W_enc, b_enc, b_dec = (part.cuda() for part in gaussian(5000, 256, 4096))
    acts = dm.topk_encode(x, W_enc, b_enc, 32, b_dec=b_dec)
    twin = reference.topk_encode(x, W_enc, b_enc, 32, b_dec=b_dec)
    assert torch.equal(acts.indices, twin.indices)
    torch.testing.assert_close(acts.values, twin.values, rtol=TOLERANCE[torch.float32], atol=1e-12)
    above = dm.threshold_encode(x, W_enc, b_enc, 40.0, b_dec=b_dec)
    twin = reference.threshold_encode(x, W_enc, b_enc, 40.0, b_dec=b_dec)
    assert torch.equal(above.col_indices, twin.col_indices)
    assert torch.equal(above.crow_indices, twin.crow_indices)


def test_intervals_hold_every_pre_activation():
    for seed, scale in enumerate((1.0, 1e-3, 1e4)):
        x, W_enc, b_enc, b_dec = (part.cuda() for part in gaussian(1000, 1024, 8192, seed=seed))
        found = screen_intervals(x * scale, W_enc, b_enc, b_dec=b_dec)
        h = (x * scale).double().sub(b_dec.double()) @ W_enc.double() + b_enc.double()
        assert found.screened.all()
        assert ((found.lower <= h) & (h <= found.upper)).all()


def test_nothing_waits_for_the_device():
    x, W_enc, b_enc, b_dec = (part.cuda() for part in gaussian(300, 256, 4096))
    W_dec, prepared = W_enc.mT.contiguous(), dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec)
    dm.topk_encode(x, W_enc, b_enc, 8, b_dec=b_dec, prepared=prepared)
    torch.cuda.set_sync_debug_mode("error")
    try:
        acts = dm.topk_encode(x, W_enc, b_enc, 8, b_dec=b_dec, prepared=prepared)
        dm.sparse_decode(acts, W_dec, b_dec)
        decoder_outer(acts, x)
        acts = dm.threshold_encode(x, W_enc, b_enc, 40.0, b_dec=b_dec, prepared=prepared, capacity=200)
        dm.find_support(acts.to_dense(), capacity=200)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_current_stream():
    """The op runs on the caller's stream: what a slow producer writes there is seen."""
    x, W_enc, b_enc, _ = (part.cuda() for part in gaussian(64, 256, 4096))
    expected = dm.topk_encode(x, W_enc, b_enc, 8)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        acts = dm.topk_encode(late, W_enc, b_enc, 8)
        x_hat = dm.sparse_decode(acts, W_enc.mT.contiguous())
    stream.synchronize()
    assert torch.equal(acts.indices, expected.indices)
    assert torch.equal(x_hat, dm.sparse_decode(expected, W_enc.mT.contiguous()))


def replays(static, run, inputs):
    """`run`, which reads `static`, captured in a graph: its replays on other inputs give what the call gives."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for each in inputs:
        static.copy_(each)
        graph.replay()
        same(out, run())


def inputs_of_graphs(dtype=torch.float32):
    """Tokens [64, 256] twice, and once with tokens that screening cannot help."""
    odd = gaussian(64, 256, 4096, dtype)[0]
    odd[5, 3], odd[6, 0], odd[7] = float("nan"), float("inf"), 0
    return [*(gaussian(64, 256, 4096, dtype, seed=seed)[0] for seed in (1, 2)), odd]


def test_cuda_graph():
    x, W_enc, b_enc, b_dec = (part.cuda() for part in gaussian(64, 256, 4096))
    W_dec, prepared = W_enc.mT.contiguous(), dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec)
    static = x.clone()

    def run():
        return dm.sparse_decode(dm.topk_encode(static, W_enc, b_enc, 8, b_dec=b_dec, prepared=prepared), W_dec, b_dec)

    replays(static, run, inputs_of_graphs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("of_each", [False, True])
def test_threshold_with_a_capacity_in_a_cuda_graph(dtype, of_each):
    """With a threshold for all latents and for each; some tokens overflow, which the replay tells as the call does."""
    x, W_enc, b_enc, b_dec = (part.cuda() for part in gaussian(64, 256, 4096, dtype))
    W_dec, prepared = W_enc.mT.contiguous(), dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec)
    threshold = (torch.rand(4096) * 20 + 30).to(dtype).cuda() if of_each else 40.0
    static = x.clone()

    def run():
        acts = dm.threshold_encode(static, W_enc, b_enc, threshold, b_dec=b_dec, prepared=prepared, capacity=200)
        return acts.values, acts.indices, acts.found, acts.overflowed, dm.sparse_decode(acts, W_dec, b_dec)

    replays(static, run, inputs_of_graphs(dtype))
    *_, overflowed, _ = run()
    assert 0 < overflowed.sum() < 64
    ragged = dm.threshold_encode(static, W_enc, b_enc, threshold, b_dec=b_dec, prepared=prepared)
    assert torch.equal(run()[2], ragged.crow_indices.diff())


def test_support_with_a_capacity_in_a_cuda_graph():
    static = torch.zeros(64, 4097).cuda()

    def run():
        acts = dm.find_support(static, capacity=60)
        return acts.values, acts.indices, acts.found, acts.overflowed

    inputs = [torch.randn(64, 4097).sub(shift).relu() for shift in (2.0, 2.3, 4.0)]
    replays(static, run, inputs)
    for dense in inputs:
        found = dm.find_support(dense.cuda(), capacity=60)
        expected = dm.find_support(dense, capacity=60)
        same((found.values, found.indices, found.found), (expected.values, expected.indices, expected.found))


def test_torch_compile():
    x, W_enc, b_enc, b_dec = (part.cuda() for part in gaussian(64, 256, 4096))
    W_dec = W_enc.mT.contiguous()

    def reconstruct(x):
        return dm.sparse_decode(dm.topk_encode(x * 2, W_enc, b_enc, 8), W_dec, b_dec) + 1

    assert torch.equal(torch.compile(reconstruct, fullgraph=True)(x), reconstruct(x))


def test_gradients_are_deterministic():
    x, W_enc, b_enc, b_dec = (part.cuda().requires_grad_() for part in gaussian(500, 128, 2048))
    W_dec = W_enc.detach().mT.contiguous().requires_grad_()
    runs = []
    for _ in range(3):
        x_hat = dm.sparse_decode(dm.topk_encode(x, W_enc, b_enc, 16, b_dec=b_dec), W_dec, b_dec)
        runs.append(torch.autograd.grad((x_hat - x).square().sum(), (x, W_enc, b_enc, b_dec, W_dec)))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_memory_of_an_encode():
    """Nothing of size N F: far below the dense pre-activations."""
    x, W_enc, b_enc, _ = (part.cuda() for part in gaussian(4096, 256, 65536))
    prepared = dm.prepare_encoder(W_enc, b_enc)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dm.topk_encode(x, W_enc, b_enc, 64, prepared=prepared)
    assert torch.cuda.max_memory_allocated() - before < 0.2 * 4 * 4096 * 65536


@if_torch_tells_why
def test_a_lack_of_memory_is_the_error_that_torch_has_for_it():
    values, indices = torch.ones(1 << 14, 1, device="cuda"), torch.zeros(1 << 14, 1, dtype=torch.int64, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        to_dense(dm.SparseActs.fixed(values, indices, 1 << 30))  # 64 TiB


@pytest.mark.parametrize("keep_chosen", [False, True])
def test_gradient_pursuit(keep_chosen):
    torch.manual_seed(0)
    x, dictionary = torch.randn(40, 64), torch.randn(3000, 64)
    l0 = torch.randint(0, 14, (40,))
    found = dm.pursuit(x.cuda(), dictionary.cuda(), l0.cuda(), keep_chosen=keep_chosen).to_dense().cpu()
    expected = reference.pursuit(x, dictionary, l0, keep_chosen=keep_chosen).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["matching", "orthogonal"])
def test_other_pursuits(method):
    torch.manual_seed(0)
    x, dictionary = torch.randn(20, 64), torch.nn.functional.normalize(torch.randn(3000, 64), dim=1)
    found = dm.pursuit(x.cuda(), dictionary.cuda(), 6, method=method).to_dense().cpu()
    expected = reference.pursuit(x, dictionary, 6, method=method).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_pursuit_in_a_graph_equals_pursuit_step_by_step(monkeypatch):
    torch.manual_seed(0)
    x, dictionary = torch.randn(100, 64).cuda(), torch.randn(3000, 64).cuda()
    plain = dm.pursuit(x, dictionary, 8).to_dense()
    monkeypatch.setattr("darkmatter_ext.ops.pursuit.CUDA_CHUNK_TOKENS", 24)
    recorded = []
    original = pursuit_cuda._recorded
    monkeypatch.setattr(pursuit_cuda, "_recorded", lambda *args: recorded.append(1) or original(*args))
    assert torch.equal(dm.pursuit(x, dictionary, 8).to_dense(), plain)
    assert recorded, "four chunks of one shape are run as a graph"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated"])
def test_drop_in(architecture, dtype, monkeypatch):
    pytest.importorskip("sae_lens", reason="sae_lens is not installed")
    from cases import saes

    from darkmatter_ext.saes import stepping_aside

    monkeypatch.setattr(saes, "D_SAE", 4096)
    for name in ("SMALL_DECODE_ON_GPU", "SMALL_ENCODE_ON_GPU", "SMALL_FORWARD_ON_GPU"):
        monkeypatch.setattr(stepping_aside, name, stepping_aside.OnGpu(0, 0, 0))
    plain, fast = (saes.make_sae(architecture, dtype).cuda() for _ in range(2))
    dm.accelerate(fast)
    x = torch.randn(50, saes.D_IN).to(dtype).cuda()
    exact = saes.make_sae(architecture, torch.float64).cuda()
    exact.load_state_dict({name: value.double() for name, value in plain.state_dict().items()})
    for edited in (False, True):
        expected = exact.encode(x.double())
        torch.testing.assert_close(fast.encode(x).double(), expected, rtol=1e-2, atol=saes.TOLERANCE[dtype] * 4)
        torch.testing.assert_close(fast(x).double(), exact(x.double()), rtol=2e-2, atol=saes.TOLERANCE[dtype] * 20)
        assert bool(dm.stats(fast).fast.get("encode")) == (dtype != torch.float64), str(dm.stats(fast))
        for sae in (fast, exact) if not edited else ():
            sae.W_enc.data[:, 7] *= 3  # torch counts no such edit
