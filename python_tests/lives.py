"""The life of an accelerated SAE beside its plain twin: the same edits to both, and after each the same answers.

`replay` runs one life; where it fails, `shortest` finds the fewest edits that fail too.
"""

import copy
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from life_edits import EDITS, Draw
from sae_cases import TOLERANCE, TRANSCODERS
from sae_lens.registry import get_sae_class

import darkmatter_ext as dm
from darkmatter_ext.saes.drop_in import TOO_MANY
from darkmatter_ext.saes.packed_weights import version_of

ARCHITECTURES = ("topk", "jumprelu", "standard", "gated", "matching_pursuit", "abstopk", *TRANSCODERS)
NEVER_FAST = {"abstopk": "signed latents"}
N_TOKENS, HEADS = 12, 4
DENSE = 0.04  # share of active latents below which a call has to be fast; the package's own limit is higher
K_SHARE = 0.05
# Without it, on a processor with no vector kernel, only pursuit has a fast path.
SCREENS = dm.prepare_encoder(Draw(0).normal(32, 256), torch.zeros(256)).screens
TRIES = 12  # calls within which a path that has stepped aside comes back


@dataclass(frozen=True)
class Config:
    """What an SAE is built from."""

    architecture: str
    d_in: int = 64
    d_sae: int = 256
    options: dict = field(default_factory=dict)

    @classmethod
    def drawn(cls, draw):
        architecture = draw.choice(ARCHITECTURES)
        options = {"dtype": draw.choice(("float32",) * 4 + ("bfloat16", "float16", "float64"))}
        norms = ("none",) * 4 + (
            "expected_average_only_in",
            "layer_norm",
            "constant_norm_rescale",
            "covariance_whitening",
        )
        options["normalize_activations"] = draw.choice(norms)
        if architecture in TRANSCODERS:
            options |= {"apply_b_dec_to_input": False, "d_out": draw.choice((24, 48))}
        else:
            options["apply_b_dec_to_input"] = draw.random() < 0.7
        options["reshape_activations"] = draw.choice(("none", "none", "none", "hook_z"))
        if "topk" in architecture:
            options |= {"k": draw.choice((4, 8)), "rescale_acts_by_decoder_norm": draw.random() < 0.5}
        if architecture == "matching_pursuit":
            options["max_iterations"] = draw.choice((4, 8))
            options["residual_threshold"] = draw.choice((0.0, 0.01, 3.0))
            options["stop_on_duplicate_support"] = draw.random() < 0.5
        return cls(architecture, draw.choice((32, 64)), draw.choice((256, 384)), options)

    def build(self):
        sae_class, cfg_class = TRANSCODERS.get(self.architecture) or get_sae_class(self.architecture)
        sae = sae_class(cfg_class(d_in=self.d_in, d_sae=self.d_sae, device="cpu", **self.options))
        draw = Draw(1)
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(draw.fresh(sae, name))
        return sae


class DifferenceError(AssertionError):
    """The twins do not answer alike."""


def require(holds, message):
    if not holds:
        raise DifferenceError(message)


# Inputs


def tokens(sae, draw, *shape, dtype=None):
    return _shaped(sae, draw.normal(*shape, sae.cfg.d_in).to(dtype or sae.dtype))


def _shaped(sae, x):
    reshapes = sae.hook_z_reshaping_mode and sae.cfg.architecture() not in TRANSCODERS  # which ignore the option
    return x.unflatten(-1, (HEADS, -1)) if reshapes else x


def odd_tokens(sae, draw):
    """Inputs of every shape and kind; all are legal."""
    shape = draw.choice(((), (1,), (5,), (40,), (0,), (2, 3), (2, 0), (2, 1, 3)))
    x = draw.normal(*shape, sae.cfg.d_in).to(sae.dtype)
    kind = draw.choice(("plain", "strided", "expanded", "zeros", "zero row", "sink", "padding", "grad", "half nan"))
    if kind == "strided":
        x = x.mT.contiguous().mT if x.ndim > 1 else torch.stack([x, x], -1)[..., 0]
    elif kind == "expanded":
        x = x[None].expand(3, *x.shape)
    elif kind == "zeros":
        x = torch.zeros_like(x)
    elif x.ndim > 1 and x.numel():
        rows = {"zero row": slice(0, 1), "sink": slice(0, 1), "padding": slice(1, None), "half nan": slice(0, 1)}
        if kind in rows:
            x[..., rows[kind], :] *= {"sink": 300, "half nan": float("nan")}.get(kind, 0)
    return _shaped(sae, x).requires_grad_(kind == "grad")


