"""The Python layer on CUDA tensors, on any machine: with torch's fake tensors, which have a device and a shape but no data.

They fail where tensors of two devices meet, and where the host would have to wait for a number from the device.
"""

import pytest
import torch
from cases.ops import ON_CUDA
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import darkmatter_ext as dm
from darkmatter_ext.ops import _library, pursuit_cuda
from darkmatter_ext.ops.decode import to_dense
from darkmatter_ext.ops.encode import PreparedEncoder
from darkmatter_ext.ops.pursuit_choice import PreparedDictionary
from darkmatter_ext.ops.pursuit_steps import Rules

N, D, F = 8, 40, 1500


@pytest.fixture
def on_cuda(monkeypatch):
    """A function that makes fake CUDA tensors; kernels count as loaded."""
    monkeypatch.setattr(_library, "CUDA_LOADED", True)
    with FakeTensorMode(shape_env=ShapeEnv()):
        yield lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="cuda")


def prepared_encoder(on_cuda):
    half, d_padded = torch.float16, 64
    parts = on_cuda(F, D), on_cuda(F, dtype=torch.float64), on_cuda(F, d_padded, dtype=half)
    none = on_cuda(0, dtype=torch.int32)
    return PreparedEncoder(*parts, none, on_cuda(5, F), none, None, has_b_dec=False)


def test_topk_and_decode_never_wait(on_cuda):
    x, W_enc, b_enc, W_dec = on_cuda(2, N, D), on_cuda(D, F), on_cuda(F), on_cuda(F, D)
    for prepared in (None, prepared_encoder(on_cuda)):
        acts = dm.topk_encode(x, W_enc, b_enc, 5, prepared=prepared)
        assert acts.values.device.type == acts.indices.device.type == "cuda"
        assert acts.values.shape == (2, N, 5)
        x_hat = dm.sparse_decode(acts, W_dec, on_cuda(D))
        assert (x_hat.device.type, x_hat.shape) == ("cuda", (2, N, D))
        assert to_dense(acts).device.type == "cuda"


def test_threshold_knows_its_devices(on_cuda):
    acts = dm.threshold_encode(on_cuda(N, D), on_cuda(D, F), on_cuda(F), on_cuda(F))
    assert acts.values.device.type == acts.crow_indices.device.type == "cuda"
    assert dm.sparse_decode(acts, on_cuda(F, D)).shape == (N, D)


def test_threshold_with_a_capacity_never_waits(on_cuda):
    x, W_enc, b_enc, W_dec = on_cuda(2, N, D), on_cuda(D, F), on_cuda(F), on_cuda(F, D)
    for prepared in (None, prepared_encoder(on_cuda)):
        acts = dm.threshold_encode(x, W_enc, b_enc, on_cuda(F), prepared=prepared, capacity=30)
        assert acts.values.shape == acts.indices.shape == (2, N, 30)
        assert acts.overflowed.device.type == "cuda"
        assert acts.overflowed.shape == (2, N)
        assert dm.sparse_decode(acts, W_dec).shape == (2, N, D)
    found = dm.find_support(on_cuda(2, N, F), capacity=30)
    assert (found.values.device.type, found.values.shape) == ("cuda", (2, N, 30))


def test_gradient_pursuit_never_waits():
    """On fake CPU tensors, because a torch without CUDA cannot copy fake CUDA ones: a look at a number would fail as well."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        packed = prepared_encoder(torch.empty)
        dictionary = PreparedDictionary(packed.weight, torch.empty(F), packed)
        vars(dictionary)["largest_norm"] = 1.0  # asked for once a dictionary, when it is first used
        chunk = pursuit_cuda._Chunk(N, 6, dictionary)
        chunk.run(Rules("gradient"))
        assert chunk.weights.shape == (N, 6)


TRACED = {case.op: case for case in ON_CUDA if case.op != "screen_intervals"}  # which is for tests


@pytest.mark.runs
@pytest.mark.parametrize("op", TRACED)
def test_ops_can_be_traced(on_cuda, op):
    """Sizes that are known only when an op has run are given to its results, each of them: else torch cannot compile it."""
    case = TRACED[op]
    arguments = [
        on_cuda(*value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        for value in case.make(torch.float32)
    ]
    places = [place for place, value in enumerate(arguments) if isinstance(value, torch.Tensor)]

    def run(*tensors):
        filled = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return case.call()(*filled)

    graph = make_fx(run, tracing_mode="symbolic")(*(arguments[place] for place in places))
    assert any(op in str(node.target) for node in graph.graph.nodes)


def test_tensors_of_two_devices_are_told(on_cuda):
    x, W_enc, b_enc = torch.empty(N, D), on_cuda(D, F), on_cuda(F)
    with pytest.raises(ValueError, match=r"^x: must be on cuda:0 as the other arguments, got cpu$"):
        dm.topk_encode(x, W_enc, b_enc, 5)


def test_without_kernels_cuda_is_refused(on_cuda, monkeypatch):
    monkeypatch.setattr(_library, "CUDA_LOADED", False)
    with pytest.raises(RuntimeError, match=r"^W_enc: topk_encode has no kernel for cuda:0 in this build"):
        dm.topk_encode(on_cuda(N, D), on_cuda(D, F), on_cuda(F), 5)
