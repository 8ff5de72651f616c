"""The life of an accelerated SAE beside its plain twin: the same edits to both, and after each the same answers.

`replay` runs one life (cases.life_answers compares); where it fails, `shortest` finds the fewest edits that fail too.
"""

import copy
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from sae_lens.registry import get_sae_class

import darkmatter_ext as dm
from cases.life_answers import (
    DifferenceError,
    answer,
    assert_alike,
    encoder_bias,
    normalises,
    outcome,
    own_border,
    require,
    same_acts,
    same_gradients,
    seen_encode,
    wide_weights,
)
from cases.life_edits import EDITS, Draw
from cases.saes import TRANSCODERS
from darkmatter_ext.saes.architectures import FEW_PLACES
from darkmatter_ext.saes.packed_weights import version_of
from darkmatter_ext.saes.stepping_aside import TOO_MANY

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
    if not slow:
        return
    hard = reasons <= {TOO_MANY, FEW_PLACES} and is_hard_to_screen(fast, tokens(fast, Draw(5), N_TOKENS))
    require(hard, f"{slow}: never fast in {TRIES} calls: {reasons}")


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
    token is given up with 64 candidates (csrc/cpu/screen/candidates.h): here with 64 different latents whose float64
    score is above the border or below it by less than an 8-bit code of x and one of the latent can lose, 5 % of |x| |w|.
    """
    w_enc, w_dec = wide_weights(sae)
    _, sae_in = seen_encode(sae, x)
    sae_in = sae_in.reshape(-1, sae.cfg.d_in).double()
    rescales = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    gain = w_dec.norm(dim=-1) if rescales else torch.ones(len(w_dec), dtype=torch.float64)
    latents = torch.cat([w_enc, encoder_bias(sae)[None], gain[None], own_border(sae)[None]])
    w_enc, bias, gain, border = latents[:, w_enc.any(dim=0)].unique(dim=1).split([sae.cfg.d_in, 1, 1, 1])
    k = getattr(sae.activation_fn, "k", 0)
    if 8 * k > w_enc.shape[1]:
        return True
    score = (sae_in @ w_enc + bias) * gain
    border = score.topk(k, dim=-1).values[:, -1:] if k else border
    near = score >= border - 0.05 * sae_in.norm(dim=-1, keepdim=True) * w_enc.norm(dim=0) * gain
    return float((near.sum(-1) >= 64).float().mean()) > 0.25


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
        require(same, f"accelerated {outcome(fast, our_error)}, plain {outcome(plain, their_error)}")
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
        acts, sae_in = seen_encode(self.plain, x)
        others = [] if acts.is_sparse else [fast.encode_sparse(x).to_dense()]
        if not normalises(fast):  # its state is on the SAE
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