# Answers


def answer(function, *args):
    """(value, None), or (None, the exception)."""
    try:
        return function(*args), None
    except Exception as error:
        return None, error


def both(what, plain, fast):
    """The answers of two calls, or None where both raise alike."""
    (theirs, their_error), (ours, our_error) = answer(plain), answer(fast)
    if their_error is None and our_error is None:
        require(theirs.dtype == ours.dtype, f"{what}: dtype {ours.dtype}, plain {theirs.dtype}")
        require(theirs.shape == ours.shape, f"{what}: shape {list(ours.shape)}, plain {list(theirs.shape)}")
        require(theirs.requires_grad == ours.requires_grad, f"{what}: requires_grad {ours.requires_grad}")
        require(theirs.is_sparse == ours.is_sparse, f"{what}: is_sparse {ours.is_sparse}")
        return theirs, ours
    require(
        type(their_error) is type(our_error),
        f"{what}: accelerated {_told(ours, our_error)}, plain {_told(theirs, their_error)}",
    )
    return None


def _told(value, error):
    return "answers" if error is None else f"raises {type(error).__name__}: {str(error).splitlines()[0]}"


def _seen_encode(sae, x):
    """encode(x), and the input of the encoder's product."""
    seen, original = [], type(sae).process_sae_in
    sae.process_sae_in = lambda x: seen.append(original(sae, x)) or seen[-1]
    try:
        return sae.encode(x), seen[0].detach()
    finally:
        del sae.process_sae_in


def assert_alike(plain, fast, x):
    """Encode, decode and forward; a latent may differ only where rounding decides."""
    seen = []
    acts = both("encode", lambda: seen.append(_seen_encode(plain, x)) or seen[0][0], lambda: fast.encode(x))
    if acts is None:
        return None
    theirs, ours = (each.detach().to_dense() for each in acts)
    rows = same_acts(plain, seen[0][1], theirs, ours)
    x_hat = both("decode", lambda: plain.decode(acts[0].detach()), lambda: fast.decode(acts[0].detach()))
    if x_hat is not None:
        same_output("decode", plain, x, theirs, theirs.double().abs(), *x_hat)
    plain.encode(x), fast.encode(x)  # a normalisation hands its state from encode to decode
    out = both("forward", lambda: plain(x), lambda: fast(x))
    if out is not None:
        scale = _value_scale(plain, seen[0][1]).reshape(theirs.shape)
        size = torch.where(theirs != 0, torch.maximum(theirs.double().abs(), scale), 0.0)
        same_output("forward", plain, x, theirs, size, *out, rows=rows)
    return theirs


def _normalises(sae):
    """Whether activations are normalised token by token; a fold changes the configuration but not this."""
    return sae.run_time_activation_norm_fn_in.__name__ != "<lambda>"


def _weights(sae):
    return sae.W_enc.detach().double(), sae.W_dec.detach().double()


def _encoder_bias(sae):
    bias = next((sae._parameters[n] for n in ("b_gate", "b_enc") if sae._parameters.get(n) is not None), None)
    return torch.zeros((), dtype=torch.float64) if bias is None else bias.detach().double()


def _hooked_scale(sae):
    """What the scaling hooks of life_edits multiply a value with, at most."""
    return 1.5 ** sum(len(point._forward_hooks) for point in sae.hook_dict.values())


@torch.no_grad()
def _value_scale(sae, sae_in):
    """Size of the sums whose rounding is compared, [..., d_sae]."""
    w_enc, w_dec = _weights(sae)
    scale = sae_in.double().norm(dim=-1, keepdim=True) * w_enc.norm(dim=0) + _encoder_bias(sae).abs()
    if sae.cfg.architecture() == "gated":
        scale = scale * sae.r_mag.detach().double().exp().clamp(min=1) + sae.b_mag.detach().double().abs()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        scale = scale * w_dec.norm(dim=-1)
    return scale * _hooked_scale(sae)


