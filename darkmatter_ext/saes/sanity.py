"""Does an SAE look misloaded? Signs in its weights and a few activations, each in one line with its likely cause.

A wrongly loaded SAE gives numbers without an error: lost thresholds, TopK read as ReLU, scaling left out or applied twice,
the wrong decoder. The signs checked here never appear in a working SAE. They are reported but never raise an error.

Shapes: n tokens, d width, F latents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from darkmatter_ext.saes.encoders import Encode, as_encoder
from darkmatter_ext.saes.flat_activations import why_not_usable

SAMPLE_TOKENS = 512  # gives FVU and L0 to a few percent, and is cheap compared with loading the weights
ROWS = 8192  # latents processed together: the widest public SAEs have a million
FAR = 2.0  # times the expected L0: other text moves L0 by a third, a lost threshold by far more
FEW = 3.0  # latents: an L0 this close to the expected one is never far
NORM_SPREAD = 1.1  # largest over smallest norm of decoder rows that count as normalised; bfloat16 rounding gives 1.01
LEAST_COSINE = (
    0.05  # mean cosine of latents' encoder and decoder directions: trained pairs reach 0.3 and more, strangers 0
)
UNUSUAL_NORM = 10.0  # medians: tokens above are attention sinks, such as BOS
BETTER = 0.5  # a change that leaves less than this share of the FVU is the likely cause
SCALES = tuple(2.0**power for power in range(-12, 13))


def expects_normalised_rows(architecture: str, metadata: Mapping[str, Any]) -> bool:
    """Whether an SAE's files say that all rows of its decoder have the same norm."""
    if "normalize_decoder" in metadata:
        return bool(metadata["normalize_decoder"])
    training = metadata.get("training_architecture_details") or {}
    folded = training.get("rescale_acts_by_decoder_norm") and architecture == "jumprelu"  # at saving, into the encoder
    return bool(folded) and training.get("normalize_activations") != "covariance_whitening"


@torch.no_grad()
def weight_signs(sae: Any) -> list[str]:
    """Signs from the weights alone. Cost: one pass over encoder and decoder."""
    return list(_weight_signs(sae))


def _weight_signs(sae: Any) -> Iterator[str]:
    if reason := why_not_usable(sae):
        yield f"the SAE {reason}: activations as they are have another scale than in its training"
    threshold, W_dec, W_enc = (getattr(sae, name, None) for name in ("threshold", "W_dec", "W_enc"))
    if threshold is not None:
        positive = int((threshold > 0).sum())
        if positive == 0 and not bool((threshold < 0).any()):
            yield "every threshold is 0: thresholds lost, or another architecture read as jumprelu"
        elif positive < threshold.numel() / 2:
            yield (
                f"{threshold.numel() - positive} of {threshold.numel()} thresholds are not above 0: "
                "logarithms read as thresholds, or thresholds lost"
            )
    if not isinstance(W_dec, Tensor) or W_dec.ndim != 2:
        return
    norms, cosines = decoder_rows(W_dec, W_enc if isinstance(W_enc, Tensor) else None)
    used = norms[norms > 0]
    if not len(used):
        yield "the decoder is all zeros: weights lost"
        return
    metadata = sae.cfg.metadata.to_dict() if hasattr(sae.cfg.metadata, "to_dict") else {}
    least, most = used.min().item(), used.max().item()
    if expects_normalised_rows(sae.cfg.architecture(), metadata) and most > NORM_SPREAD * least:
        yield (
            f"decoder rows have norms {least:.3g} to {most:.3g} where its files say they are normalised: "
            "norms folded once too often, or another tensor read as the decoder"
        )
    if cosines is not None and "transcoder" not in sae.cfg.architecture():
        cosine = cosines[norms > 0].mean().item()
        if cosine < LEAST_COSINE:
            yield (
                f"encoder and decoder directions of a latent have cosine {cosine:.2f} in the mean: "
                "decoder transposed, reordered, negated or of another SAE"
            )


