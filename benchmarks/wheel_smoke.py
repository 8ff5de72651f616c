"""What `make wheel-check` runs in a fresh environment: the installed package, with no compiler and no source beside it.

An SAE of each kind is accelerated and must answer as it did; pursuit, a decomposition and a step of training run.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig

import darkmatter_ext as dm


def same(sae: TopKSAE | JumpReLUSAE) -> None:
    """Accelerated and plain, on the same tokens."""
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = sae(x)
        found = dm.accelerate(sae)(x)
    assert dm.stats(sae).fast == {"forward": 1}, dm.stats(sae)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def main() -> None:
    assert shutil.which("c++") is None, "a compiler is on the path: the check says nothing"
    assert "site-packages" in str(dm.__file__), dm.__file__
    assert not list(Path(dm.__file__).parent.glob("_C*")), "a module of one Python is in the wheel"
    torch.manual_seed(0)
    same(TopKSAE(TopKSAEConfig(d_in=128, d_sae=4096, k=16)))
    jumprelu = JumpReLUSAE(JumpReLUSAEConfig(d_in=128, d_sae=4096))
    x = torch.randn(256, 128)
    jumprelu.threshold.data.fill_((x @ jumprelu.W_enc).quantile(0.995).item())
    same(jumprelu)
    x = torch.randn(300, 128)
    dictionary = torch.nn.functional.normalize(torch.randn(512, 128), dim=1)
    assert dm.pursuit(x, dictionary, 8).shape == (300, 512)
    assert 0 <= dm.decompose(x, 0.9 * x, groups=torch.arange(300) // 10).linear_share <= 1
    trained = dm.train(x, dm.TrainingConfig(d_sae=512, k=8, steps=3, batch_size=64))
    assert trained.report["train/fvu"] > 0
    about = dm.build_info()
    print(
        f"python {sys.version.split()[0]}, torch {about['torch']}, {about['cpu_isa']}, commit {about['commit']}: right"
    )


if __name__ == "__main__":
    main()
