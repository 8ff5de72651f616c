"""Which of several processes this one is, as its launcher's environment says. Needs no torch: a refusal names it too."""

from __future__ import annotations

import os


def under_torchrun() -> bool:
    """Whether torchrun (or another launcher with its environment) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_first_process() -> bool:
    """Whether this process should write and print what all processes share."""
    return not under_torchrun() or os.environ["RANK"] == "0"
