"""Encodes of the emulated CUDA ops in which the screen's answer differs from the exact path's.

An encode that screening cannot help takes the exact path, which would hide a filter that loses candidates. So some
latents are left out of the *screen* alone, by a bias of -inf among its bounds: the screened answer is the one without
them, and the exact path, which knows nothing of the screen, lets them in.
"""

from __future__ import annotations

import math

import torch

from cases.encoders import NOT_PACKED, same

SCALE, BIAS, NORM, ROUNDING, SLACK = range(5)  # csrc/margins.h's BoundRow


class Screened:
    """Packed weights with latents left out of the screen, and what the screen then answers; `exact` are the tokens that
    the screen must send the exact way, no others."""

    def __init__(self, W_enc, b_enc, b_dec, left_out=slice(0, 0)):
        self.given = W_enc, b_enc, b_dec
        *parts, self.codes, sums, self.bounds, groups = torch.ops.darkmatter_emulated.prepare_encoder(*self.given)
        kept = torch.ones(W_enc.shape[1], dtype=torch.bool)
        kept[left_out] = False
        self.bounds[BIAS, ~kept] = -math.inf
        self.packed = *parts, self.codes, sums, self.bounds, groups
        self.others = kept.nonzero().squeeze(1)

    def _of_others(self):
        W_enc, b_enc, b_dec = self.given
        return W_enc[:, self.others], b_enc[self.others], b_dec

    def check_topk(self, x, k, exact=()):
        exact = list(exact)
        values, indices = torch.ops.darkmatter_emulated.topk_encode(x, *self.given, k, *self.packed)
        expected, positions = torch.ops.darkmatter.topk_encode(x, *self._of_others(), k, *NOT_PACKED)
        latents = self.others[positions]
        if exact:
            expected[exact], latents[exact] = torch.ops.darkmatter.topk_encode(x[exact], *self.given, k, *NOT_PACKED)
        same((values, indices), (expected, latents))

    def check_threshold(self, x, threshold, exact=()):
        """Returns how many latents are kept."""
        values, crow, col = torch.ops.darkmatter_emulated.threshold_encode(x, *self.given, threshold, *self.packed)
        own = threshold if threshold.dim() == 0 else threshold[self.others]
        by_screen = torch.ops.darkmatter.threshold_encode(x, *self._of_others(), own, *NOT_PACKED)
        by_all = torch.ops.darkmatter.threshold_encode(x, *self.given, threshold, *NOT_PACKED)
        expected = []
        for token in range(len(x)):
            way = by_all if token in exact else by_screen
            of_token = slice(*way[1][token : token + 2].tolist())
            latents = way[2][of_token] if token in exact else self.others[way[2][of_token]]
            expected.append((way[0][of_token], latents))
        ends = torch.tensor([0, *(len(latents) for _, latents in expected)]).cumsum(0)
        same(
            (values, crow, col), (torch.cat([part[0] for part in expected]), ends, torch.cat([p[1] for p in expected]))
        )
        self._check_fixed(x, threshold, values, crow, col)
        return values.numel()

    def _check_fixed(self, x, threshold, values, crow, col):
        """With a capacity that most tokens fit in: the same entries in rows."""
        found = crow.diff()
        capacity = int(found.double().quantile(0.8))
        mine = torch.ops.darkmatter_emulated.threshold_encode_fixed(x, *self.given, threshold, capacity, *self.packed)
        assert torch.equal(mine[2], found)
        for token, length in enumerate(found.tolist()):
            n = min(length, capacity)
            own = slice(int(crow[token]), int(crow[token]) + n)
            padding = col.new_zeros(capacity - n)
            same((mine[0][token],), (torch.cat([values[own], padding.to(values.dtype)]),))
            same((mine[1][token],), (torch.cat([col[own], padding]),))


def check_tokens_of_all_scales(x, weights, k, threshold):
    """Both encodes, with a threshold for all latents and for each; every token of x has a scale and limits of its own."""
    n, n_latents, dtype = len(x), weights[0].shape[1], x.dtype
    x = x * torch.logspace(0, -2, n)[:, None].to(dtype)
    screened = Screened(*weights, left_out=slice(5, n_latents, 7))
    screened.check_topk(x, k)
    threshold = torch.tensor(threshold, dtype=dtype)
    assert screened.check_threshold(x, threshold) > n
    screened.check_threshold(x, (threshold * torch.rand(n_latents)).to(dtype) + threshold)
