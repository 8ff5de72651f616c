"""What the page's token explorer and latent browser read: one block of bytes, compressed, as text.

A JSON header, preceded by its length, is followed by columns of numbers, each starting at a multiple of 4 bytes.
`web/src/data.ts` reads it. No text from a model or a file appears in the page verbatim.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
from typing import TYPE_CHECKING, Any

from darkmatter_ext.report.result import Result

if TYPE_CHECKING:
    import numpy as np

_TOKEN_COLUMNS = ("error", "linear", "nonlinear", "kl")  # the last only if the model could be spliced
_LATENT_NUMBERS = ("rate", "mean_value", "decoder_norm", "nonlinear_share")
_LATENT_WHOLE = ("number", "fired", "places", "nearest")


def packed(result: Result) -> str | None:
    """The block in Base64; None for a result that keeps no text to explore."""
    if "explored" not in result.series:
        return None
    about, arrays = result.series["explored"], result.arrays
    columns = _columns(arrays, len(about["saes"]))
    head = {
        "saes": about["saes"],
        "held_out": about["held_out"],
        "kl": about.get("kl", {"absent": "the result is of a version that made none"}),
        "length": arrays["page/tokens"].shape[1],
        "contexts": arrays["page/contexts"].tolist(),
        "documents": arrays["page/documents"].tolist(),
        "vocabulary": json.loads(arrays["page/vocabulary"].tobytes()),
        "columns": [[name, kind, values.size] for name, (kind, values) in columns.items()],
    }
    text = json.dumps(head, ensure_ascii=True).encode()
    parts = [struct.pack("<I", len(text)), text, b"\0" * (-(4 + len(text)) % 4)]
    for _, values in columns.values():
        content = values.tobytes()
        parts += [content, b"\0" * (-len(content) % 4)]
    return base64.b64encode(gzip.compress(b"".join(parts), compresslevel=6, mtime=0)).decode()


def _columns(arrays: dict[str, np.ndarray], n_saes: int) -> dict[str, tuple[str, np.ndarray]]:
    """name -> type, flat values; little-endian."""
    found = {"tokens": _whole(arrays["page/tokens"])}
    floats = ["loss", *(name.removeprefix("page/") for name in arrays if name.startswith("page/site"))]
    found |= {name: _float(arrays[f"page/{name}"]) for name in floats if f"page/{name}" in arrays}
    for sae in range(n_saes):
        own = f"sae{sae}"
        kept = [name for name in _TOKEN_COLUMNS if f"page/{own}/{name}" in arrays]
        found |= {f"{own}/{name}": _float(arrays[f"page/{own}/{name}"]) for name in kept}
        found[f"{own}/l0"] = _whole(arrays[f"page/{own}/l0"].clip(min=0))
        found[f"{own}/latents"] = _whole(arrays[f"page/{own}/latents"] + 1)  # 0 for none
        found[f"{own}/values"] = _half(arrays[f"page/{own}/values"])
        latent = f"page/{own}/latent"
        found |= {f"{own}/latent/{name}": _float(arrays[f"{latent}/{name}"]) for name in _LATENT_NUMBERS}
        found |= {f"{own}/latent/{name}": ("i4", _flat(arrays[f"{latent}/{name}"], "<i4")) for name in _LATENT_WHOLE}
        found |= {f"{own}/latent/{name}": _half(arrays[f"{latent}/{name}"]) for name in ("values", "cosines")}
    return found


def _flat(values: Any, kind: str) -> np.ndarray:
    return values.reshape(-1).astype(kind)


def _float(values: np.ndarray) -> tuple[str, np.ndarray]:
    return "f4", _flat(values, "<f4")


def _whole(values: np.ndarray) -> tuple[str, np.ndarray]:
    """Non-negative integers, in as few bytes as they need."""
    kind = "u2" if values.max(initial=0) < 1 << 16 else "i4"
    return kind, _flat(values, f"<{kind}")


def _half(values: np.ndarray) -> tuple[str, np.ndarray]:
    """The upper half of float32, rounded: three digits."""
    bits = _flat(values, "<f4").view("<u4").astype("u8")
    return "b2", ((bits + 0x8000) >> 16).astype("<u2")
