"""Rows of the benchmark for pursuit: ours against the dense oracle, SAELens and scikit-learn, on data made of the atoms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peers
import torch
from problems import Row, sae_like
from torch import Tensor

import darkmatter_ext as dm
from darkmatter_ext.ops import reference

SHAPES = ((256, 768, 16384, 32), (256, 2304, 65536, 16))  # N, d, F, l0
SMALL = (256, 768, 2048, 16)  # scikit-learn keeps the Gram matrix of all atoms and works token by token
CHECKED_TOKENS = 4


def _row(
    method: str, shape: tuple[int, int, int, int], others: Callable[[Tensor, Tensor, int], dict[str, Callable[[], Any]]]
) -> Row:
    n, d, n_atoms, l0 = shape
    x, W_enc = sae_like(n, d, n_atoms, torch.float32)
    dictionary = W_enc.mT.contiguous()
    prepared = dm.prepare_dictionary(dictionary)

    def check() -> None:
        few = x[:CHECKED_TOKENS]
        ours = dm.pursuit(few, prepared, l0, method=method).to_dense()
        torch.testing.assert_close(
            ours, reference.pursuit(few, dictionary, l0, method=method).float(), rtol=1e-3, atol=1e-3
        )

    label = f"pursuit {method} sae_like {n}x{d}x{n_atoms} l0 {l0} float32"
    return Row(label, lambda: dm.pursuit(x, prepared, l0, method=method), others(x, dictionary, l0), {}, check)


def _dense(x: Tensor, dictionary: Tensor, l0: int) -> dict[str, Callable[[], Any]]:
    return {"dense reference": lambda: peers.dense_gradient_pursuit(x, dictionary, l0)}


def _saelens(x: Tensor, dictionary: Tensor, l0: int) -> dict[str, Callable[[], Any]]:
    from sae_lens.saes.matching_pursuit_sae import _encode_matching_pursuit

    return {"sae_lens matching pursuit": lambda: _encode_matching_pursuit(x, dictionary, 0.0, l0, False)}


def _sklearn(x: Tensor, dictionary: Tensor, l0: int) -> dict[str, Callable[[], Any]]:
    from sklearn.linear_model import orthogonal_mp_gram

    def run() -> Any:
        gram, products = dictionary @ dictionary.mT, dictionary @ x.mT
        return orthogonal_mp_gram(gram.double().numpy(), products.double().numpy(), n_nonzero_coefs=l0)

    return {"sklearn orthogonal_mp_gram": run}


def pursuit_rows() -> Iterator[Callable[[], Row]]:
    """Makers of the rows, one at a time: the dictionaries are large."""
    for shape in SHAPES:
        yield lambda shape=shape: _row("gradient", shape, _dense)
    yield lambda: _row("matching", SHAPES[0], _saelens)
    yield lambda: _row("orthogonal", SMALL, _sklearn)
