"""`darkmatter check-sae`: one SAE, plain and accelerated, side by side on the same activations.

Active sets may differ only where rounding decides: SAELens sums in the dtype of the weights, the ops in float64, so a
pre-activation within that rounding of the threshold, or of the k-th value, can fall on either side.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from darkmatter_ext.runtime.inputs import InputError, told
from darkmatter_ext.saes.architectures import architecture_of, weight
from darkmatter_ext.saes.drop_in import Stats, accelerate, deaccelerate, stats
from darkmatter_ext.saes.formats.layout import unpickled
from darkmatter_ext.saes.loading import load_sae
from darkmatter_ext.saes.sanity import signs

# Relative to the size of the compared sums; a few hundred roundings of the dtype.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PLANTED_LATENTS = 24  # latents whose directions make up a random activation; fewer in a small SAE
GRADIENT_TOKENS = 64


@dataclass(frozen=True)
class Comparison:
    """One quantity on one set of activations; found is a count of latents or the largest relative error."""

    data: str
    quantity: str
    found: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.found <= self.limit


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one call, SAELens and accelerated."""

    call: str
    plain_ms: float
    fast_ms: float


@dataclass(frozen=True)
class Verdict:
    """Result of check_sae."""

    comparisons: list[Comparison]
    timings: list[Timing]
    stats: Stats
    signs: list[str]  # what makes the SAE look misloaded, see `sanity.signs`

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)


def load_any(source: str, sae_id: str | None, dtype: str | None = None, activation_scale: float | None = None) -> Any:
    """Load a folder, or a release of SAELens' list (downloading it). Raises the errors of `loading.load_sae`."""
    spec = source if sae_id is None else f"{source}:{sae_id}"
    return load_sae(spec, dtype=dtype, activation_scale=activation_scale)


def read_activations(path: Path, d_in: int) -> Tensor:
    """Read [N, d_in] from a .safetensors file (its first tensor), a .npy or a .pt file; leading dimensions are flattened.

    Raises ValueError if the file is none of these or has another last dimension.
    """
    with told("activations", "must be a .safetensors, .npy or .pt tensor", path):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            x = next(iter(load_file(path).values()))
        elif path.suffix == ".npy":
            import numpy as np

            x = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            x = unpickled(path)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1 or x.shape[-1] != d_in or x.numel() == 0:
        given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"activations: must be floating point of shape [..., {d_in}], got {given} in {path}")
    return x.reshape(-1, d_in)


