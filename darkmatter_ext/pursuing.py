"""Encoders that use an SAE's dictionary otherwise than its own encoder does: pursuit from zero, a refit of its latents.

Both spend exactly the SAE's own L0, token by token. Gradient pursuit at the SAE's L0 is how Engels et al. ask whether
nonlinear error is what a better encoder would remove.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from darkmatter_ext.batched_pursuit import METHODS, prepare_dictionary, pursuit, refit
from darkmatter_ext.drop_in import accelerate
from darkmatter_ext.encoders import for_flat_activations
from darkmatter_ext.ops import sparse_decode
from darkmatter_ext.sae import Encoded, Encoder
from darkmatter_ext.sparse import SparseActs

if TYPE_CHECKING:
    from sae_lens import SAE

Choose = Callable[[Tensor, SparseActs], SparseActs]  # x [n, d] and the SAE's own acts -> other acts


def pursuit_encoder(sae: SAE, *, method: str = "gradient") -> Encoder:
    """Pursuit over W_dec from zero, with as many steps at each token as the SAE has active latents there.

    Args:
        sae: left as it is; a twin on its weights is accelerated.
        method: of METHODS; orthogonal is the non-negative form.

    Raises ValueError for another method, or an SAE with maps that pursuit knows nothing of. Cost: see
    `batched_pursuit.pursuit`.
    """
    if method not in METHODS:
        raise ValueError(f"--method: must be one of {', '.join(METHODS)}, got {method!r}")
    sae = for_flat_activations(sae)
    dictionary, bias = _dictionary(sae)

    def choose(x: Tensor, acts: SparseActs) -> SparseActs:
        steps = acts.l0().clamp(max=dictionary.n_atoms)
        return pursuit(x, dictionary, steps, bias=bias, method=method, nonnegative=method == "orthogonal")

    return _encoder(sae, dictionary.rows.to(dictionary.dtype), choose)


def refit_encoder(sae: SAE) -> Encoder:
    """The SAE's own choice of latents with least-squares values (not below zero). Raises as `pursuit_encoder`."""
    sae = for_flat_activations(sae)
    dictionary, bias = _dictionary(sae)
    return _encoder(sae, dictionary.rows.to(dictionary.dtype), lambda x, acts: refit(x, acts, dictionary, bias=bias))


def _dictionary(sae: Any) -> tuple[Any, Tensor]:
    """W_dec, packed, and b_dec. Raises ValueError unless Sae(x) is what they add up to: no other maps between."""
    cfg = sae.cfg
    plain = cfg.normalize_activations == "none" and cfg.reshape_activations == "none"
    if not plain or sae.W_dec.shape[1] != cfg.d_in or getattr(cfg, "rescale_acts_by_decoder_norm", False):
        raise ValueError(
            "--sae: must be without normalisation, reshaping or another output site for pursuit, "
            f"got {cfg.architecture()} with {cfg.normalize_activations}, {cfg.reshape_activations}"
        )
    accelerate(sae)
    return prepare_dictionary(sae.W_dec), sae.b_dec.detach()


def _encoder(sae: Any, rows: Tensor, choose: Choose) -> Encoder:
    """`rows` [F, d]: the decoder in the dtype of the acts, float32 for a 16-bit SAE."""
    bias = sae.b_dec.detach().to(rows.dtype)

    def encode(x: Tensor) -> Encoded:
        own = x.to(sae.dtype)
        acts = choose(own, sae.encode_sparse(own))
        x_hat = sparse_decode(acts, rows, bias)
        return Encoded(x_hat.to(x.dtype), acts.l0(), acts)

    return encode
