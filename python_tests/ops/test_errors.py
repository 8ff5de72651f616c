"""Bad input is one line: argument, rule, value; TypeError for a type, InputError for a value, RuntimeError in torch.ops."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cases.children import run_python
from cases.ops import if_torch_tells_why

import darkmatter_ext as dm
from darkmatter_ext.ops import decode as ops_decode
from darkmatter_ext.ops import unchecked
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.runtime.inputs import InputError

D, F = 4, 6
X, W_ENC, B_ENC, B_DEC = torch.randn(3, D), torch.randn(D, F), torch.randn(F), torch.randn(D)
W_DEC = torch.randn(F, D)
NAN_WEIGHTS = torch.full((D, F), float("nan"))


def acts():
    return dm.topk_encode(X, W_ENC, B_ENC, 2)


def ragged(crow, col, values=None):
    crow, col = torch.tensor(crow), torch.tensor(col, dtype=torch.int64)
    return SparseActs.ragged(crow, col, torch.ones(len(col)) if values is None else values, F, (len(crow) - 1,))


def topk(x=X, W_enc=W_ENC, b_enc=B_ENC, k=2, **keywords):
    return dm.topk_encode(x, W_enc, b_enc, k, **keywords)


def threshold(value, x=X, **keywords):
    return dm.threshold_encode(x, W_ENC, B_ENC, value, **keywords)


def decode(W_dec=W_DEC, b_dec=None):
    return dm.sparse_decode(topk(), W_dec, b_dec)


def fixed(values, indices):
    return SparseActs.fixed(values, indices, F)


DTYPES_NAMED = "must be float16, bfloat16, float32 or float64, got torch.int64"
LONG, META = torch.zeros(3, 2).long(), torch.zeros(3, 2, device="meta").long()
CENTRED = dm.prepare_encoder(W_ENC, B_ENC, b_dec=B_DEC)
PREPARED = dm.prepare_encoder(W_ENC, B_ENC)
ERRORS = [
    # topk_encode
    (lambda: topk(x=[1.0]), TypeError, "x: must be a torch.Tensor, got list"),
    (lambda: topk(x=X.long()), TypeError, "x: must be float16, bfloat16, float32 or float64, got torch.int64"),
    (lambda: topk(x=X.half()), TypeError, "x: must have dtype torch.float32 as the other arguments, got torch.float16"),
    (lambda: topk(x=X[:, :3]), ValueError, "x: must have shape [3, 4], got [3, 3]"),
    (lambda: topk(x=X[0, 0]), ValueError, "x: must have shape [..., d], got a scalar"),
    (lambda: topk(x=X.to_sparse()), TypeError, "x: must be a dense tensor, got layout torch.sparse_coo"),
    (lambda: topk(x=X.to("meta")), ValueError, "x: must be on cpu as the other arguments, got meta"),
    (lambda: topk(W_enc=W_ENC[0]), ValueError, "W_enc: must have shape [any, any], got [6]"),
    (lambda: topk(W_enc=None), TypeError, "W_enc: must be a torch.Tensor, got NoneType"),
    (lambda: topk(b_enc=B_DEC), ValueError, "b_enc: must have shape [6], got [4]"),
    (lambda: topk(b_enc=B_ENC.double()), TypeError, "b_enc: must have dtype torch.float32 as the other arguments"),
    (lambda: topk(b_dec=B_ENC), ValueError, "b_dec: must have shape [4], got [6]"),
    (lambda: topk(k=-1), ValueError, "k: must be from 0 to 6 (latents), got -1"),
    (lambda: topk(k=7), ValueError, "k: must be from 0 to 6 (latents), got 7"),
    (lambda: topk(k=2.0), TypeError, "k: must be an int, got float"),
    (lambda: topk(k=True), TypeError, "k: must be an int, got bool"),
    # prepared
    (lambda: topk(prepared=W_ENC), TypeError, "prepared: must come from prepare_encoder, got Tensor"),
    (
        lambda: topk(W_enc=W_DEC, x=torch.ones(6), b_enc=B_DEC, prepared=PREPARED),
        ValueError,
        "prepared: must be of W_enc [6, 4]",
    ),
    (lambda: topk(b_dec=B_DEC, prepared=PREPARED), ValueError, "prepared: must be prepared with the b_dec of the call"),
    (
        lambda: topk(x=X.double(), W_enc=W_ENC.double(), b_enc=B_ENC.double(), prepared=PREPARED),
        ValueError,
        "prepared: must be torch.float64 on cpu as W_enc, got torch.float32 on cpu",
    ),
    (lambda: dm.prepare_encoder(W_ENC, B_DEC), ValueError, "b_enc: must have shape [6], got [4]"),
    # threshold_encode
    (lambda: threshold("0.5"), TypeError, "threshold: must be a torch.Tensor, got str"),
    (lambda: threshold(B_DEC), ValueError, "threshold: must have shape [6], got [4]"),
    (lambda: threshold(B_ENC.double()), TypeError, "threshold: must have dtype torch.float32"),
    # sparse_decode
    (
        lambda: dm.sparse_decode(X, W_DEC),
        TypeError,
        "acts: must be SparseActs (SparseActs.from_dense converts), got Tensor",
    ),
    (lambda: dm.sparse_decode(acts(), W_DEC.mT), ValueError, "W_dec: must have shape [6, any], got [4, 6]"),
    (lambda: dm.sparse_decode(acts(), W_DEC.double()), TypeError, "W_dec: must have dtype torch.float32"),
    (lambda: dm.sparse_decode(acts(), W_DEC, B_ENC), ValueError, "b_dec: must have shape [4], got [6]"),
    # types, layouts and devices of every argument
    (lambda: topk(W_enc=W_ENC.long()), TypeError, f"W_enc: {DTYPES_NAMED}"),
    (lambda: topk(b_enc=B_ENC.long()), TypeError, f"b_enc: {DTYPES_NAMED}"),
    (lambda: topk(b_dec=B_DEC.long()), TypeError, f"b_dec: {DTYPES_NAMED}"),
    (lambda: topk(b_dec=[1.0]), TypeError, "b_dec: must be a torch.Tensor, got list"),
    (lambda: topk(W_enc=W_ENC.to_sparse()), TypeError, "W_enc: must be a dense tensor, got layout torch.sparse_coo"),
    (lambda: topk(b_enc=B_ENC.to_sparse()), TypeError, "b_enc: must be a dense tensor, got layout torch.sparse_coo"),
    (lambda: topk(b_enc=B_ENC.to("meta")), ValueError, "b_enc: must be on cpu as the other arguments, got meta"),
    (lambda: topk(b_dec=B_DEC.to("meta")), ValueError, "b_dec: must be on cpu as the other arguments, got meta"),
    (lambda: topk(b_dec=B_DEC.half()), TypeError, "b_dec: must have dtype torch.float32 as the other arguments"),
    (lambda: topk(k=torch.tensor(2)), TypeError, "k: must be an int, got Tensor"),
    (lambda: topk(k=None), TypeError, "k: must be an int, got NoneType"),
    (
        lambda: topk(prepared=CENTRED),
        ValueError,
        "prepared: must be prepared with the b_dec of the call, got one with b_dec",
    ),
    (lambda: dm.prepare_encoder(W_ENC, B_ENC, b_dec=B_ENC), ValueError, f"b_dec: must have shape [{D}], got [{F}]"),
    (lambda: dm.prepare_encoder(None, B_ENC), TypeError, "W_enc: must be a torch.Tensor, got NoneType"),
    (lambda: dm.prepare_encoder(W_ENC, B_ENC * math.nan), ValueError, "b_enc: must not contain NaN"),
    (lambda: dm.prepare_encoder(W_ENC, B_ENC, b_dec=B_DEC * math.nan), ValueError, "b_dec: must not contain NaN"),
    (lambda: dm.threshold_encode(X, W_ENC, B_ENC, True), TypeError, "threshold: must be a torch.Tensor, got bool"),
    (lambda: dm.threshold_encode(X, W_ENC, B_ENC, torch.tensor(1)), TypeError, f"threshold: {DTYPES_NAMED}"),
    (
        lambda: dm.threshold_encode(X, W_ENC, B_ENC, torch.ones(1)),
        ValueError,
        f"threshold: must have shape [{F}], got [1]",
    ),
    (
        lambda: dm.threshold_encode(X, W_ENC, B_ENC, torch.tensor(1.0, device="meta")),
        ValueError,
        "threshold: must be on cpu as the other arguments, got meta",
    ),
    (lambda: decode(W_dec=W_DEC.long()), TypeError, f"W_dec: {DTYPES_NAMED}"),
    (lambda: decode(W_dec=W_DEC[0]), ValueError, f"W_dec: must have shape [{F}, any], got [{D}]"),
    (lambda: decode(W_dec=W_DEC.to_sparse()), TypeError, "W_dec: must be a dense tensor, got layout torch.sparse_coo"),
    (lambda: decode(W_dec=W_DEC.to("meta")), ValueError, "W_dec: must be on cpu as the other arguments, got meta"),
    (lambda: decode(b_dec=B_DEC.double()), TypeError, "b_dec: must have dtype torch.float32 as the other arguments"),
    (lambda: fixed([1.0], LONG), TypeError, "values: must be a floating-point tensor, got list"),
    (lambda: fixed(LONG, LONG), TypeError, "values: must be a floating-point tensor, got torch.int64"),
    (lambda: fixed(LONG.float(), [0]), TypeError, "indices: must be a torch.Tensor, got list"),
    (lambda: fixed(LONG.float(), META), ValueError, "indices: must be on cpu as values, got meta"),
    (
        lambda: SparseActs.ragged(META[:, 0], LONG[:, 0], torch.ones(3), F, (2,)),
        ValueError,
        "crow_indices: must be on cpu as values, got meta",
    ),
]
# Found by the kernels in the contents of a tensor.
CONTENT_ERRORS = [
    (lambda: topk(W_enc=NAN_WEIGHTS), ValueError, "W_enc: must not contain NaN"),
    (lambda: topk(b_enc=B_ENC * torch.nan), ValueError, "b_enc: must not contain NaN"),
    (lambda: topk(b_dec=B_DEC * torch.nan), ValueError, "b_dec: must not contain NaN"),
    (lambda: dm.prepare_encoder(NAN_WEIGHTS, B_ENC), ValueError, "W_enc: must not contain NaN"),
    (lambda: threshold(float("nan")), ValueError, "threshold: must not contain NaN"),
    (lambda: threshold(B_ENC * torch.nan), ValueError, "threshold: must not contain NaN, got NaN at latent 0"),
    (lambda: dm.sparse_decode(ragged([0, 1], [6]), W_DEC), ValueError, "indices: must be from 0 to 5, got 6"),
    (lambda: dm.sparse_decode(ragged([0, 1], [-1]), W_DEC), ValueError, "indices: must be from 0 to 5, got -1"),
    (
        lambda: dm.sparse_decode(ragged([0, 2], [1]), W_DEC),
        ValueError,
        "crow: must go from 0 to the number of indices (1)",
    ),
    (
        lambda: dm.sparse_decode(ragged([0, 2, 1, 3], [1, 2, 3]), W_DEC),
        ValueError,
        "crow: must not decrease, got a fall at token 1",
    ),
]


def named(cases):
    return [pytest.param(*case, id=case[-1][:48]) for case in cases]


@pytest.mark.parametrize(("call", "kind", "message"), named(ERRORS + CONTENT_ERRORS))
def test_one_line_with_argument_rule_and_value(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is (InputError if kind is ValueError else kind)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_integers_of_numpy_are_integers():
    assert topk(k=np.int64(2)).values.shape == (3, 2)


def test_no_kernel_for_the_device():
    """A device without kernels is named together with a way out; here a stand-in for CUDA that any machine has."""

    class OnCuda(torch.Tensor):
        device = torch.device("cuda", 0)
        is_cuda = True

    for op, call in (
        ("topk_encode", lambda w: topk(W_enc=w)),
        ("threshold_encode", lambda w: dm.threshold_encode(X, w, B_ENC, 0.1)),
        ("prepare_encoder", lambda w: dm.prepare_encoder(w, B_ENC)),
    ):
        with pytest.raises(RuntimeError, match=rf"^W_enc: {op} has no kernel for cuda:0 in this build; move"):
            call(W_ENC.as_subclass(OnCuda))


def raw(name, *arguments):
    """torch.ops.darkmatter.<name>, the arguments not given (packed weights) absent."""
    op = getattr(torch.ops.darkmatter, name)
    return op(*arguments, *[None] * (len(op.default._schema.arguments) - len(arguments)))


# Direct callers of torch.ops skip the Python layer; the C++ checks then say the same, as RuntimeError.
LONG_3_4, LONG_3_2 = torch.zeros(3, 4).long(), torch.zeros(3, 2).long()
RAW = [
    (lambda: raw("topk_encode", X[0], W_ENC, B_ENC, None, 2), "x: must have 2 dimensions, got shape [4]"),
    (lambda: raw("topk_encode", X, W_ENC.half(), B_ENC, None, 2), "W_enc: must have dtype Float, got Half"),
    (lambda: raw("topk_encode", X, W_ENC, B_ENC, None, 7), "k: must be from 0 to 6 (latents), got 7"),
    (lambda: raw("topk_encode", X.long(), W_ENC, B_ENC, None, 2), "x: must be float16, bfloat16, float32"),
    (lambda: raw("threshold_encode", X, W_ENC, B_ENC, None, B_DEC), "threshold: must have size 6"),
    (lambda: raw("sparse_decode", X, LONG_3_4.float(), None, W_ENC), "indices: must have dtype Long, got Float"),
    (lambda: raw("sparse_decode", X, LONG_3_2, None, W_ENC), "values: must have the shape of indices [3, 2]"),
    (lambda: raw("sparse_decode", X[0], LONG_3_4[0], LONG_3_4[0, :0], W_DEC), "crow: must have N + 1 entries"),
    (lambda: raw("decoder_dot", X[:2], LONG_3_2, None, W_DEC), "rows: must have 3 rows, one a token, got 2"),
    (lambda: raw("decoder_outer", X, LONG_3_4, None, X, -1), "n_latents: must be at least 0, got -1"),
]


@pytest.mark.parametrize(("call", "message"), named(RAW))
def test_checks_behind_torch_ops(call, message):
    with pytest.raises(RuntimeError) as caught:
        call()
    assert str(caught.value).startswith(message)


BAD_ACTIVE = [
    ([[0, F]], None, f"indices: must be from 0 to {F - 1}, got {F}"),
    ([[0, 2**62]], None, f"indices: must be from 0 to {F - 1}, got {2**62}"),
    ([[-1, 0]], None, f"indices: must be from 0 to {F - 1}, got -1"),
    ([0, 1], [0, 3], "crow: must go from 0 to the number of indices (2), got 0 to 3"),
    ([0, 1], [1, 2], "crow: must go from 0 to the number of indices (2), got 1 to 2"),
    ([0, 1], [0, 5, -4, 2], "crow: must not decrease, got a fall at token 1"),
]


@pytest.mark.parametrize("op", ["sparse_decode", "decoder_dot", "decoder_outer"])
@pytest.mark.parametrize(("indices", "crow", "message"), BAD_ACTIVE, ids=[case[-1][:40] for case in BAD_ACTIVE])
def test_bad_indices_behind_torch_ops_do_not_read_foreign_memory(op, indices, crow, message):
    indices = torch.tensor(indices)
    rows = torch.ones(len(indices) if crow is None else len(crow) - 1, D)
    crow = None if crow is None else torch.tensor(crow)
    arguments = {
        "sparse_decode": (torch.ones(indices.shape), indices, crow, W_DEC, None),
        "decoder_dot": (rows, indices, crow, W_DEC),
        "decoder_outer": (torch.ones(indices.shape), indices, crow, rows, F),
    }
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.darkmatter, op)(*arguments[op])
    assert str(caught.value).startswith(message)


@pytest.mark.slow
def test_unknown_instruction_set():
    program = "import darkmatter_ext as dm\ntry: dm.build_info()\nexcept RuntimeError as e: print(e)"
    run = run_python(program, DARKMATTER_CPU_ISA="sse9")
    assert run.stdout.startswith("DARKMATTER_CPU_ISA: must be scalar, avx2")
    assert run.stdout.endswith(", got sse9\n")


# ---- no memory

VAST = 1 << 46  # of float32 256 TiB, more than there are addresses
ZERO = torch.zeros(1, 1, dtype=torch.int64)
MANY = X[:1, :1].expand(VAST, D)


def one_of_vast(values=None):
    return SparseActs.fixed(torch.ones(1, 1) if values is None else values, ZERO, VAST)


WITHOUT_MEMORY = {
    "to_dense": lambda: ops_decode.to_dense(one_of_vast()),
    "to_dense unchecked": lambda: unchecked.to_dense(one_of_vast()),
    "to_dense with a gradient": lambda: ops_decode.to_dense(one_of_vast(torch.ones(1, 1, requires_grad=True))),
    "decoder_outer": lambda: ops_decode.decoder_outer(ragged_of_vast(), X[:1]),
    "sparse_decode": lambda: dm.sparse_decode(one_of_vast(), MANY),
    "find_support": lambda: dm.find_support(MANY),
    "find_support unchecked": lambda: unchecked.find_support(MANY),
    "topk_encode": lambda: dm.topk_encode(MANY, W_ENC, B_ENC, 2),
    "threshold_encode": lambda: dm.threshold_encode(MANY, W_ENC, B_ENC, 0.0),
    "prepare_encoder": lambda: dm.prepare_encoder(MANY.T, B_ENC[:1].expand(VAST)),
}


def ragged_of_vast():
    return SparseActs.ragged(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), VAST, (1,))


@if_torch_tells_why
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_a_lack_of_memory_is_the_error_that_torch_has_for_it(name):
    """Who halves a batch catches it by its type or its words; torch's stable ABI names a line of its headers."""
    with pytest.raises(torch.OutOfMemoryError, match="allocate memory") as caught:
        WITHOUT_MEMORY[name]()
    assert len(str(caught.value).splitlines()) == 1