@torch.no_grad()
def random_activations(sae: Any, n: int, seed: int) -> Tensor:
    """[n, d_in]: sums of encoder directions strong enough to activate their latents, plus noise."""
    g = torch.Generator().manual_seed(seed)
    W_enc = sae.W_enc.detach().float()
    planted = max(1, min(PLANTED_LATENTS, W_enc.shape[0] // 32))
    chosen = torch.randint(W_enc.shape[1], (n, planted), generator=g)
    threshold = architecture_of(type(sae)).threshold(sae, chosen).float()
    strength = (threshold.clamp(min=0) + 1) * (1 + torch.rand(chosen.shape, generator=g))
    directions = W_enc / W_enc.square().sum(0).clamp(min=1e-12)
    x = torch.stack([directions[:, latents] @ s for latents, s in zip(chosen, strength, strict=True)])
    x = x + 0.1 * x.std() * torch.randn(x.shape, generator=g)
    if sae.cfg.apply_b_dec_to_input:
        x = x + sae.b_dec.detach().float()
    return x.to(sae.dtype)


def _pre_activations(sae: Any, sae_in: Tensor, tokens: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """float64 pre-activations of the given (token, latent) pairs, and the size of their sums."""
    architecture = architecture_of(type(sae))
    bias = weight(sae, architecture.bias)
    x, w, b = sae_in[tokens].double(), sae.W_enc.mT[latents].double(), bias[latents].double()
    unit = sae.W_dec[latents].double().norm(dim=-1) if architecture.rescales(sae) else 1.0
    return ((x * w).sum(-1) + b) * unit, (x.norm(dim=-1) * w.norm(dim=-1) + b.abs()) * unit


@torch.no_grad()
def _compare_latents(plain: Any, data: str, x: Tensor, theirs: Tensor, ours: Tensor) -> list[Comparison]:
    tolerance = TOLERANCE[plain.dtype]
    theirs, ours = (acts.reshape(-1, acts.shape[-1]) for acts in (theirs, ours))
    sae_in = plain.process_sae_in(x).reshape(len(theirs), -1)
    tokens, latents = ((theirs > 0) != (ours > 0)).nonzero(as_tuple=True)
    pre, scale = _pre_activations(plain, sae_in, tokens, latents)
    architecture = architecture_of(type(plain))
    border = architecture.border(plain, latents, theirs[tokens]).double()
    unexplained = int(((pre - border).abs() > tolerance * scale).sum())
    at_border = len(tokens) - unexplained
    both = ((theirs > 0) & (ours > 0)).nonzero(as_tuple=True)
    _, scale = _pre_activations(plain, sae_in, *both)
    magnification = architecture.magnification(plain, both[1]).double()
    error = (theirs[both].double() - ours[both].double()).abs() / (scale * magnification)
    return [
        Comparison(
            data, f"latents that differ (of {int((ours > 0).sum())}; {at_border} more at the border)", unexplained, 0
        ),
        Comparison(data, "value of a latent, relative to its sum", _largest(error), tolerance),
    ]


def _largest(error: Tensor) -> float:
    return error.max().item() if error.numel() else 0.0


def _relative(theirs: Tensor, ours: Tensor) -> float:
    """Largest relative error of a row."""
    if theirs.numel() == 0:
        return 0.0
    theirs, ours = (t.detach().double().reshape(len(t), -1) for t in (theirs, ours))
    return _largest((theirs - ours).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-300))


def _gradients(sae: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    sae.requires_grad_(True)
    sae(x).double().square().sum().backward()
    found = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None} | {"x": cast("Tensor", x.grad)}
    sae.zero_grad(set_to_none=True)
    sae.requires_grad_(False)
    return found


def _compare(plain: Any, fast: Any, data: str, x: Tensor) -> list[Comparison]:
    tolerance = TOLERANCE[plain.dtype]
    with torch.no_grad():
        theirs, ours = plain.encode(x), fast.encode(x)
        results = _compare_latents(plain, data, x, theirs, ours)
        plain.process_sae_in(x)  # normalisation keeps its state for the following decode
        fast.process_sae_in(x)
        results.append(Comparison(data, "decode", _relative(plain.decode(theirs), fast.decode(theirs)), tolerance))
        same = ((theirs > 0) == (ours > 0)).flatten(1).all(-1)
        kept = x[same]
        results.append(
            Comparison(
                data,
                f"forward ({len(kept)} tokens with the same latents)",
                _relative(plain(kept), fast(kept)),
                tolerance,
            )
        )
    theirs, ours = (_gradients(sae, kept[:GRADIENT_TOKENS]) for sae in (plain, fast))
    error = max((_relative(theirs[name][None], ours[name][None]) for name in theirs), default=0.0)
    if theirs.keys() != ours.keys():
        error = float("inf")
    results.append(
        Comparison(
            data, f"gradients of x and all weights ({min(len(kept), GRADIENT_TOKENS)} of these)", error, 10 * tolerance
        )
    )
    return results


def _timed(call: str, plain: Callable[[], Any], fast: Callable[[], Any], rounds: int) -> Timing:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for function, own in zip((plain, fast), times, strict=True):
            start = time.perf_counter()
            function()
            own.append(1e3 * (time.perf_counter() - start))
    return Timing(call, *(statistics.median(own[1:]) for own in times))  # the first round warms up


@torch.no_grad()
def _timings(plain: Any, fast: Any, x: Tensor, rounds: int) -> list[Timing]:
    found = [
        _timed("encode", lambda: plain.encode(x), lambda: fast.encode(x), rounds),
        _timed(
            "encode, then decode", lambda: plain.decode(plain.encode(x)), lambda: fast.decode(fast.encode(x)), rounds
        ),
        _timed("sae(x)", lambda: plain(x), lambda: fast(x), rounds),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        plain.use_error_term = fast.use_error_term = True
        found.append(_timed("sae(x) with error term", lambda: plain(x), lambda: fast(x), rounds))
        plain.use_error_term = fast.use_error_term = False
    return found


def check_sae(
    sae: Any,
    given: Tensor | None = None,
    *,
    n_tokens: int = 1024,
    seed: int = 0,
    rounds: int = 5,
    expected_l0: float | None = None,
) -> Verdict:
    """Compare a SAELens SAE with its accelerated copy: active sets, values, reconstructions, gradients, times.

    Also checks whether the SAE looks misloaded, from its weights and, if given, from activations it was made for.

    Args:
        sae: a SAELens SAE that can be accelerated; left unchanged.
        given: activations [N, d_in] to compare on besides random ones, or None.
        n_tokens: number of random activations, and the most of the given ones to use.
        rounds: timed rounds, alternating between SAELens and accelerated.
        expected_l0: active latents per token it was made for (`loading.describe_sae`); default: its k.

    Raises ValueError for an SAE that cannot be accelerated, or for settings below 1.
    """
    for name, value in (("tokens", n_tokens), ("rounds", rounds)):
        if value < 1:
            raise InputError(f"{name}: must be at least 1, got {value}")
    plain, fast = deaccelerate(copy.deepcopy(sae)), accelerate(copy.deepcopy(sae))
    for each in (plain, fast):
        each._setup_activation_normalization()  # a copy's closures write to the original
    data = {"random": random_activations(plain, n_tokens, seed)}
    if given is not None:
        data["given"] = given[:n_tokens]
    if sae.hook_z_reshaping_mode:
        for each in (plain, fast):
            each.turn_on_forward_pass_hook_z_reshaping()
        data = {name: x.unsqueeze(-2) for name, x in data.items()}
    comparisons = [row for name, x in data.items() for row in _compare(plain, fast, name, x)]
    timings = _timings(plain, fast, data.get("given", data["random"]), rounds)
    return Verdict(comparisons, timings, stats(fast), signs(sae, given, expected_l0=expected_l0))
