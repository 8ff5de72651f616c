"""All ways from activations to a reconstruction with an SAE's latents: its own encoder, pursuit, a refit, and controls.

*Pursuit* and *refit* use an SAE's dictionary differently from its own encoder, at exactly the SAE's own L0 for each
token. Engels et al. use gradient pursuit at the SAE's L0 to ask whether a better encoder would remove the nonlinear error.

*Controls* have the same number of latents, but nothing learned. A result that also holds for a random dictionary is not
a result of training (sanity checks, 2602.14111).

Shapes: n tokens, d model dimension, F latents.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.decode import sparse_decode
from darkmatter_ext.ops.encode import prepare_encoder, topk_encode
from darkmatter_ext.ops.pursuit import METHODS, prepare_dictionary, pursuit, refit
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.drop_in import accelerate, is_accelerated
from darkmatter_ext.saes.flat_activations import for_flat_activations

if TYPE_CHECKING:
    from sae_lens import SAE


class Encoded(NamedTuple):
    """An SAE's output for activations [n, d]."""

    x_hat: Tensor  # [n, d]
    l0: Tensor  # [n] number of active latents
    acts: SparseActs  # [n, F]


Encode = Callable[[Tensor], Encoded]  # x [n, d] -> ...
Inputs = Mapping[str, Tensor]  # hook point -> [n, d]


@dataclass(frozen=True, eq=False)
class Encoder:
    """One named way from activations to a reconstruction: an SAE with its own encoder or another one, or a control.

    An SAE reads and writes the same hook point, a transcoder reads one and writes another, a crosscoder reads several.
    """

    name: str
    reads: tuple[str, ...]  # hook points it reads
    writes: str  # hook point it reconstructs
    d_sae: int
    load: Callable[[], Callable[[Inputs], Encoded]]
    weight_bytes: int = 0

    @classmethod
    def of_site(
        cls, name: str, hook: str, d_sae: int, load: Callable[[], Encode], *, weight_bytes: int = 0, writes: str = ""
    ) -> Encoder:
        """An encoder that reads one hook point and reconstructs it or, for a transcoder, the one named by `writes`."""

        def load_inputs() -> Callable[[Inputs], Encoded]:
            encode = load()
            return lambda x: encode(x[hook])

        return cls(name, (hook,), writes or hook, d_sae, load_inputs, weight_bytes)

    @property
    def site(self) -> str:
        """Where it is measured: see `site_name`."""
        return site_name(self.reads, self.writes)


def site_name(reads: tuple[str, ...], writes: str) -> str:
    """The name of a hook point that is both read and written; otherwise what is read `to` what is written."""
    return writes if writes in reads else f"{' and '.join(reads)} to {writes}"


TOPK_TRANSCODERS = ("topk_transcoder", "topk_skip_transcoder")  # see `topk_transcoders.py`
Choose = Callable[[Tensor, SparseActs], SparseActs]  # x [n, d] and the SAE's own acts -> other acts


def as_encoder(sae: SAE) -> Encode:
    """x [n, d] -> Sae(x), L0 and active latents. Sae(x) has the dtype of x and includes a transcoder's skip connection.

    Accelerated if possible; other SAEs (temporal, custom classes) run SAELens' code. SAEs on hook_z take x with heads
    flattened, as our sources give it. The given object shares its weights and is left unchanged.

    Raises ValueError if the SAE needs activations scaled by a factor that it does not carry.
    """
    own: Any = for_flat_activations(sae)
    if own.cfg.architecture() in TOPK_TRANSCODERS:
        return _topk_transcoder(own)
    skip = getattr(own, "W_skip", None)
    with contextlib.suppress(ValueError):  # SAEs that cannot be accelerated answer with their own code
        accelerate(own)

    def encode(x: Tensor) -> Encoded:
        given = x.to(own.dtype)
        if is_accelerated(own):
            acts = own.encode_sparse(given)
            x_hat, l0 = own.decode_sparse(acts), acts.l0()
        else:
            dense = own.encode(given)
            x_hat, l0, acts = own.decode(dense), (dense != 0).sum(-1), SparseActs.from_dense(dense)
        return Encoded((x_hat if skip is None else x_hat + given @ skip.T).to(x.dtype), l0, acts)

    return encode


def _topk_transcoder(sae: Any) -> Encode:
    """A transcoder that the drop-in does not support, run directly on the ops."""
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, name).detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    skip, prepared = getattr(sae, "W_skip", None), prepare_encoder(W_enc, b_enc)

    def encode(x: Tensor) -> Encoded:
        given = sae.run_time_activation_norm_fn_in(x.to(sae.dtype))
        acts = topk_encode(given, W_enc, b_enc, sae.cfg.k, prepared=prepared)
        x_hat = sparse_decode(acts, W_dec, b_dec)
        return Encoded(
            (x_hat if skip is None else x_hat + x.to(sae.dtype) @ skip.detach().T).to(x.dtype), acts.l0(), acts
        )

    return encode