@torch.no_grad()
def same_acts(sae, sae_in, theirs, ours):
    """Same latents and values but for rounding; returns which rows have the same latents."""
    theirs, ours = (each.reshape(-1, sae.cfg.d_sae) for each in (theirs, ours))
    sae_in = sae_in.reshape(-1, sae.cfg.d_in).double()
    _require_same_nan("encode", theirs, ours)
    finite = theirs.isfinite().all(-1) & sae_in.isfinite().all(-1)
    theirs, ours, sae_in = theirs[finite].double(), ours[finite].double(), sae_in[finite]
    slack = TOLERANCE[sae.dtype] * _value_scale(sae, sae_in) + 1e-30
    differ = (theirs != 0) != (ours != 0)
    if sae.cfg.architecture() == "matching_pursuit":
        rows = differ.any(-1)
        require(bool((~rows | _has_close_race(sae, sae_in)).all()), "encode: pursuit chose other latents")
        require_within("encode", theirs, ours, 30 * slack, ~rows[:, None])
    else:
        wrong = differ & ~_on_a_border(sae, sae_in, slack)
        require(
            not bool(wrong.any()), f"encode: {int(wrong.sum())} of {wrong.numel()} latents differ away from any border"
        )
        # In 16 bits slack is 8 half units in the last place. SAELens rounds product, bias, decoder norm and its product
        # (gated: exp, weight, product, bias), we once: 5; at a border two latents' values meet: 8.
        require_within("encode", theirs, ours, slack, ~differ)
    same = finite.clone()
    same[finite] = ~differ.any(-1)
    return same


def require_within(what, theirs, ours, slack, where=True):
    """Equal up to slack; where that is no number, the pattern of NaN is all that is compared."""
    same = (theirs == ours) | (theirs.isnan() & ours.isnan())
    error = torch.where(
        same | torch.logical_not(torch.as_tensor(where)), 0.0, (theirs - ours).abs().nan_to_num(float("inf"))
    )
    slack = slack.nan_to_num(float("inf"))
    if not bool((error <= slack).all()):
        raise DifferenceError(f"{what}: differs by {float((error / slack).max()):.3g} of what rounding may do")


def _require_same_nan(what, theirs, ours):
    same = torch.equal(theirs.isnan().sum(-1), ours.isnan().sum(-1))
    require(same, f"{what}: NaN in {int(ours.isnan().any(-1).sum())} rows, plain {int(theirs.isnan().any(-1).sum())}")


def _on_a_border(sae, sae_in, slack):
    """Where the float64 pre-activation lies within rounding of what decides about the latent."""
    w_enc, w_dec = _weights(sae)
    product = sae_in @ w_enc
    pre = product + _encoder_bias(sae)
    if sae.cfg.architecture() == "gated":
        magnitude = product * sae.r_mag.detach().double().exp() + sae.b_mag.detach().double()
        return (pre.abs() <= slack) | (magnitude.abs() <= slack)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        pre = pre * w_dec.norm(dim=-1)
    if not hasattr(sae.activation_fn, "k"):
        return (pre - _border(sae)).abs() <= slack
    k = sae.activation_fn.k
    if not 0 < k < pre.shape[-1]:
        return pre.abs() <= slack
    pre = pre.abs() if sae.cfg.architecture() == "abstopk" else pre
    border = pre.topk(k + 1, dim=-1).values[..., -2:].mean(-1, keepdim=True)
    return ((pre - border).abs() <= slack) | (pre.abs() <= slack)


def _has_close_race(sae, sae_in):
    """Rows in which two atoms are equally good within rounding at some step, or a stop is decided by it."""
    atoms = sae.W_dec.detach().double()
    slack = 30 * TOLERANCE[sae.dtype] * sae_in.norm(dim=-1) * atoms.norm(dim=-1).max().clamp(min=1)
    residual, close = sae_in.clone(), torch.zeros(len(sae_in), dtype=torch.bool)
    for _ in range(sae.cfg.max_iterations or sae.cfg.d_in):
        best = (residual @ atoms.T).topk(2, dim=-1)
        close |= (best.values[:, 0] - best.values[:, 1] <= slack) | (best.values[:, 0] <= slack)
        atom = atoms[best.indices[:, 0]]
        residual = residual - (residual * atom).sum(-1, keepdim=True).relu() * atom
        close |= (residual.norm(dim=-1) - sae.cfg.residual_threshold).abs() <= slack
    return close


