"""darkmatter_ext: exact sparse-autoencoder kernels for PyTorch, and the dark matter of SAEs measured with them.

Ops: topk_encode, threshold_encode, prepare_encoder, sparse_decode, SparseActs; pursuit. Drop-in for SAELens: accelerate, stats.
Measurements: fit_linear, decompose.
Names are loaded when first used, so importing the package is cheap and starts no other library than torch's own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from darkmatter_ext.estimators.least_squares import LinearFit, fit_linear
    from darkmatter_ext.measurement.decompose import Decomposition, decompose
    from darkmatter_ext.ops.acts import SparseActs
    from darkmatter_ext.ops.build_info import build_info
    from darkmatter_ext.ops.decode import find_support, sparse_decode
    from darkmatter_ext.ops.encode import PreparedEncoder, prepare_encoder, threshold_encode, topk_encode
    from darkmatter_ext.ops.pursuit import prepare_dictionary, pursuit
    from darkmatter_ext.ops.pursuit_choice import PreparedDictionary
    from darkmatter_ext.saes.drop_in import Stats, accelerate, deaccelerate, is_accelerated, refresh, stats

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
    "Decomposition": "measurement.decompose",
    "LinearFit": "estimators.least_squares",
    "PreparedDictionary": "ops.pursuit_choice",
    "PreparedEncoder": "ops.encode",
    "SparseActs": "ops.acts",
    "Stats": "saes.drop_in",
    "accelerate": "saes.drop_in",
    "build_info": "ops.build_info",
    "deaccelerate": "saes.drop_in",
    "decompose": "measurement.decompose",
    "find_support": "ops.decode",
    "fit_linear": "estimators.least_squares",
    "is_accelerated": "saes.drop_in",
    "prepare_dictionary": "ops.pursuit",
    "prepare_encoder": "ops.encode",
    "pursuit": "ops.pursuit",
    "refresh": "saes.drop_in",
    "sparse_decode": "ops.decode",
    "stats": "saes.drop_in",
    "threshold_encode": "ops.encode",
    "topk_encode": "ops.encode",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'darkmatter_ext' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"darkmatter_ext.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
