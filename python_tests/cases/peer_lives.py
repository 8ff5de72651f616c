"""The life of an accelerated object of sparsify or dictionary_learning beside its plain twin: as cases.lives, for theirs.

`replay` runs one life of edits of cases.peer_life_edits; where `live` fails, it names fewer edits that fail too.
"""

import random
import warnings
from contextlib import nullcontext

import torch

import darkmatter_ext as dm
from cases import peers
from cases.life_answers import DifferenceError, answer, outcome, require
from cases.peer_life_edits import DTYPES, EDITS, Draw
from cases.peers import KINDS, AutoEncoderTopK, D, is_coder, parts
from darkmatter_ext.saes.architectures import FEW_PLACES
from darkmatter_ext.saes.packed_weights import version_of
from darkmatter_ext.saes.stepping_aside import TOO_MANY

DENSE = 0.04  # as in cases.lives
TRIES = 12


# Answers


def _alike(what, plain, fast):
    """The answers of two calls as tuples, or None where both raise alike."""
    (theirs, their_error), (ours, our_error) = answer(plain), answer(fast)
    told = f"{what}: accelerated {outcome(ours, our_error)}, plain {outcome(theirs, their_error)}"
    require(type(their_error) is type(our_error), told)
    if their_error is not None:
        return None
    theirs, ours = (each if isinstance(each, tuple) else (each,) for each in (theirs, ours))
    require(len(theirs) == len(ours), f"{what}: other results")
    for one, other in zip(theirs, ours, strict=True):
        same = (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad)
        require(same, f"{what}: another dtype, shape or requires_grad")
    return theirs, ours


def _require_same_acts(what, sae, x, theirs, ours, **options):
    wrong, error, same = peers.wrong_latents(sae, x, theirs, ours, **options)
    require(wrong == 0, f"{what}: {wrong} latents differ away from any border")
    require(error <= 1, f"{what}: values differ by {error:.3g} of what rounding may do")
    return same


def _require_close(what, sae, theirs, ours, rows):
    theirs, ours = theirs.detach().double(), ours.detach().double()
    if theirs.ndim > 1:
        theirs, ours = (each.reshape(-1, each.shape[-1])[rows] for each in (theirs, ours))
    elif not bool(rows.all()):
        return
    require(torch.equal(theirs.isnan(), ours.isnan()), f"{what}: NaN elsewhere")
    theirs, ours = theirs.nan_to_num(0.0, 0.0, 0.0), ours.nan_to_num(0.0, 0.0, 0.0)
    own = parts(sae)
    # The sums are over latents of size up to |x| |w|: what is rounded is as large as the decoder times these.
    size = (float(theirs.abs().max()) if theirs.numel() else 0.0) + float(own.b_dec.detach().nan_to_num().abs().max())
    slack = 60 * peers.TOLERANCE[own.W_enc.dtype] * (1 + size)
    error = float((theirs - ours).abs().max()) if theirs.numel() else 0.0
    require(error <= slack, f"{what}: differs by {error / slack:.3g} of what rounding may do")


def assert_alike(plain, fast, x):
    """Encode, decode and forward; returns the dense acts of the plain one, or None."""
    found = _alike("encode", lambda: plain.encode(x), lambda: fast.encode(x))
    if found is None:
        return None
    theirs, ours = found
    if is_coder(plain):
        acts, own = (peers.dense(plain, plain.encode(x)._replace(top_acts=t[0], top_indices=t[1])) for t in found)
        rows = _require_same_acts("encode", plain, x, acts, own)
        _require_close("pre_acts", plain, theirs[2], ours[2], torch.ones_like(rows))
    else:
        acts = theirs[0]
        rows = _require_same_acts("encode", plain, x, acts, ours[0])
        decoded = _alike("decode", lambda: plain.decode(acts.detach()), lambda: fast.decode(acts.detach()))
        if decoded is not None:
            _require_close("decode", plain, decoded[0][0], decoded[1][0], torch.ones_like(rows))
    out = _alike("forward", lambda: plain(x), lambda: fast(x))
    if out is not None:
        _require_close("forward", plain, out[0][0], out[1][0], rows)
    return acts.detach()


def _other_calls(plain, fast, x, draw):
    """Calls with options: the library's own, to the bit, but for thresholds on request."""
    if is_coder(plain):
        return
    option = draw.choice(fast._architecture.encode_options or ("none",))
    value = option != "use_threshold" or isinstance(plain, AutoEncoderTopK)
    if option == "none":
        return
    found = _alike(option, lambda: plain.encode(x, **{option: value}), lambda: fast.encode(x, **{option: value}))
    if found is not None and option == "use_threshold" and value:
        _require_same_acts(option, plain, x, found[0][0], found[1][0], threshold=plain.threshold)
    elif found is not None:
        same = all(torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) for one, other in zip(*found, strict=True))
        require(same, f"{option}: not the library's own answer")


# Whether a call has to be fast


