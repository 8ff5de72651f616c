"""Accelerated SAEs for SAEBench (`pip install sae-bench`), which evaluates any object with SAELens' encode and decode.

from sae_bench.evals.core.main import multiple_evals
multiple_evals(selected_saes(["sae-16k", "RELEASE:ID"]), n_eval_reconstruction_batches=20, ...)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.drop_in import accelerate
from darkmatter_ext.saes.flat_activations import why_not_usable
from darkmatter_ext.saes.loading import load_sae

if TYPE_CHECKING:
    from sae_lens import SAE

_BLOCK = re.compile(r"blocks\.\d+\.")


def selected_saes(
    specs: Sequence[str], *, model: str = "", hook: str = "", device: str = "cpu", dtype: str = "float32"
) -> list[tuple[str, SAE]]:
    """Pairs of a name and an SAE, as every SAEBench evaluation takes them; the SAEs are accelerated and of any known format.

    Decoder rows are normalised if SAELens can fold their norms into the latents, as SAEBench does with SAEs it
    loads itself; the meaning of latents does not change.

    Args:
        specs: for each SAE a folder, a weights file or RELEASE:ID; also its name in the results.
        model: TransformerLens' name of the model, for SAEs that do not state theirs.
        hook: the hook point, likewise.
        device, dtype: of the weights.

    Raises InputError for an SAE that cannot be read, does not reconstruct its own input, or whose model or hook point is
    unknown.
    """
    return [(spec, _prepared(spec, model, hook, device, dtype)) for spec in specs]


def _prepared(spec: str, model: str, hook: str, device: str, dtype: str) -> SAE:
    sae = load_sae(spec, device=device, dtype=dtype)
    metadata = sae.cfg.metadata
    if "transcoder" in sae.cfg.architecture():
        raise InputError(f"specs: must reconstruct their own input, got the {sae.cfg.architecture()} {spec}")
    if reason := why_not_usable(sae):
        raise InputError(f"specs: {reason} in {spec}")
    for key, argument, given in (("model_name", "model", model), ("hook_name", "hook", hook)):
        if not getattr(metadata, key, None) and not given:
            raise InputError(f"{argument}: must be given, {spec} does not say its own, got none")
        if not getattr(metadata, key, None):
            metadata[key] = given
    if not _BLOCK.match(metadata.hook_name):
        raise InputError(
            f"hook: must be of a block, as blocks.10.hook_resid_post, got {metadata.hook_name!r} in {spec}"
        )
    with contextlib.suppress(NotImplementedError):
        sae.fold_W_dec_norm()
    return accelerate(sae)
