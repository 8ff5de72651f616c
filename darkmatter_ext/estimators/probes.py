"""Binary probes on features in memory: logistic regression, neighbours, choice by validation AUC, quivers of arrows.

A probe is made by a `Make`: from fit features and labels to a function that scores other rows, once for each of its
candidates (penalties, numbers of neighbours). `arrow` chooses the candidate by AUC on held-back rows of the train side and
says how the chosen one does on test rows; a *quiver* (Kantamneni et al., 2502.16681) is a set of arrows of which the one
with the best validation AUC is taken. Several label vectors share their features' eigenvectors, which are what costs.

Shapes: n rows, p features, m label vectors, q candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.runtime.inputs import InputError

PENALTIES = tuple(10.0**power for power in range(-5, 2))  # C: weight of the loss beside |w|^2 / 2 or |w|_1
NEIGHBOURS = (5, 20, 50)
STEPS = 300  # of a fit, at most
TOLERANCE = 5e-3  # of a step relative to the weights: closer than that the AUC does not change by what matters
LEAVE_TWO_OUT, FEW, VALIDATION_SHARE, VALIDATION_ROWS = 12, 128, 0.2, 100  # as the paper's code has them
FOLDS = 4  # between the first two; the paper's code has six

Score = Callable[[Tensor], dict[str, Tensor]]  # features [n, p] -> arrow's name -> scores [n, m, q]
Make = Callable[[Tensor, Tensor], Score]  # fit features [n, p], labels [n, m] in {0, 1} -> Score


def auc(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC curve [...] of scores [n, ...] for labels [n, ...] in {0, 1} (or [n], for all columns).

    Ties count half, so a constant score has 0.5; NaN where the labels are of one class. Cost: a sort of each column.
    """
    from scipy.stats import rankdata

    y = labels.double().reshape(*labels.shape, *[1] * (scores.ndim - labels.ndim)).expand(scores.shape)
    ranks = torch.from_numpy(rankdata(scores.double().cpu().numpy(), axis=0)).to(y)
    positive = y.sum(0)
    negative = len(y) - positive
    return ((ranks * y).sum(0) - positive * (positive + 1) / 2) / (positive * negative)


class Coordinates(NamedTuple):
    """Standardised rows in the basis of their principal directions, the largest first."""

    mean: Tensor  # [p]
    scale: Tensor  # [p]
    basis: Tensor  # [p, r]

    @classmethod
    def of(cls, x: Tensor) -> Coordinates:
        """Of fit rows x [n, p]: r is their rank. A feature that does not vary is not scaled."""
        x = x.double()
        mean, scale = x.mean(0), x.std(0, correction=0)
        scale = torch.where(scale > 1e-9 * x.abs().amax(0).clamp(min=1e-30), scale, torch.inf)
        x = (x - mean) / scale
        n, p = x.shape
        energy, vectors = torch.linalg.eigh(x @ x.mT if n < p else x.mT @ x)
        kept = energy > 1e-9 * energy.max()
        energy, vectors = energy[kept].flip(0), vectors[:, kept].flip(1)
        return cls(mean, scale, x.mT @ vectors / energy.sqrt() if n < p else vectors)

    def __call__(self, x: Tensor) -> Tensor:
        """[n, r] float32."""
        return (((x.double() - self.mean) / self.scale) @ self.basis).float()


