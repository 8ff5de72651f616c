"""Training shared by the processes of a torchrun: `-m cases.shared_training FILE`; the first writes what came out."""

import os
import sys

import torch
from safetensors.torch import save_file

from cases.dense_training import planted
from darkmatter_ext.training.config import ARCHITECTURES, TrainingConfig
from darkmatter_ext.training.train import train


def outcome():
    """Weights and numbers of an SAE of each architecture, in float64; a batch of odd size, latents that die."""
    configs = [
        TrainingConfig(
            d_sae=48, k=3, steps=25, batch_size=101, dead_after_tokens=0, architecture=architecture,
            weights_dtype="float64", max_gradient_norm=0.01,
        )
        for architecture in ARCHITECTURES
    ]  # fmt: skip
    found = {}
    for sae in train(planted(n=1000)[0], configs):
        name = sae.config.architecture
        found |= {f"{name}.{key}": tensor for key, tensor in sae.sae.state_dict().items()}
        found[f"{name}.report"] = torch.tensor(list(sae.report.values()))
        found[f"{name}.losses"] = torch.tensor([entry["loss"] for entry in sae.history], dtype=torch.float64)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = outcome()
    if os.environ.get("RANK", "0") == "0":
        save_file(result, sys.argv[1])
