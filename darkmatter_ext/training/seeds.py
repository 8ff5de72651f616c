"""Named random generators, so that no two uses of a seed share random numbers."""

from __future__ import annotations

import torch

from darkmatter_ext.runtime.storage import fingerprint


def generator(use: str, *parts: int) -> torch.Generator:
    """The generator for one use ("weights", "order") with some numbers (seed, width, epoch)."""
    return torch.Generator().manual_seed(int(fingerprint(use=use, parts=parts)[:15], 16))