@torch.no_grad()
def same_output(what, sae, x, acts, size, theirs, ours, *, rows=None):
    """Outputs that agree up to the rounding of sums over latents of these sizes [..., d_sae]."""
    _, w_dec = _weights(sae)
    bound = size @ w_dec.abs() + sae.b_dec.detach().double().abs()
    flat_x = x.detach().double().reshape(*acts.shape[:-1], sae.cfg.d_in)
    if _normalises(sae) and bound.shape[-1] == sae.cfg.d_in:
        bound = (bound + 1) * 2 * flat_x.norm(dim=-1, keepdim=True) / sae.cfg.d_in**0.5
    if what == "forward" and sae.use_error_term and bound.shape[-1] == sae.cfg.d_in:
        bound = bound + flat_x.abs()
    if what == "forward" and "W_skip" in sae._parameters:
        bound = bound + flat_x.abs() @ sae.W_skip.detach().double().abs().T
    bound = (bound.reshape(-1, bound.shape[-1]) + 1e-30) * 10 * TOLERANCE[sae.dtype] * _hooked_scale(sae)
    theirs, ours = (each.detach().double().reshape(bound.shape) for each in (theirs, ours))
    kept = torch.ones(len(bound), dtype=torch.bool) if rows is None else rows
    _require_same_nan(what, theirs[kept], ours[kept])
    require_within(what, theirs[kept], ours[kept], bound[kept])


def _gradients(sae, x):
    """Latents, and the gradients of a sum over decode(encode(x)) by name."""
    own = x.detach().clone().requires_grad_()
    acts = sae.encode(own)
    out = sae.decode(acts)
    weights = torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape).to(out.dtype)
    wanted = {"x": own} | {name: p for name, p in sae.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((out * weights).sum(), list(wanted.values()), allow_unused=True)
    return acts.detach().to_dense(), dict(zip(wanted, found, strict=True))


def same_gradients(plain, fast, x):
    """Of the parameters and of x, where the twins have the same latents."""
    (theirs, their_error), (ours, our_error) = answer(_gradients, plain, x), answer(_gradients, fast, x)
    told = f"gradients: accelerated {_told(ours, our_error)}, plain {_told(theirs, their_error)}"
    require(type(their_error) is type(our_error), told)
    if their_error is not None or not torch.equal(theirs[0] != 0, ours[0] != 0) or not bool(theirs[0].isfinite().all()):
        return
    require(theirs[1].keys() == ours[1].keys(), "other gradients")
    for name, one in theirs[1].items():
        other = ours[1][name]
        require((one is None) == (other is None), f"gradient of {name}: None on one side")
        if one is not None and bool(one.isfinite().all()):
            slack = 300 * TOLERANCE[plain.dtype] * one.double().abs().max() + 1e-30
            require_within(f"gradient of {name}", one.double(), other.double(), slack)


# Whether a call has to be fast


def excuse(sae, x, acts):
    """Why an accelerated SAE in this state may answer through SAELens; "" where it has to be fast."""
    with torch.no_grad():
        finite = all(bool(parameter.isfinite().all()) for parameter in sae.parameters())
    activation = sae.activation_fn
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or sae.W_dec.requires_grad or sae.b_dec.requires_grad)
    pursuit = sae.cfg.architecture() == "matching_pursuit"
    rules = (
        (sae.cfg.architecture() in NEVER_FAST, NEVER_FAST.get(sae.cfg.architecture())),
        (not SCREENS and not pursuit, "no kernel for this processor"),
        (not finite, "weights are not finite"),
        (any(version_of(p) is None for p in sae.parameters()), "weights made in inference mode"),
        ({p.dtype for p in sae.parameters()} != {sae.dtype}, "mixed dtypes"),
        (
            getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) and not bool(sae.W_dec.any(dim=1).all()),
            "a decoder row is 0",
        ),
        (bool(sae.hook_sae_acts_pre._forward_hooks), "hook_sae_acts_pre"),
        (bool(sae.hook_sae_acts_post._forward_hooks), "hook_sae_acts_post"),
        (type(activation).__name__ not in ("ReLU", "TopK"), "activation function"),
        (getattr(activation, "use_sparse_activations", False), "sparse latents"),
        (getattr(activation, "k", 0) > K_SHARE * sae.cfg.d_sae, "k"),
        (pursuit and wants_grad, "gradients of a pursuit"),
        (pursuit and sae.dtype.itemsize < 4, "16-bit pursuit"),
        (pursuit and bool(sae.hook_sae_input._forward_hooks), "hooked pursuit"),
        (acts is None or float((acts != 0).float().mean()) > DENSE, "dense latents"),
    )
    return next((reason for holds, reason in rules if holds), "")