def decoder_rows(W_dec: Tensor, W_enc: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Norm of each decoder row [F], and its cosine with the encoder column. Memory: ROWS rows at a time in float32."""
    norms, cosines = [], []
    paired = W_enc is not None and W_enc.shape == W_dec.mT.shape
    for start in range(0, len(W_dec), ROWS):
        rows = W_dec[start : start + ROWS].float()
        norms.append(rows.norm(dim=1))
        if W_enc is not None and paired:
            columns = W_enc[:, start : start + ROWS].mT.float()
            cosines.append(torch.nn.functional.cosine_similarity(columns, rows, dim=1))
    return torch.cat(norms), torch.cat(cosines) if paired else None


def known_l0(sae: Any) -> float | None:
    """The L0 that a TopK SAE was made for; None if only its files can tell (`loading.describe_sae`)."""
    k = getattr(getattr(sae, "activation_fn", None), "k", None)
    return None if k is None else float(k)


def _fvu(encode: Encode, x: Tensor, target: Tensor | None = None) -> tuple[float, float]:
    """FVU about the mean, and mean L0, for x [n, d] or for the `target` of x; FVU is NaN if that does not vary."""
    encoded, y = encode(x), x if target is None else target
    error, variance = (t.double().square().sum() for t in (y - encoded.x_hat, y - y.mean(0)))
    return (error / variance).item() if variance > 0 else math.nan, encoded.l0.double().mean().item()


def _changes(sae: Any, encode: Encode, x: Tensor) -> Iterator[tuple[str, Callable[[], float]]]:
    """Possible explanations of a wrong reconstruction, each with the FVU that would remain."""

    def at_scale(factor: float) -> float:
        return _fvu(lambda given: _scaled_back(encode(given * factor), factor), x)[0]

    best = min(SCALES, key=lambda factor: _or_infinite(at_scale(factor)))
    if best != 1:
        yield f"activations times {best:g} (scaling left out, or applied twice)", lambda: at_scale(best)
    norms = x.norm(dim=-1)
    usual = norms <= UNUSUAL_NORM * norms.median()
    if not bool(usual.all()):
        found = f"without the {int((~usual).sum())} tokens above {UNUSUAL_NORM:g} medians (BOS, attention sinks)"
        yield found, lambda: _fvu(encode, x[usual])[0]
    centred = x - x.mean(-1, keepdim=True)
    yield (
        "activations centred over dimensions (processed weights left out)",
        lambda: _fvu(encode, centred)[0],
    )
    if hasattr(sae.cfg, "apply_b_dec_to_input"):
        other = copy.copy(sae)
        other.cfg = copy.copy(sae.cfg)
        other.cfg.apply_b_dec_to_input = not sae.cfg.apply_b_dec_to_input
        word = "not subtracted" if sae.cfg.apply_b_dec_to_input else "subtracted"
        yield f"b_dec {word} from the input (architecture read as another)", lambda: _fvu(as_encoder(other), x)[0]


def _scaled_back(encoded: Any, factor: float) -> Any:
    return encoded._replace(x_hat=encoded.x_hat / factor)


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


_OTHERWISE = "another site, model, dtype or BOS than in its training, or an architecture read as another"


def _cause(sae: Any, encode: Encode, x: Tensor, fvu: float) -> str:
    """The change that explains most of the FVU, or what else to check."""
    tried = [(_or_infinite(left()), what) for what, left in _changes(sae, encode, x)]
    left, what = min(tried, default=(math.inf, ""))
    if left < min(BETTER * fvu, 1):
        return f"{what} would leave {left:.2g}"
    return _OTHERWISE


@torch.no_grad()
def signs(
    sae: Any,
    x: Tensor | None = None,
    target: Tensor | None = None,
    *,
    expected_l0: float | None = None,
    encode: Encode | None = None,
) -> list[str]:
    """Everything that makes an SAE look misloaded, one line each; none for a working SAE.

    Args:
        sae: a SAELens SAE, left unchanged.
        x: activations [n, d] it was made for, heads flattened; at most SAMPLE_TOKENS are used. None: check only weights.
        target: what a transcoder should write at these tokens [n, d']. Without it only its weights are checked.
        expected_l0: mean active latents per token it was made for; default: its k.
        encode: `as_encoder(sae)`, if the caller already has it.

    Cost: `weight_signs` and one small encode; some twenty more if the reconstruction is wrong.
    """
    found = list(_weight_signs(sae))
    if x is None or why_not_usable(sae) or ("transcoder" in sae.cfg.architecture() and target is None):
        return found
    x, target = x[:SAMPLE_TOKENS].float(), None if target is None else target[:SAMPLE_TOKENS].float()
    encode = encode or as_encoder(sae)
    expected = known_l0(sae) if expected_l0 is None else expected_l0
    fvu, l0 = _fvu(encode, x, target)
    if math.isnan(fvu):
        found.append("FVU cannot be told: the activations are constant, or the SAE gives NaN on them")
    elif fvu > 1:
        cause = _cause(sae, encode, x, fvu) if target is None else _OTHERWISE
        found.append(f"FVU {fvu:.3g}, worse than the mean of the activations: {cause}")
    if (sign := _l0_sign(l0, expected, x.shape[1])) is not None:
        found.append(sign)
    return found


def _l0_sign(l0: float, expected: float | None, d_in: int) -> str | None:
    many = "k or thresholds lost, an architecture read as another, or activations scaled too large"
    few = "activations scaled too small, thresholds too high, or an architecture read as another"
    if expected is not None and abs(l0 - expected) > FEW and not expected / FAR <= l0 <= expected * FAR:
        return f"L0 {l0:.3g} where it was made with {expected:.3g}: {many if l0 > expected else few}"
    if expected is None and l0 > d_in:
        return f"L0 {l0:.3g}, more than the {d_in} dimensions it explains: {many}"
    if l0 < 0.1:
        return f"L0 {l0:.2g}, hardly any latent is ever active: {few}"
    return None


def misloaded(name: str, sign: str) -> str:
    """One sign, as a line in a result."""
    return f"{name} looks misloaded: {sign}."