def logistic_l2(
    z: Tensor, labels: Tensor, penalties: Sequence[float] = PENALTIES, *, tolerance: float = TOLERANCE
) -> tuple[Tensor, Tensor]:
    """Weights [r, m, q] and biases [m, q] of min |w|^2 / 2 + C sum_i log(1 + exp(-t_i (w z_i + b))), t in {-1, 1}.

    Args:
        z: [n, r] whose columns are orthogonal and centred, as `Coordinates` of the same rows gives them: the bound of
            the Hessian, C z^T z / 4 + 1, is then diagonal (Boehning and Lindsay 1988), and steps by it are accelerated.
        tolerance: of a step, relative to the weights; STEPS at most.

    Cost: 4 n r m q multiply-adds a step.
    """
    n, m, q = len(z), labels.shape[1], len(penalties)
    y = labels.to(z)[:, :, None]
    c = torch.tensor(penalties).to(z)
    step_w = 1 / (c * z.square().sum(0)[:, None, None] / 4 + 1)  # [r, 1, q]
    step_b = 4 / (c * n)

    def moved(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        rest = c * (torch.sigmoid((z @ w.flatten(1)).view(n, m, q) + b) - y)
        return w - step_w * ((z.mT @ rest.flatten(1)).view_as(w) + w), b - step_b * rest.sum(0)

    return _accelerated(moved, z.new_zeros(z.shape[1], m, q), _log_odds(y).expand(m, q), 0, tolerance)


def logistic_l1(
    x: Tensor, labels: Tensor, penalties: Sequence[float] = PENALTIES, *, tolerance: float = TOLERANCE
) -> tuple[Tensor, Tensor]:
    """Weights [m, p, q] and biases [m, q] of min |w|_1 + C sum_i log(1 + exp(-t_i (w x_i + b))).

    Args:
        x: [m, n, p], the features of each label vector.
        tolerance: as of `logistic_l2`.

    Cost: 4 n p m q multiply-adds a step. Method: proximal gradient, accelerated (Beck and Teboulle 2009).
    """
    y, c = labels.to(x).mT[:, :, None], torch.tensor(penalties).to(x)  # [m, n, 1]
    largest = torch.linalg.matrix_norm(x, 2).square()[:, None, None]
    step_w = 2 / (c * largest.clamp(min=1e-12))  # half of either block's bound holds for both together
    step_b, x_t = 2 / (c * x.shape[1]), x.mT.contiguous()

    def moved(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        rest = c * (torch.sigmoid(x @ w + b[:, None]) - y)  # [m, n, q]
        w = torch.addcmul(w, step_w, x_t @ rest, value=-1)
        return w - w.clamp(min=-step_w, max=step_w), b - step_b * rest.sum(1)

    start = _log_odds(y.transpose(0, 1)).expand(len(x), len(c))
    return _accelerated(moved, x.new_zeros(len(x), x.shape[2], len(c)), start, 1, tolerance)


def _log_odds(y: Tensor) -> Tensor:
    """[m, 1] where the biases start: what is best without features."""
    share = y.mean(0).clamp(0.5 / len(y), 1 - 0.5 / len(y))
    return (share / (1 - share)).log()


def _accelerated(
    moved: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], w: Tensor, b: Tensor, dim: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """The fixed point of a step, by Nesterov's momentum that starts anew where it leads back (O'Donoghue, Candes 2015).

    `dim` of w is its features; the problems of all others are apart.
    """
    ahead, inertia = (w, b), torch.ones_like(b)
    for _ in range(STEPS):
        new = moved(*ahead)
        change = new[0] - w, new[1] - b
        back = ((ahead[0] - new[0]) * change[0]).sum(dim) + (ahead[1] - new[1]) * change[1] > 0  # [m, q]
        grown = (1 + (1 + 4 * inertia.square()).sqrt()) / 2
        momentum = torch.where(back, 0.0, (inertia - 1) / grown)
        inertia = torch.where(back, 1.0, grown)
        w, b = new
        size = w.square().sum(dim) + b.square()
        if bool((change[0].square().sum(dim) + change[1].square() <= tolerance**2 * size).all()):
            break
        ahead = w + momentum.unsqueeze(dim) * change[0], b + momentum * change[1]
    return w, b


# ---- the kinds of probes


def dense(name: str, components: Mapping[str, int] | None = None, penalties: Sequence[float] = PENALTIES) -> Make:
    """Logistic regression (L2) on all features; and, by the names in `components`, on so many principal components."""

    def make(x: Tensor, labels: Tensor) -> Score:
        own = Coordinates.of(x)
        z = own(x)
        widths = {name: z.shape[1], **(components or {})}
        fits = {key: logistic_l2(z[:, :width], labels, penalties) for key, width in widths.items()}

        def score(x: Tensor) -> dict[str, Tensor]:
            rows = own(x)
            return {
                key: torch.einsum("nr,rmq->nmq", rows[:, : len(weight)], weight) + bias
                for key, (weight, bias) in fits.items()
            }

        return score

    return make


def neighbours(name: str, counts: Sequence[int] = NEIGHBOURS) -> Make:
    """The share of positive labels among the nearest fit rows, features standardised; `counts` are the candidates."""

    def make(x: Tensor, labels: Tensor) -> Score:
        mean, scale = x.float().mean(0), x.float().std(0, correction=0)
        scale = torch.where(scale > 0, scale, torch.inf)
        known, y = (x.float() - mean) / scale, labels.float()

        def score(x: Tensor) -> dict[str, Tensor]:
            nearest = torch.cdist((x.float() - mean) / scale, known).topk(min(max(counts), len(known)), largest=False)
            votes = y[nearest.indices]  # [n, most, m]
            return {name: torch.stack([votes[:, :count].mean(1) for count in counts], dim=-1)}

        return score

    return make


def class_difference(acts: Tensor, labels: Tensor) -> Tensor:
    """[p, m] |difference of class means| of latents [n, p], each divided by its mean active value."""
    acts, y = acts.float(), labels.to(acts.device, torch.float32)
    active = acts.sum(0) / (acts > 0).sum(0).clamp(min=1)
    means = [acts.mT @ side / side.sum(0).clamp(min=1) for side in (y, 1 - y)]
    return ((means[0] - means[1]).abs() / active.clamp(min=1e-30)[:, None]).where(active[:, None] > 0, 0)


def latents(names: Mapping[str, int], *, rank: Callable[[Tensor, Tensor], Tensor] = class_difference) -> Make:
    """Logistic regression (L1) on the latents that `rank` puts first on the fit rows, as many as each name asks for.

    Latents are divided by their standard deviation and not centred, so that silence stays 0.
    """

    def make(x: Tensor, labels: Tensor) -> Score:
        order = rank(x, labels).sort(dim=0, descending=True, stable=True).indices  # [p, m]
        fits = {}
        for name, count in names.items():
            chosen = order[:count].mT  # [m, k]
            own = x[:, chosen].permute(1, 0, 2).float()  # [m, n, k]
            scale = own.std(1, correction=0, keepdim=True)
            scale = torch.where(scale > 0, scale, torch.inf)
            fits[name] = (chosen, scale, *logistic_l1(own / scale, labels))

        def score(x: Tensor) -> dict[str, Tensor]:
            return {
                name: torch.einsum("nmk,mkq->nmq", x[:, chosen].float() / scale[:, 0], weight) + bias
                for name, (chosen, scale, weight, bias) in fits.items()
            }

        return score

    return make


def random_rank(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A control for `latents`: the latents that fire on the fit rows, in an order that no label decided."""

    def rank(acts: Tensor, labels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(acts.shape[1], labels.shape[1], generator=generator).to(acts.device)
        return drawn.where((acts > 0).any(0)[:, None], -1)

    return rank


# ---- choice


class Arrow(NamedTuple):
    """A probe, its candidate chosen on the train side; one number a label vector, each [m]."""

    validation: Tensor  # AUC that it was chosen by
    test: Tensor


def validation_folds(labels: Tensor, *, seed: int) -> list[Tensor]:
    """The rows each fold holds back, every class dealt evenly: pairs of both classes for up to 12 rows, FOLDS below
    128, else one part of 20 % (at most 100 rows).

    Raises InputError for labels [n] of one class.
    """
    n, n_positive = len(labels), int(labels.sum())
    if not 0 < n_positive < n:
        raise InputError(f"labels: must be of both classes, got {n_positive} of {n} positive")
    generator, place = torch.Generator().manual_seed(seed), torch.empty(n, dtype=torch.float64)
    for kind in (0, 1):
        rows = (labels == kind).nonzero().flatten()
        place[rows[torch.randperm(len(rows), generator=generator)]] = (torch.arange(len(rows)).double() + 0.5) / len(
            rows
        )
    if n >= FEW:
        share = min(VALIDATION_SHARE, VALIDATION_ROWS / n)
        return [(place < share).nonzero().flatten()]
    count = max(2, min(n_positive, n - n_positive, n // 2 if n <= LEAVE_TWO_OUT else FOLDS))
    own = (place * count).long()
    return [(own == fold).nonzero().flatten() for fold in range(count)]


def arrows(
    make: Make, x: Tensor, labels: Tensor, x_test: Tensor, test_labels: Tensor, folds: Sequence[Tensor]
) -> dict[str, Arrow]:
    """Every arrow of a kind of probe.

    Args:
        x, labels: train side, [n, p] and [n, m].
        x_test, test_labels: [n', p] and [n'].
        folds: rows of the train side held back in turn, see `validation_folds`.

    A fold that holds back one class of a label vector says nothing of it. Cost: a fit a fold, and one on all rows.
    """
    found: dict[str, list[Tensor]] = {}
    for held_back in folds:
        kept = torch.ones(len(x), dtype=torch.bool)
        kept[held_back] = False
        for name, scores in make(x[kept], labels[kept])(x[held_back]).items():
            found.setdefault(name, []).append(auc(scores, labels[held_back]))
    finished: dict[str, Arrow] = {}
    for name, scores in make(x, labels)(x_test).items():
        validation = torch.stack(found[name]).nanmean(0).nan_to_num(0.5)  # [m, q]
        best = validation.max(1)
        test = auc(scores, test_labels).gather(1, best.indices[:, None])[:, 0]
        finished[name] = Arrow(best.values, test)
    return finished


def quiver(validation: Tensor, test: Tensor) -> Tensor:
    """Test AUC [...] of the arrow with the best validation AUC, of arrows [..., a]; of equal ones the first."""
    return test.gather(-1, validation.argmax(-1, keepdim=True))[..., 0]