def require_fast(fast):
    """Encode, decode and forward are each fast within some calls."""
    slow, reasons = _slow_methods(fast)
    if slow and reasons == {TOO_MANY}:
        dm.refresh(fast)  # ends a wait that the weights before an edit have earned
        slow, reasons = _slow_methods(fast)
    excused = reasons == {TOO_MANY} and is_hard_to_screen(fast, tokens(fast, Draw(5), N_TOKENS))
    require(not slow or excused, f"{slow}: never fast in {TRIES} calls: {reasons}")


def _slow_methods(fast):
    """Which of encode, decode and forward are not fast once in some calls, and the reasons of these calls."""
    draw, before = Draw(5), dm.stats(fast)
    for _ in range(TRIES):
        x = tokens(fast, draw, N_TOKENS)
        fast.decode(fast.encode(x)), fast(x)
        now = dm.stats(fast)
        slow = [name for name in ("encode", "decode", "forward") if now.fast.get(name) == before.fast.get(name)]
        if not slow:
            return [], set()
    counts = {(name, why): n for name, whys in before.fallback.items() for why, n in whys.items()}
    return slow, {why for name in slow for why, n in now.fallback[name].items() if n > counts.get((name, why), 0)}


@torch.no_grad()
def is_hard_to_screen(sae, x):
    """Whether the package may hand most tokens back: too few latents to choose from, or too many near what decides.

    A topk that keeps more than one in eight of the different latents that are not constant has nothing to screen. Else a
    token is given up with 64 candidates (csrc/cpu/screened.h): here with 64 different latents whose float64 score is above
    the border or below it by less than an 8-bit code of x and one of the latent can lose, 5 % of |x| |w|.
    """
    w_enc, w_dec = _weights(sae)
    _, sae_in = _seen_encode(sae, x)
    sae_in = sae_in.reshape(-1, sae.cfg.d_in).double()
    rescales = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    gain = w_dec.norm(dim=-1) if rescales else torch.ones(len(w_dec), dtype=torch.float64)
    latents = torch.cat([w_enc, _encoder_bias(sae)[None], gain[None], _border(sae)[None]])
    w_enc, bias, gain, border = latents[:, w_enc.any(dim=0)].unique(dim=1).split([sae.cfg.d_in, 1, 1, 1])
    k = getattr(sae.activation_fn, "k", 0)
    if 8 * k > w_enc.shape[1]:
        return True
    score = (sae_in @ w_enc + bias) * gain
    border = score.topk(k, dim=-1).values[:, -1:] if k else border
    near = score >= border - 0.05 * sae_in.norm(dim=-1, keepdim=True) * w_enc.norm(dim=0) * gain
    return float((near.sum(-1) >= 64).float().mean()) > 0.25


def _border(sae):
    """What a pre-activation has to exceed, [d_sae]; 0 where the others decide."""
    threshold = sae._parameters.get("threshold")
    return torch.zeros(sae.cfg.d_sae, dtype=torch.float64) if threshold is None else threshold.double().clamp(min=0)


# Lives


