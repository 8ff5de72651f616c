"""Weights with latents that are dead, copied or broken: shared by the tests of the real and the emulated CPU ops."""

from __future__ import annotations

import torch


def whole(shape, seed, size=3):
    return torch.randint(-size, size + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


def edited(kind, x, W_enc, b_enc, g):
    """Dead, copied, pruned and broken latents, as people make them."""
    n_latents = W_enc.shape[1]
    some = torch.rand(n_latents, generator=g) < 0.5
    if kind in ("zero", "all"):
        W_enc[:, some] = 0
    if kind in ("equal", "all"):
        W_enc[:, ::3], b_enc[::3] = W_enc[:, :1].clone(), b_enc[0].clone()
        W_enc[:, 1::7], b_enc[1::7] = W_enc[:, 1:2].clone(), b_enc[1].clone()
    if kind == "equal_rows_other_bias":
        W_enc[:, some] = W_enc[:, :1].clone()
    if kind == "everything_equal":
        W_enc[:], b_enc[:] = W_enc[:, :1].clone(), 1
    if kind == "everything_zero":
        W_enc[:] = 0
    if kind in ("infinite", "all"):
        W_enc[0, 5], W_enc[-1, 7], b_enc[9], b_enc[11] = torch.inf, -torch.inf, torch.inf, -torch.inf
    if kind in ("zero_tokens", "all"):
        x[::2] = 0
    if kind in ("infinite_tokens", "all"):
        x[1, 0], x[3, 1], x[5, -1] = torch.inf, -torch.inf, torch.nan


EDITS = (
    "zero", "equal", "equal_rows_other_bias", "everything_equal", "everything_zero", "infinite", "zero_tokens",
    "infinite_tokens", "all",
)  # fmt: skip
