"""How well SAEs perform during training: unexplained share of variance, latents per token, latents that never fire."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from darkmatter_ext.training.trainer import SaeTrainer


@torch.no_grad()
def evaluated(
    trainers: Sequence[SaeTrainer], batches: Iterable[Tensor], scale: float, *, at_most: int, batch_size: int
) -> list[dict[str, float]]:
    """For each SAE: fvu, l0, silent_share (of latents that fire at none of these tokens), and the number of tokens.

    Args:
        batches: unscaled activations [n, d]; `scale` divides them, as in training.
        at_most: evaluate at most this many tokens, the first ones.

    FVU is 1 - explained variance, about the mean of these tokens. Cost: one encode and decode of every token by each SAE.
    """
    parts, tokens = [], 0
    for x in batches:
        parts.append(x[: at_most - tokens].to(trainers[0].weights["b_dec"].device).float() / scale)
        tokens += len(parts[-1])
        if tokens == at_most:
            break
    if tokens == 0:
        return [{} for _ in trainers]
    x = torch.cat(parts)
    total = (x.double() - x.mean(0, dtype=torch.float64)).square().sum()
    return [_evaluated(trainer, x, total, batch_size) for trainer in trainers]


def _evaluated(trainer: SaeTrainer, x: Tensor, total: Tensor, batch_size: int) -> dict[str, float]:
    missed, active = total.new_zeros(()), 0
    fired = torch.zeros(trainer.config.d_sae, dtype=torch.bool, device=x.device)
    for part in x.split(batch_size):
        x_hat, acts = trainer.reconstruct(part)
        missed += (part.double() - x_hat.double()).square().sum()
        fires = acts.values.reshape(-1) > 0
        active += int(fires.sum())
        fired[acts.col_indices[fires]] = True
    return {
        "fvu": (missed / total).item(),
        "l0": active / len(x),
        "silent_share": 1 - int(fired.sum()) / len(fired),
        "tokens": len(x),
    }
