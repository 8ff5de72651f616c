"""Layouts of SAEs on disk, each read into SAELens' terms: a configuration, and weights under SAELens' names.

A file here is a library: what it writes, and what its own code computes from that. What files do not say is left out of
the metadata instead of guessed, so that a run asks or says so; what is not understood is refused in one line.
"""

from __future__ import annotations

from pathlib import Path

from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.formats.circuit_tracer import CIRCUIT_TRACER
from darkmatter_ext.saes.formats.dictionary_learning import DICTIONARY_LEARNING
from darkmatter_ext.saes.formats.gemma_scope import GEMMA_SCOPE
from darkmatter_ext.saes.formats.layout import Format, Place
from darkmatter_ext.saes.formats.llama_scope import LLAMA_SCOPE
from darkmatter_ext.saes.formats.openai import OPENAI
from darkmatter_ext.saes.formats.qwen_scope import QWEN_SCOPE
from darkmatter_ext.saes.formats.saelens import SAELENS
from darkmatter_ext.saes.formats.sparsify import SPARSIFY

FORMATS = (
    SAELENS, SPARSIFY, DICTIONARY_LEARNING, GEMMA_SCOPE, LLAMA_SCOPE, QWEN_SCOPE, OPENAI, CIRCUIT_TRACER,
)  # fmt: skip


def on_disk(spec: str | Path) -> bool:
    """Whether a spec names a folder, or a file that holds an SAE's weights."""
    path = Path(spec)
    return path.is_dir() or any(known.place_of_file(path) for known in FORMATS)


def found_at(spec: str | Path) -> tuple[Format, Place]:
    """The SAE of a folder or of its weights' file, and its layout.

    Raises InputError, one line, for a folder in no layout, or one that holds several SAEs: then a file has to be named.
    """
    path = Path(spec)
    for known in FORMATS:
        if place := known.place_of_file(path):
            return known, place
        if len(places := known.places_in(path)) == 1:
            return known, places[0]
        if places:
            names = [place.weights.name for place in places]
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(f"sae: must be one SAE, got {path} with {shown} (name a file)")
    wanted = " or ".join(known.files for known in FORMATS)
    config, weights = SAELENS.config_name, SAELENS.weights_names[0]
    missing = weights if config and (path / config).is_file() else config
    raise InputError(f"sae: must be a folder with {wanted}, got {path} without {missing}")