def _excuse(sae, acts):
    """Why an accelerated SAE in this state may answer through its library."""
    own = parts(sae)
    with torch.no_grad():
        finite = all(bool(p.isfinite().all()) for p in [*sae.parameters(), *sae.buffers()])
    jump_in_half = isinstance(sae, peers.JumpReluAutoEncoder) and own.W_enc.dtype is torch.float16
    k = peers.k_of(sae)
    return (
        not finite
        or jump_in_half
        or (torch.is_grad_enabled() and any(p.requires_grad for p in sae.parameters()))
        or any(version_of(p) is None for p in sae.parameters())
        or len({p.dtype for p in sae.parameters()}) > 1
        or any(layer._forward_hooks for layer in sae.modules())
        or (is_coder(sae) and sae.cfg.activation != "topk")
        or (k is not None and k > 0.05 * own.W_enc.shape[1])
        or acts is None
        or float((acts != 0).float().mean()) > DENSE
    )


def _require_fast(fast, draw):
    methods = ("encode",) if is_coder(fast) else ("encode", "decode", "forward")
    dtype = parts(fast).W_enc.dtype
    dm.refresh(fast)  # ends a wait that the weights before an edit, or pre_acts that were read, have earned
    before, reasons = dm.stats(fast), set()
    for _ in range(TRIES):
        x = torch.randn(12, D, generator=draw.generator).to(dtype)
        acts = fast.encode(x)
        if not is_coder(fast):
            fast.decode(acts), fast(x)
        now = dm.stats(fast)
        slow = [name for name in methods if now.fast.get(name) == before.fast.get(name)]
        if not slow:
            return
    reasons = {
        why for name in slow for why, n in now.fallback[name].items() if n > before.fallback.get(name, {}).get(why, 0)
    }
    hard = reasons <= {TOO_MANY, FEW_PLACES}  # which tokens are hard to screen: cases.lives
    require(hard, f"{slow}: never fast in {TRIES} calls: {reasons}")


# Lives


class LifeError(AssertionError):
    """A life that failed."""


def replay(kind, edits):
    """One life: [(name of an edit, seed), ...]; returns the accelerated twin."""
    plain, fast = peers.pair(kind, f=256)
    before = []
    for number, (name, seed) in enumerate([(None, 0), *edits]):
        try:
            if name is not None:
                before = [*before[-1:], (plain, fast)]
                (one, their_error), (other, our_error) = (answer(EDITS[name][0], s, Draw(seed)) for s in (plain, fast))
                told = f"accelerated {outcome(other, our_error)}, plain {outcome(one, their_error)}"
                require(type(their_error) is type(our_error), told)
                plain, fast = plain if one is None else one, dm.accelerate(fast if other is None else other)
            _check(plain, fast, Draw(seed))
            if before and seed % 7 == 0 and before[0][0] is not plain:
                _check(*before[0], Draw(seed))  # an earlier copy answers as well
        except Exception as error:
            told = str(error).splitlines()[0] if str(error) else ""
            raise LifeError(f"{kind}, edit {number} ({name}): {type(error).__name__}: {told}") from error
    return fast


def _check(plain, fast, draw):
    theirs, ours = plain.state_dict(), fast.state_dict()
    require(theirs.keys() == ours.keys(), "other parameters")
    for name, value in theirs.items():
        same = value.dtype == ours[name].dtype and torch.equal(value.nan_to_num(7.0), ours[name].nan_to_num(7.0))
        require(same, f"the edit left another {name}")
    mode = draw.choice((nullcontext, torch.no_grad, torch.no_grad, torch.inference_mode))
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.randn(12, D, generator=draw.generator).to(parts(plain).W_enc.dtype)
        if draw.random() < 0.1:
            x = x.to(draw.choice(DTYPES))
        acts = assert_alike(plain, fast, x)
        if draw.random() < 0.3:
            odd = x.reshape(draw.choice(((3, 4, D), (12, 1, D), (12, D)))) * draw.choice((1, 1, 30, 0))
            if not (is_coder(plain) and plain.cfg.activation == "groupmax"):
                assert_alike(plain, fast, odd)
        if acts is not None and draw.random() < 0.2:
            _other_calls(plain, fast, x, draw)
        if x.dtype is parts(plain).W_enc.dtype and not _excuse(plain, acts):
            _require_fast(fast, draw)


def failure(kind, edits):
    """What goes wrong in a life, "" if nothing."""
    try:
        replay(kind, edits)
    except (LifeError, DifferenceError) as error:
        return str(error)
    return ""


def live(seed, n_edits):
    """Lives one life; a failure names the shortest list of edits, of those tried, that leads to it."""
    draw = random.Random(seed)
    kind, names = draw.choice(KINDS), list(EDITS)
    drawn = draw.choices(names, [weight for _, weight in EDITS.values()], k=n_edits)
    edits = [(name, draw.randrange(10**6)) for name in drawn]
    told = failure(kind, edits)
    if told:
        for place in reversed(range(len(edits))):
            fewer = edits[:place] + edits[place + 1 :]
            if failure(kind, fewer):
                edits = fewer
        raise LifeError(f"life {seed}: {failure(kind, edits) or told}\nreplay({kind!r}, {edits})")
