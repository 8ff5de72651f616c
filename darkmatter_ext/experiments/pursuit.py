"""`darkmatter run pursuit`: is the encoder to blame? The SAE's own latents, pursuit from zero, and a refit, side by side.

Engels et al. ask whether nonlinear error is what a better encoder would remove: the dictionary is kept, the codes are
chosen by pursuit at the SAE's own L0, token by token. The refit keeps the encoder's choice of latents too and only improves
their values (non-negative least squares).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from darkmatter_ext.batched_pursuit import METHODS, prepare_dictionary, pursuit, refit
from darkmatter_ext.decomposition import Reconstruct, Reconstruction, TokenBatch, decompose_stream
from darkmatter_ext.drop_in import accelerate
from darkmatter_ext.ops import sparse_decode
from darkmatter_ext.progress import Stages
from darkmatter_ext.results import Result, provenance
from darkmatter_ext.selection import MeasuredBatches
from darkmatter_ext.site import SiteConfig, prepared_site, site_notes, site_plan
from darkmatter_ext.sparse import SparseActs

VARIANTS = {"encoder": "the SAE itself", "pursuit": "pursuit from zero", "refit": "the encoder's latents, refitted"}


@dataclass(frozen=True)
class PursuitConfig(SiteConfig):
    """Compare an SAE's encoder with pursuit over its dictionary at the same L0, token by token."""

    method: str = "gradient"
    """gradient, matching or orthogonal (non-negative)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"--method: must be one of {', '.join(METHODS)}, got {self.method!r}")


PRESETS = {"demo": PursuitConfig(widths=(1024, 4096))}


def plan(config: PursuitConfig) -> list[str]:
    """What a run would do, in lines, without doing it."""
    return [*site_plan(config), *(f"variant   {about}" for about in VARIANTS.values()), f"pursuit   {config.method}"]


def _check_plain(name: str, sae: Any) -> None:
    """Pursuit works on what the decoder adds up: x - b_dec, without other maps between."""
    cfg = sae.cfg
    plain = cfg.normalize_activations == "none" and cfg.reshape_activations == "none"
    if not plain or sae.W_dec.shape[1] != cfg.d_in or getattr(cfg, "rescale_acts_by_decoder_norm", False):
        raise ValueError(
            f"--sae: must be without normalisation, reshaping or another output site for pursuit, got {name}"
        )


def variants(sae: Any, method: str) -> dict[str, Reconstruct]:
    """The three ways to use the dictionary of an SAE, each a function of a batch."""
    accelerate(sae)
    dictionary, bias = prepare_dictionary(sae.W_dec), sae.b_dec.detach()
    options = {"method": method, "nonnegative": method == "orthogonal"}

    def reconstruct(variant: str, batch: TokenBatch) -> Reconstruction:
        x = batch.x.to(sae.dtype)
        acts: SparseActs = sae.encode_sparse(x)
        if variant == "pursuit":
            steps = acts.l0().clamp(max=dictionary.n_atoms)
            acts = pursuit(x, dictionary, steps, bias=bias, **options)
        elif variant == "refit":
            acts = refit(x, acts, dictionary, bias=bias)
        x_hat = sparse_decode(acts, dictionary.rows, bias.to(dictionary.rows.dtype))
        return Reconstruction(x_hat.to(batch.x.dtype), acts.l0())

    return {name: lambda batch, name=name: reconstruct(name, batch) for name in VARIANTS}


@torch.no_grad()
def run(config: PursuitConfig, stages: Stages) -> Result:
    """Measure FVU, FVU_nonlinear and L0 of every SAE and variant.

    Raises ValueError for bad settings, an SAE with maps pursuit knows nothing of; RuntimeError for a damaged cache.
    """
    cache, selection, saes = prepared_site(config, stages)
    functions: dict[str, Reconstruct] = {}
    listed = []
    for name, (sae, folder) in saes.items():
        _check_plain(name, sae)
        for variant, function in variants(sae, config.method).items():
            functions[f"{name} {variant}"] = function
            listed.append(
                {
                    "name": f"{name} {variant}",
                    "variant": variant,
                    "d_sae": sae.cfg.d_sae,
                    "architecture": sae.cfg.architecture(),
                    "folder": str(folder),
                }
            )
    with stages.stage("pursue and decompose the error"):
        found = decompose_stream(MeasuredBatches(cache, selection.roles, config.device), functions)
    numbers = selection.numbers()
    for name, decomposition in found.items():
        numbers |= {f"{name}/{key}": value for key, value in decomposition.numbers().items()}
    notes = site_notes(config, cache, selection)
    notes.append(
        f"Pursuit ({config.method}) takes as many steps at each token as the encoder has active latents there."
    )
    return Result(
        experiment="pursuit",
        config=dataclasses.asdict(config),
        numbers=numbers,
        series={"saes": listed},
        notes=notes,
        seconds=stages.seconds,
        provenance=provenance(config.device) | {"text_sha256": cache.meta["text_sha256"]},
    )