def pursuit_encoder(sae: SAE, *, method: str = "gradient") -> Encode:
    """Pursuit over W_dec from zero, with as many steps at each token as the SAE has active latents there.

    Args:
        sae: left unchanged; a twin that shares its weights is accelerated.
        method: one of METHODS; orthogonal means its non-negative form.

    Raises ValueError for any other method, or for an SAE with maps that pursuit does not cover. Cost: see
    `ops.pursuit.pursuit`.
    """
    if method not in METHODS:
        raise InputError(f"method: must be one of {', '.join(METHODS)}, got {method!r}")
    sae = for_flat_activations(sae)
    dictionary, bias = _dictionary(sae)

    def choose(x: Tensor, acts: SparseActs) -> SparseActs:
        steps = acts.l0().clamp(max=dictionary.n_atoms)
        return pursuit(x, dictionary, steps, bias=bias, method=method, nonnegative=method == "orthogonal")

    return _encoder(sae, dictionary.rows.to(dictionary.dtype), choose)


def refit_encoder(sae: SAE) -> Encode:
    """The SAE's own choice of latents with non-negative least-squares values. Raises as `pursuit_encoder`."""
    sae = for_flat_activations(sae)
    dictionary, bias = _dictionary(sae)
    return _encoder(sae, dictionary.rows.to(dictionary.dtype), lambda x, acts: refit(x, acts, dictionary, bias=bias))


def _dictionary(sae: Any) -> tuple[Any, Tensor]:
    """W_dec, packed, and b_dec. Raises ValueError unless they alone make up Sae(x), without other maps in between."""
    cfg = sae.cfg
    if "transcoder" in cfg.architecture():
        raise InputError(f"sae: must reconstruct its own input for pursuit, got a {cfg.architecture()}")
    plain = cfg.normalize_activations == "none" and cfg.reshape_activations == "none"
    if not plain or sae.W_dec.shape[1] != cfg.d_in or getattr(cfg, "rescale_acts_by_decoder_norm", False):
        raise InputError(
            "sae: must be without normalisation, reshaping or another output site for pursuit, "
            f"got {cfg.architecture()} with {cfg.normalize_activations}, {cfg.reshape_activations}"
        )
    accelerate(sae)
    return prepare_dictionary(sae.W_dec), sae.b_dec.detach()


def _encoder(sae: Any, rows: Tensor, choose: Choose) -> Encode:
    """An Encode that chooses other acts; `rows` [F, d] is the decoder in their dtype, float32 for a 16-bit SAE."""
    bias = sae.b_dec.detach().to(rows.dtype)

    def encode(x: Tensor) -> Encoded:
        own = x.to(sae.dtype)
        acts = choose(own, sae.encode_sparse(own))
        x_hat = sparse_decode(acts, rows, bias)
        return Encoded(x_hat.to(x.dtype), acts.l0(), acts)

    return encode


def random_dictionary(mean: Tensor, n_latents: int, l0: int, *, seed: int) -> Encode:
    """Pursuit with `l0` steps over `n_latents` random unit directions around `mean` [d]: good codes, nothing learned.

    Gradient pursuit chooses the codes, because untrained directions have no encoder. It runs on
    the CPU, wherever x is. Cost: see `ops.pursuit.pursuit`. Raises InputError as it does.
    """
    rows = random_rows((n_latents, len(mean)), seed)
    dictionary, bias = prepare_dictionary(rows), mean.float().cpu()

    def encode(x: Tensor) -> Encoded:
        acts = pursuit(x.float().cpu(), dictionary, l0, bias=bias)
        x_hat = sparse_decode(acts, dictionary.rows, bias).to(x)
        return Encoded(x_hat, acts.l0().to(x.device), acts)

    return encode


def random_rows(shape: tuple[int, int], seed: int) -> Tensor:
    """Unit rows [F, d] in random directions."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def random_directions(sae: SAE, l0: int, *, seed: int) -> Encode:
    """As many latents as `sae` has, with random unit directions around b_dec: TopK of the tied encoder, `l0` active.

    Its codes are as cheap as an SAE's, but worse than those of `random_dictionary`. Raises ValueError as `topk_encode`.
    """
    rows = random_rows((len(sae.W_dec), sae.W_dec.shape[1]), seed).to(sae.W_dec)
    columns, center, no_bias = rows.mT.contiguous(), sae.b_dec.detach(), rows.new_zeros(len(rows))
    prepared = prepare_encoder(columns, no_bias, b_dec=center)

    def encode(x: Tensor) -> Encoded:
        acts = topk_encode(x.to(rows.dtype), columns, no_bias, l0, b_dec=center, prepared=prepared)
        return Encoded(sparse_decode(acts, rows, center).to(x.dtype), acts.l0(), acts)

    return encode


def shuffled_sae(sae: SAE, *, seed: int) -> SAE:
    """A copy with permuted decoder rows [F, d]: the same codes, decoded with the wrong rows."""
    shuffled = copy.deepcopy(sae)
    order = torch.randperm(sae.cfg.d_sae, generator=torch.Generator().manual_seed(seed))
    shuffled.W_dec.data = sae.W_dec.detach()[order.to(sae.W_dec.device)].contiguous()
    return shuffled
