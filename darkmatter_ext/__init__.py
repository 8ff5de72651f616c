"""darkmatter_ext: exact sparse-autoencoder kernels for PyTorch, and the dark matter of SAEs measured with them.

Ops: topk_encode, threshold_encode, prepare_encoder, sparse_decode, SparseActs; pursuit. Drop-in for SAELens: accelerate, stats.
Measurements: fit_linear, decompose.
Names are loaded when first used, so importing the package is cheap and starts no other library than torch's own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from darkmatter_ext.batched_pursuit import prepare_dictionary, pursuit
    from darkmatter_ext.decomposition import Decomposition, decompose
    from darkmatter_ext.drop_in import Stats, accelerate, deaccelerate, is_accelerated, refresh, stats
    from darkmatter_ext.environment import build_info
    from darkmatter_ext.ops import (
        PreparedEncoder,
        find_support,
        prepare_encoder,
        sparse_decode,
        threshold_encode,
        topk_encode,
    )
    from darkmatter_ext.pursuit_choice import PreparedDictionary
    from darkmatter_ext.regression import LinearFit, fit_linear
    from darkmatter_ext.sparse import SparseActs

__all__ = [
    "Decomposition",
    "LinearFit",
    "PreparedDictionary",
    "PreparedEncoder",
    "SparseActs",
    "Stats",
    "accelerate",
    "build_info",
    "deaccelerate",
    "decompose",
    "find_support",
    "fit_linear",
    "is_accelerated",
    "prepare_dictionary",
    "prepare_encoder",
    "pursuit",
    "refresh",
    "sparse_decode",
    "stats",
    "threshold_encode",
    "topk_encode",
]

_HOME = {
    "Decomposition": "decomposition",
    "LinearFit": "regression",
    "PreparedDictionary": "pursuit_choice",
    "PreparedEncoder": "ops",
    "SparseActs": "sparse",
    "Stats": "drop_in",
    "accelerate": "drop_in",
    "build_info": "environment",
    "deaccelerate": "drop_in",
    "decompose": "decomposition",
    "find_support": "ops",
    "fit_linear": "regression",
    "is_accelerated": "drop_in",
    "prepare_dictionary": "batched_pursuit",
    "prepare_encoder": "ops",
    "pursuit": "batched_pursuit",
    "refresh": "drop_in",
    "sparse_decode": "ops",
    "stats": "drop_in",
    "threshold_encode": "ops",
    "topk_encode": "ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'darkmatter_ext' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"darkmatter_ext.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
