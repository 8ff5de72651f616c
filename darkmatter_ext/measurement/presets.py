"""The presets, which only set values of settings: public models with sets of public SAEs, and the demo."""

from __future__ import annotations

from typing import Any

from darkmatter_ext.measurement.settings import Changed, Settings, extended, replaced
from darkmatter_ext.saes.catalogue import SAE_SETS

WIDTHS = (512, 1024, 2048, 4096, 8192)  # of the demo's SAEs
KS = (16, 32, 64)
# SAEs trained here on the embedded model: every held-out token is in the table; blocks are small because the text is.
DEMO = replaced(Settings(), batch_tokens=4096, block_contexts=16, table_contexts=0)
# Engels et al.: 300 contexts of 1024 tokens from long enough documents, positions from 200 on, split by token. Their
# activations are float32: no sparse code follows rounding to 16 bits, so it would end up in the nonlinear error.
_ENGELS: dict[str, Any] = {"drop_positions": 200, "tokens": 307_200}
_PUBLIC: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-2-9b-l20": ("google/gemma-2-9b", _ENGELS),
    "gemma-2-9b-all-layers": ("google/gemma-2-9b", _ENGELS),
    "gpt2-small": ("openai-community/gpt2", {"tokens": 300_000}),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", _ENGELS),
}


def _public(name: str) -> Settings:
    model, more = _PUBLIC[name]
    return replaced(
        Settings(),
        sae=tuple(sae.spec for sae in SAE_SETS[name]),
        model=model,
        dataset="monology/pile-uncopyrighted",
        shuffle_buffer=10_000,
        contexts_per_document=1,
        split="tokens",
        fit_fraction=0.61,
        context_length=128 if name == "gpt2-small" else 1024,
        seed=42,
        **more,
    )


GIVEN = {"one-pass": Settings(), **{name: _public(name) for name in _PUBLIC}}


def presets(kind: type[Changed], demo: dict[str, Any], **values: Any) -> dict[str, Changed]:
    """All presets as settings of an experiment: `demo` applies to its demo, `values` to all of them."""
    every = {name: extended(settings, kind, **values) for name, settings in GIVEN.items()}
    return {"demo": extended(DEMO, kind, **(values | demo)), **every}
