"""The quantities of the dark matter paper, each defined once (Engels et al., 2410.14670).

One sign everywhere: SaeError(x) = x - Sae(x). Shapes: n tokens, d model dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.runtime.inputs import InputError


def sae_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """SaeError(x) = x - Sae(x), [..., d], for x and Sae(x) of shape [..., d].

    Raises ValueError when the shapes differ.
    """
    if x.shape != x_hat.shape:
        raise InputError(f"x_hat: must have the shape of x {list(x.shape)}, got {list(x_hat.shape)}")
    return x - x_hat


ROUNDING = 1e-12  # variance over squared mean that float32 rounding can give a constant, with a margin


def varies(variation: float, mean: Tensor, count: int) -> bool:
    """Whether x varies more than rounding: variation is the sum over tokens and dimensions of (x - mean x)^2."""
    return variation > ROUNDING * count * mean.double().square().sum().item()


@dataclass
class ErrorStatistics:
    """Running sums that give FVU and normalised MSE of a reconstruction, in float64; mergeable by addition.

    FVU = sum (x - x_hat)^2 / sum (x - mean x)^2 over tokens and dimensions.
    Normalised MSE = mean over tokens of (mean_d error^2 / mean_d x^2).
    Only the numerators are kept here. The variance in the denominator comes from the regression's statistics of x, which
    are centred.
    """

    count: int = 0
    squared_error: float = 0.0  # sum over tokens and dimensions
    relative_squared_error: float = 0.0  # sum over tokens of ||error||^2 / ||x||^2
    zero_tokens: int = 0  # tokens with ||x|| = 0, left out of the relative error (0/0)

    def update(self, x: Tensor, error: Tensor) -> None:
        """Add a batch: x [n, d] and its error [n, d]."""
        squared_error = error.double().square().sum(-1)  # [n]
        squared_norm = x.double().square().sum(-1)  # [n]
        nonzero = squared_norm > 0
        self.count += len(x)
        self.squared_error += squared_error.sum().item()
        self.relative_squared_error += (squared_error[nonzero] / squared_norm[nonzero]).sum().item()
        self.zero_tokens += int((~nonzero).sum())

    def fvu(self, total_variance: float) -> float:
        """FVU given sum (x - mean x)^2 over the same tokens."""
        return self.squared_error / total_variance if total_variance > 0 else float("nan")

    @property
    def normalised_mse(self) -> float:
        counted = self.count - self.zero_tokens
        return self.relative_squared_error / counted if counted else float("nan")


NORM_TARGETS = ("x", "sae", "error", "linear", "nonlinear", "sae_plus_nonlinear")


def norm_targets(x: Tensor, x_hat: Tensor, linear: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Squared norms [n, 6] of the vectors of the norm prediction test, in the order of NORM_TARGETS, in `dtype`.

    x, Sae(x), SaeError, its linear part b*.x, its nonlinear part, and Sae(x) + nonlinear part; inputs [n, d].
    """
    error = sae_error(x, x_hat).to(dtype)
    linear = linear.to(dtype)
    nonlinear = error - linear
    vectors = (x.to(dtype), x_hat.to(dtype), error, linear, nonlinear, x_hat.to(dtype) + nonlinear)
    return torch.stack([vector.square().sum(-1) for vector in vectors], dim=-1)
