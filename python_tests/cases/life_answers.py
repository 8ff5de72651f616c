"""What it means that an accelerated SAE answers as its plain twin: the same but for rounding. For cases.lives."""

import torch

from cases.saes import TOLERANCE


class DifferenceError(AssertionError):
    """The twins do not answer alike."""


def require(holds, message):
    if not holds:
        raise DifferenceError(message)


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
        f"{what}: accelerated {outcome(ours, our_error)}, plain {outcome(theirs, their_error)}",
    )
    return None


def outcome(value, error):
    return "answers" if error is None else f"raises {type(error).__name__}: {str(error).splitlines()[0]}"


def seen_encode(sae, x):
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
    acts = both("encode", lambda: seen.append(seen_encode(plain, x)) or seen[0][0], lambda: fast.encode(x))
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


def normalises(sae):
    """Whether activations are normalised token by token; a fold changes the configuration but not this."""
    return sae.run_time_activation_norm_fn_in.__name__ != "<lambda>"


def wide_weights(sae):
    return sae.W_enc.detach().double(), sae.W_dec.detach().double()


def encoder_bias(sae):
    bias = next((sae._parameters[n] for n in ("b_gate", "b_enc") if sae._parameters.get(n) is not None), None)
    return torch.zeros((), dtype=torch.float64) if bias is None else bias.detach().double()


def _hooked_scale(sae):
    """What the scaling hooks of life_edits multiply a value with, at most."""
    return 1.5 ** sum(len(point._forward_hooks) for point in sae.hook_dict.values())


@torch.no_grad()
def _value_scale(sae, sae_in):
    """Size of the sums whose rounding is compared, [..., d_sae]."""
    w_enc, w_dec = wide_weights(sae)
    scale = sae_in.double().norm(dim=-1, keepdim=True) * w_enc.norm(dim=0) + encoder_bias(sae).abs()
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
    w_enc, w_dec = wide_weights(sae)
    product = sae_in @ w_enc
    pre = product + encoder_bias(sae)
    if sae.cfg.architecture() == "gated":
        magnitude = product * sae.r_mag.detach().double().exp() + sae.b_mag.detach().double()
        return (pre.abs() <= slack) | (magnitude.abs() <= slack)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        pre = pre * w_dec.norm(dim=-1)
    if not hasattr(sae.activation_fn, "k"):
        return (pre - own_border(sae)).abs() <= slack
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
    _, w_dec = wide_weights(sae)
    bound = size @ w_dec.abs() + sae.b_dec.detach().double().abs()
    flat_x = x.detach().double().reshape(*acts.shape[:-1], sae.cfg.d_in)
    if normalises(sae) and bound.shape[-1] == sae.cfg.d_in:
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
    told = f"gradients: accelerated {outcome(ours, our_error)}, plain {outcome(theirs, their_error)}"
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


def own_border(sae):
    """What a pre-activation has to exceed, [d_sae]; 0 where the others decide."""
    threshold = sae._parameters.get("threshold")
    return torch.zeros(sae.cfg.d_sae, dtype=torch.float64) if threshold is None else threshold.double().clamp(min=0)