def _without_room(call):
    """What a Python of its own with 64 MiB left says of a call."""
    code = f"""
import resource, torch, darkmatter_ext as dm
from pathlib import Path
from darkmatter_ext.ops import unchecked
few = dm.SparseActs.fixed(torch.ones(4, 2, requires_grad=True), torch.zeros(4, 2, dtype=torch.int64), 1 << 22)
W_dec = torch.zeros(1 << 22, 16, requires_grad=True)
x_hats = [decode(few, W_dec) for decode in (dm.sparse_decode, lambda *own: unchecked.sparse_decode(*own, None))]
many = torch.zeros(1 << 22, 1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    {call}
except torch.OutOfMemoryError as error:
    print("out of memory:", error)
"""
    return run_python(code, OMP_NUM_THREADS="1", DARKMATTER_POOL_MB="0").stdout


@pytest.mark.skipif("DARKMATTER_SANITIZE" in os.environ, reason="a sanitizer's own memory takes no such limit")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc, and limits of memory that hold")
@if_torch_tells_why
@pytest.mark.parametrize("call", ["x_hats[0].sum().backward()", "x_hats[1].sum().backward()", "dm.find_support(many)"])
def test_gradients_and_lists_of_the_kernels_say_so_too(call):
    assert _without_room(call).startswith("out of memory:")
