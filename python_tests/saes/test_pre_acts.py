"""sparsify's pre_acts of an accelerated SparseCoder: a tensor that is computed when it is first read."""

import copy
import pickle

import pytest
import torch
from cases import lives
from cases.peers import F, activations, assert_close, make, pair, sparse_coder

import darkmatter_ext as dm
from darkmatter_ext.saes.sparse_coder import PRE_ACTS

pytestmark = pytest.mark.skipif(not lives.SCREENS, reason="no fast path on this processor")


@torch.no_grad()
def test_pre_acts_are_the_librarys():
    plain, fast = pair("SparseCoder")
    x = activations(6)
    theirs, ours = plain.encode(x), fast.encode(x)
    assert (ours.pre_acts.shape, ours.pre_acts.dtype) == (theirs.pre_acts.shape, theirs.pre_acts.dtype)
    assert (ours.pre_acts.device, len(ours.pre_acts), ours.pre_acts.requires_grad) == (x.device, 6, False)
    assert isinstance(ours.pre_acts, torch.Tensor)
    x.zero_()  # what is read later is of what was given
    fast.double()
    assert_close(plain, theirs.pre_acts, ours.pre_acts)
    assert torch.equal(ours.pre_acts.gather(-1, ours.top_indices), ours.top_acts)
    assert torch.equal(ours.pre_acts, ours.pre_acts + 0)


@torch.no_grad()
@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.numpy().sum(),
        lambda t: t[1].clone(),
        lambda t: t.mul_(2).add_(1),
        lambda t: pickle.loads(pickle.dumps(t)).sum(),
        lambda t: copy.deepcopy(t).sum(),
        lambda t: torch.cat([t, t]).topk(3).values,
        lambda t: torch.where(t > 0.5, t, torch.zeros(())).tolist(),
        lambda t: torch.from_dlpack(t).sum(),
        lambda t: repr(t) + str(hash(t) != 0),
        torch.func.vmap(lambda row: row.sum()),
    ],
)
def test_pre_acts_are_a_tensor_like_any_other(read):
    fast = dm.accelerate(make("SparseCoder"))
    for _ in range(2):
        lazily = fast.encode(activations(4)).pre_acts
        there = torch.Tensor(lazily.detach().clone().numpy())
        dm.refresh(fast)
        wanted, got = read(there), read(fast.encode(activations(4)).pre_acts)
        assert torch.equal(wanted, got) if isinstance(wanted, torch.Tensor) else wanted == got
        dm.refresh(fast)


@torch.no_grad()
def test_pre_acts_after_an_edit_of_the_weights():
    fast = dm.accelerate(make("SparseCoder"))
    x = activations(6)
    before = dm.deaccelerate(copy.deepcopy(fast)).encode(x).pre_acts
    for edit in (lambda w: w.mul_(2), lambda w: w.data.mul_(2)):
        dm.refresh(fast)
        found = fast.encode(x)
        edit(fast.encoder.weight)
        with pytest.raises(RuntimeError, match=r"^pre_acts: must be read before the encoder's weights are edited"):
            found.pre_acts.sum()
        fast.load_state_dict(make("SparseCoder").state_dict())
    dm.refresh(fast)
    found = fast.encode(x)
    fast.to(torch.bfloat16)  # gives the parameters other storage
    assert_close(make("SparseCoder"), before, found.pre_acts)


@torch.no_grad()
def test_where_pre_acts_are_read_the_library_computes_them():
    plain, fast = (dm.accelerate(sparse_coder(multi_topk=True)) if n else sparse_coder(multi_topk=True) for n in (0, 1))
    fast.load_state_dict(plain.state_dict())
    x = activations(16)
    waits = []
    for _ in range(1 + 8 + 1 + 16 + 1):
        assert_close(plain, plain(x).multi_topk_fvu, fast(x).multi_topk_fvu, scale=100)
        waits.append(fast._fast.reads.left)
    assert [wait for wait, before in zip(waits, [0, *waits], strict=False) if before == 0] == [8, 16, 32]
    assert dm.stats(fast).fallback["encode"] == {PRE_ACTS: 24}
    dead = torch.zeros(F, dtype=torch.bool)
    dead[:100] = True
    dm.refresh(fast)
    for one, other in zip(plain(x, dead_mask=dead), fast(x, dead_mask=dead), strict=True):
        if one.is_floating_point() and one.ndim != 2:
            assert_close(plain, one, other, scale=100)
