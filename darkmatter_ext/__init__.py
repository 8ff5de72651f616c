"""darkmatter_ext: exact sparse-autoencoder kernels for PyTorch, and measurements of SAE dark matter made with them.

Ops: topk_encode, threshold_encode, prepare_encoder, sparse_decode, SparseActs; pursuit, refit. Drop-in for SAELens:
accelerate, stats, load_sae. Training: train, TrainingConfig. Measurements: measure, run, load_result; fit_linear, decompose.
The public names are listed once, in `__init__.pyi`. They are loaded on first use, so importing the package is cheap
and starts no library other than torch.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any


def _public_names() -> dict[str, str]:
    """Public name -> module, from the stub that type checkers read."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    own = [node for node in stub.body if isinstance(node, ast.ImportFrom) and str(node.module).startswith(__name__)]
    return {alias.name: str(node.module) for node in own for alias in node.names}


_HOME = _public_names()
__all__ = sorted(_HOME)  # noqa: PLE0605  (pyright reads the stub)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'darkmatter_ext' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
