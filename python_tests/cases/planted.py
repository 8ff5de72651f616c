"""Activations in memory with SAEs that are any function of them, for planted truths; and the tokens a family's run measured."""

from dataclasses import dataclass

import torch

from darkmatter_ext.activations.sources import ContextBatch
from darkmatter_ext.measurement.nulls import NullModels
from darkmatter_ext.measurement.run import prepare
from darkmatter_ext.measurement.tokens import FIT
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import Encoded, Encoder

LENGTH = 50


@dataclass
class PlantedSource:
    """Contexts of LENGTH tokens, each a document, of activations [n, d] at named hook points."""

    activations: dict
    identity: str = "planted"
    context_length: int = LENGTH
    largest_token: int = 0

    @property
    def widths(self):
        return {hook: x.shape[1] for hook, x in self.activations.items()}

    @property
    def n_contexts(self):
        return len(next(iter(self.activations.values()))) // LENGTH

    @property
    def documents(self):
        return torch.arange(self.n_contexts)

    def read(self, numbers):
        rows = {hook: x.unflatten(0, (-1, LENGTH))[list(numbers)] for hook, x in self.activations.items()}
        return ContextBatch(list(numbers), torch.zeros(len(numbers), LENGTH, dtype=torch.int64), rows)


def planted_sae(name, hook, x_hat, codes=None, d_sae=1):
    """An "SAE" whose output is a function of x; `codes` gives its latents [n, F]."""

    def encode(x):
        z = torch.zeros(len(x), d_sae) if codes is None else codes(x)
        return Encoded(x_hat(x), (z != 0).sum(1), SparseActs.from_dense(z))

    return Encoder.of_site(name, hook, d_sae, lambda: encode)


def coin(x):
    """+1 or -1 for every number, by a late digit of it: noise that is a function of x and that no smooth map of x knows."""
    return 1 - 2 * ((x.double().abs() * 4e4).floor() % 2).to(x.dtype)


def family_tokens(settings, hooks):
    """What a run with SAEs trained at hooks measured: hook -> x [n, d] float64 and the SAEs by name, which of the n
    tokens are fit tokens."""
    inputs = prepare(settings, Stages(show=False), train_at=hooks)
    source, measure = inputs.source, settings.measure
    batch = source.read(range(source.n_contexts))
    kept = range(measure.drop_positions, source.context_length - (measure.parity == "released-code"))
    x = {hook: batch.activations[hook][:, kept].flatten(0, 1).double() for hook in hooks}
    fit = (inputs.roles.contexts == FIT)[:, None].expand(-1, len(kept)).flatten()
    return x, {hook: {sae.name: sae.load() for sae in inputs.of(hook)} for hook in hooks}, fit


def plain_map(x, y, *, bias=True):
    """Least squares by torch.linalg.lstsq, as a function."""
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    padded = torch.cat([x, ones], dim=1) if bias else x
    weight = torch.linalg.lstsq(padded, y, driver="gelsd").solution

    def apply(rows):
        both = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1) if bias else rows
        return both @ weight

    return apply


def plain_r2(predicted, y):
    """Mean over columns of R2."""
    return (1 - (y - predicted).square().sum(0) / (y - y.mean(0)).square().sum(0)).mean().item()


def plain_parts(x, sae, fit, *, bias=True, on_all=False):
    """Sae(x), error, linear and nonlinear error [n, d]: b* with or without bias, on fit tokens or on all."""
    x_hat = sae(x.float()).double()
    error = x - x_hat
    rows = torch.ones_like(fit) if on_all else fit
    linear = plain_map(x[rows], error[rows], bias=bias)(x)
    return {"sae": x_hat, "error": error, "linear": linear, "nonlinear": error - linear}


def normal(*shape, seed=0):
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def null_models(covariance=None, seed=1):
    """The null models of an error of that covariance [16, 16] (1: all directions alike), on 64 normal activations."""
    return NullModels.from_covariance(torch.eye(16) if covariance is None else covariance, normal(64, 16, seed=seed))
