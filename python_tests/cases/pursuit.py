"""Dictionaries, friendly and adversarial, and what is pursued in them."""

import torch


def unit(n, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1)


def duplicates(n, d):
    return unit(n // 2, d).repeat(2, 1)


def tied(n, d):
    """Axes and their negatives, each several times: every product has equals."""
    return torch.cat([torch.eye(d, dtype=torch.float64), -torch.eye(d, dtype=torch.float64)]).repeat(n, 1)[:n]


def zero_atoms(n, d):
    atoms = unit(n, d)
    atoms[::3] = 0
    return atoms


def correlated(n, d):
    """A cosine of about 0.8 between any two."""
    return torch.nn.functional.normalize(unit(n, d) * 0.5 + unit(1, d, seed=1), dim=1)


def any_norm(n, d):
    return unit(n, d) * torch.logspace(-1, 0.1, n, dtype=torch.float64)[:, None]


DICTIONARIES = [unit, duplicates, tied, zero_atoms, correlated, any_norm]


def targets(n, d, seed=5):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0] = 0  # converged from the start
    return x


def made_of(D, n, active=6, seed=6):
    """Targets that a few atoms of D add up to, with a little noise: near-ties and small residuals in many steps."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, len(D), generator=g, dtype=torch.float64)
    weights = weights * (torch.rand(n, len(D), generator=g) < active / len(D))
    return weights @ D + 0.02 * torch.randn(n, D.shape[1], generator=g, dtype=torch.float64)