@dataclass
class Twins:
    plain: torch.nn.Module
    fast: torch.nn.Module
    others: list = field(default_factory=list)  # earlier copies, which have to answer as well

    def edit(self, name, seed):
        edit = EDITS[name][0]
        before = self.plain, self.fast
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (plain, their_error), (fast, our_error) = (answer(edit, sae, Draw(seed)) for sae in before)
        same = type(their_error) is type(our_error)
        require(same, f"accelerated {_told(fast, our_error)}, plain {_told(plain, their_error)}")
        self.plain = self.plain if plain is None else plain
        self.fast = self.fast if fast is None else dm.accelerate(fast)
        if self.plain is not before[0] and self.fast is not before[1]:
            self.others = [*self.others[-2:], before]

    def check(self, seed):
        draw = Draw(seed)
        if self.others and draw.random() < 0.1:
            here = self.plain, self.fast
            self.plain, self.fast = self.others.pop(0)
            self.others.append(here)
        self._same_state()
        mode = draw.choice((nullcontext, nullcontext, torch.no_grad, torch.no_grad, torch.inference_mode))
        with mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dtype = draw.choice((None,) * 9 + (torch.float32, torch.bfloat16))
            x = tokens(self.plain, draw, N_TOKENS, dtype=dtype)
            acts = assert_alike(self.plain, self.fast, x)
            if draw.random() < 0.4:
                assert_alike(self.plain, self.fast, odd_tokens(self.plain, draw))
            if acts is not None and draw.random() < 0.1:
                self._other_calls(draw, x)
            if not excuse(self.plain, x, acts):
                require_fast(self.fast)
        if acts is not None and mode is nullcontext and draw.random() < 0.3:
            same_gradients(self.plain, self.fast, x)

    def _same_state(self):
        """The edit itself did the same to both."""
        theirs, ours = self.plain.state_dict(), self.fast.state_dict()
        require(theirs.keys() == ours.keys(), "other parameters")
        for name, value in theirs.items():
            same = value.dtype == ours[name].dtype and torch.equal(value.nan_to_num(7.0), ours[name].nan_to_num(7.0))
            require(same, f"the edit left another {name}")
        require(self.plain.cfg.to_dict() == self.fast.cfg.to_dict(), "another configuration")

    def _other_calls(self, draw, x):
        """The sparse calls and calls from several threads: what encode gives."""
        fast = self.fast
        acts, sae_in = _seen_encode(self.plain, x)
        others = [] if acts.is_sparse else [fast.encode_sparse(x).to_dense()]
        if not _normalises(fast):  # its state is on the SAE
            with ThreadPoolExecutor(3) as pool:
                mode = torch.is_grad_enabled()
                others += pool.map(lambda _: _in_mode(mode, fast.encode, x), range(4))
        for other in others:
            same_acts(self.plain, sae_in, acts.detach().to_dense(), other.detach().to_dense())


def _in_mode(grad, function, *args):
    with torch.set_grad_enabled(grad):
        return function(*args)


class LifeError(AssertionError):
    """A life that failed, told as the shortest one that does."""


def replay(config, edits):
    """One life: [(name of an edit, seed), ...]; returns (edits, fast calls)."""
    torch.manual_seed(0)
    twins = Twins(config.build(), dm.accelerate(config.build()))
    twins.check(0)
    for number, (name, seed) in enumerate(edits):
        try:
            twins.edit(name, seed)
            twins.check(seed)
        except Exception as error:
            told = str(error).splitlines()[0]
            raise LifeError(f"edit {number} ({name}): {type(error).__name__}: {told}") from error
    return twins


def failure(config, edits):
    """What goes wrong in a life, "" if nothing."""
    try:
        replay(config, edits)
    except (LifeError, DifferenceError) as error:
        return str(error)
    return ""


def shortest(config, edits):
    """The edits of a failing life without those that are not needed for it to fail."""
    edits = list(edits)
    for length in (len(edits) // 2, len(edits) // 4, 1, 1):
        start = len(edits)
        while length and (start := start - length) > -length:
            fewer = edits[: max(start, 0)] + edits[start + length :]
            if len(fewer) < len(edits) and failure(config, fewer):
                edits = fewer
    return edits


def drawn_life(seed, n_edits):
    """Configuration and edits of one life."""
    draw = random.Random(seed)
    names, weights = list(EDITS), [weight for _, weight in EDITS.values()]
    config = Config.drawn(draw)
    return config, [(name, draw.randrange(10**6)) for name in draw.choices(names, weights, k=n_edits)]


def live(seed, n_edits):
    """Lives one life; a failure names the shortest list of edits that leads to it."""
    config, edits = drawn_life(seed, n_edits)
    if failure(config, edits):
        edits = shortest(config, edits)
        raise LifeError(f"life {seed}: {failure(config, edits)}\nreplay({config}, {copy.copy(edits)})")
