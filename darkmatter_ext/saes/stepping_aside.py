"""The memory of an SAE on which screening does not pay.

Dense tokens, sinks and ties leave so many candidates that a dense product is the faster way; the ops hand such tokens back.
"""

from __future__ import annotations

import torch
from torch import Tensor

DENSE_SHARE = 0.06  # active share of the latents above which a dense encode is the faster one
FIRST_WAIT, LONGEST_WAIT = 8, 256  # calls


def does_not_pay(tokens: int, undecided: int) -> bool:
    """Whether a call hands so many of its tokens back that SAELens' own code is as fast for all of them."""
    return undecided == tokens > 0 or undecided > max(1, tokens // 4)


def looks_dense(acts: Tensor, share: float) -> bool:
    """Whether about eight evenly spaced tokens of acts [..., F] are denser than `share`: cheaper than listing their latents."""
    rows = acts.reshape(-1, acts.shape[-1])
    some = rows[:: max(1, len(rows) // 8)]
    return int(some.count_nonzero()) > share * some.numel()


class BackOff:
    """Calls to leave to SAELens after one in which many tokens were handed back: 8, then 16, at most 256."""

    def __init__(self) -> None:
        self.left = 0
        self._wait = 0
        self._dense = False  # the tokens were many because they were dense, not because they were hard to tell
        self._ends_early = True  # when dense tokens have become sparse; not where that has misled
        self._ended_early = False

    def after_trying(self, tokens: int, undecided: int) -> None:
        """Remember how a call went."""
        if tokens == 0:
            return
        if does_not_pay(tokens, undecided):
            self._ends_early = not self._ended_early
            self._wait = min(max(FIRST_WAIT, 2 * self._wait), LONGEST_WAIT)
            self.left = self._wait
        elif self._wait:
            self._wait = 0
            self._ends_early = True
        self._ended_early = False

    def was_dense(self, acts: Tensor) -> None:
        """Remember whether tokens were handed back because their acts [u, F] are dense, or because they were hard to tell."""
        self._dense = median_share(acts) > DENSE_SHARE

    def after_dense(self, acts: Tensor) -> None:
        """One call less to wait; none where the tokens of dense acts [..., F] were dense and have become sparse."""
        self.left = max(0, self.left - 1)
        if self._ends_early and self._dense and self.left and median_share(acts) <= DENSE_SHARE:
            self.left = 0
            self._ended_early = True


def median_share(acts: Tensor) -> float:
    """Active share of the latents of the median token, of a few: tokens far from the others decide nothing."""
    rows = acts.detach().reshape(-1, acts.shape[-1])
    if rows.numel() == 0:
        return 0.0
    rows = rows[torch.linspace(0, len(rows) - 1, min(16, len(rows))).long()]
    return (rows != 0).sum(-1).median().item() / rows.shape[-1]
