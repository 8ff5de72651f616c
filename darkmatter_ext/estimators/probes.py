"""Binary probes on features in memory: logistic regression, neighbours, choice by validation AUC, quivers of arrows.

A `Make` builds a probe: it turns fit features and labels into a function that scores other rows, once for each of its
candidates (penalties, numbers of neighbours). `arrows` chooses the candidate by AUC on held-back rows of the train side and
reports how it does on test rows. A *quiver* (Kantamneni et al., 2502.16681) is a set of arrows from which the one with the
best validation AUC is taken. Several label vectors share the eigenvectors of their features, which are the main cost.

Shapes: n rows, p features, m label vectors, q candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.runtime.inputs import InputError

PENALTIES = tuple(10.0**power for power in range(-5, 2))  # C: weight of the loss relative to |w|^2 / 2 or |w|_1
NEIGHBOURS = (5, 20, 50)
STEPS = 200  # at most, per fit: with the weakest penalty, separable rows would take thousands
TOLERANCE = {
    "l2": 5e-3,
    "l1": 1e-3,
}  # of a step relative to the weights: beyond this, no AUC changes noticeably
LEAVE_TWO_OUT, FEW, VALIDATION_SHARE, VALIDATION_ROWS = 12, 128, 0.2, 100  # as in the paper's code
FOLDS = 4  # between the first two; the paper's code has six

Score = Callable[[Tensor], dict[str, Tensor]]  # features [n, p] -> arrow's name -> scores [n, m, q]
# Features [n, p], labels [n, m] in {0, 1}, the rows of each of several fits [f, n] bool -> a Score of each fit.
Make = Callable[[Tensor, Tensor, Tensor], list[Score]]


def auc(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC curve [...] of scores [n, ...] for labels [n, ...] in {0, 1} (or [n], for all columns).

    Ties count half, so a constant score has 0.5; NaN if all labels are of one class. Cost: one sort per column.
    """
    from scipy.stats import rankdata

    y = labels.double().reshape(*labels.shape, *[1] * (scores.ndim - labels.ndim)).expand(scores.shape)
    ranks = torch.from_numpy(rankdata(scores.double().cpu().numpy(), axis=0)).to(y)
    positive = y.sum(0)
    negative = len(y) - positive
    return ((ranks * y).sum(0) - positive * (positive + 1) / 2) / (positive * negative)


class Coordinates(NamedTuple):
    """Standardised rows in the basis of their principal directions, largest first."""

    mean: Tensor  # [p]
    scale: Tensor  # [p]
    basis: Tensor  # [p, r]

    @classmethod
    def of(cls, x: Tensor) -> Coordinates:
        """Coordinates for fit rows x [n, p] of rank r. A feature that does not vary is not scaled."""
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
    z: Tensor, labels: Tensor, penalties: Sequence[float] = PENALTIES, *, tolerance: float = TOLERANCE["l2"]
) -> tuple[Tensor, Tensor]:
    """Weights [r, m, q] and biases [m, q] of min |w|^2 / 2 + C sum_i log(1 + exp(-t_i (w z_i + b))), t in {-1, 1}.

    Args:
        z: [n, r] with orthogonal, centred columns, as given by `Coordinates` of the same rows: the bound on
            the Hessian, C z^T z / 4 + 1, is then diagonal (Boehning and Lindsay 1988), and its steps are accelerated.
        tolerance: of a step, relative to the weights; at most STEPS steps.

    Cost: 4 n r m q multiply-adds per step.
    """
    n, m, q = len(z), labels.shape[1], len(penalties)
    y = labels.to(z)[:, :, None]
    c = torch.tensor(penalties).to(z)
    step_w = 1 / (c * z.square().sum(0)[:, None, None] / 4 + 1)  # [r, 1, q]
    step_b = 4 / (c * n)

    def moved(w: Tensor, b: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        rest = c[left] * (torch.sigmoid((z @ w.flatten(1)).view(n, m, len(left)) + b) - y)
        return w - step_w[..., left] * ((z.mT @ rest.flatten(1)).view_as(w) + w), b - step_b[left] * rest.sum(0)

    return _accelerated(moved, z.new_zeros(z.shape[1], m, q), _log_odds(y.sum(0), n).expand(m, q), 0, tolerance)


def logistic_l1(
    x: Tensor,
    labels: Tensor,
    penalties: Sequence[float] = PENALTIES,
    *,
    rows: Tensor | None = None,
    tolerance: float = TOLERANCE["l1"],
) -> tuple[Tensor, Tensor]:
    """Weights [m, p, q] and biases [m, q] of min |w|_1 + C sum_i log(1 + exp(-t_i (w x_i + b))).

    Args:
        x: [m, n, p], the features of each label vector.
        labels: [n, m].
        rows: [m, n] bool, the rows that each fit uses; default: all.
        tolerance: as for `logistic_l2`.

    Cost: 4 n p m q multiply-adds per step. Method: accelerated proximal gradient (Beck and Teboulle 2009). The bias is free,
    so features are centred: this separates weights and bias in the Hessian's bound, and removes its largest direction.
    """
    y, c = labels.to(x).mT[:, :, None], torch.tensor(penalties).to(x)  # [m, n, 1]
    own = torch.ones_like(y) if rows is None else rows.to(x)[:, :, None]
    n = own.sum(1)  # [m, 1]
    mean = (x * own).sum(1, keepdim=True) / n[:, None]
    x = (x - mean) * own
    step_w = 4 / (c * torch.linalg.matrix_norm(x, 2).square()[:, None, None].clamp(min=1e-12))
    step_b, x_t, weight = 4 / (c * n), x.mT.contiguous(), c * own  # weight [m, n, q]

    def moved(w: Tensor, b: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        rest, step = weight[..., left] * (torch.sigmoid(x @ w + b[:, None]) - y), step_w[..., left]
        w = torch.addcmul(w, step, x_t @ rest, value=-1)
        return w - w.clamp(min=-step, max=step), b - step_b[:, left] * rest.sum(1)

    start = _log_odds((y * own).sum(1), n).expand(len(x), len(c))
    w, b = _accelerated(moved, x.new_zeros(len(x), x.shape[2], len(c)), start, 1, tolerance)
    return w, b - (mean @ w)[:, 0]


def _log_odds(positive: Tensor, n: Tensor | int) -> Tensor:
    """[m, 1]: initial biases for this many positive among n rows, the optimum without features."""
    known = positive.clamp(min=0.5).minimum(torch.as_tensor(n).to(positive) - 0.5)
    return (known / (n - known)).log()


def _accelerated(
    moved: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], w: Tensor, b: Tensor, dim: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """The fixed point of a step, by Nesterov's momentum, restarted when it leads back (O'Donoghue, Candes 2015).

    Dimension `dim` of w is the features; along all others the problems are independent. The last dimension is the penalties:
    those at their fixed point are done, and `moved` is told which are left.
    """
    found = w.clone(), b.clone()
    ahead, inertia, left = (w, b), torch.ones_like(b), torch.arange(b.shape[-1], device=b.device)
    for _ in range(STEPS):
        new = moved(*ahead, left)
        change = new[0] - w, new[1] - b
        back = ((ahead[0] - new[0]) * change[0]).sum(dim) + (ahead[1] - new[1]) * change[1] > 0  # [m, q]
        grown = (1 + (1 + 4 * inertia.square()).sqrt()) / 2
        momentum = torch.where(back, 0.0, (inertia - 1) / grown)
        inertia = torch.where(back, 1.0, grown)
        w, b = new
        size = w.square().sum(dim) + b.square()
        still = (change[0].square().sum(dim) + change[1].square() > tolerance**2 * size).any(0)  # [q]
        ahead = w + momentum.unsqueeze(dim) * change[0], b + momentum * change[1]
        if not bool(still.all()):
            _put(found, (w, b), left, ~still)
            left, (w, b), inertia = left[still], (w[..., still], b[..., still]), inertia[..., still]
            ahead = ahead[0][..., still], ahead[1][..., still]
            if not len(left):
                break
    _put(found, (w, b), left, torch.ones_like(left, dtype=torch.bool))
    return found


def _put(found: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], left: Tensor, done: Tensor) -> None:
    for whole, part in zip(found, own, strict=True):
        whole[..., left[done]] = part[..., done]


# ---- the kinds of probes


def dense(name: str, components: Mapping[str, int] | None = None, penalties: Sequence[float] = PENALTIES) -> Make:
    """Logistic regression (L2) on all features and, for each name in `components`, on that many principal components."""

    def fitted(x: Tensor, labels: Tensor) -> Score:
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

    return _one_by_one(fitted)


def _one_by_one(fitted: Callable[[Tensor, Tensor], Score]) -> Make:
    """A Make that fits one after another."""
    return lambda x, labels, rows: [fitted(x[own], labels[own]) for own in rows]


def neighbours(name: str, counts: Sequence[int] = NEIGHBOURS) -> Make:
    """The share of positive labels among the nearest fit rows, with standardised features; `counts` are the candidates."""

    def fitted(x: Tensor, labels: Tensor) -> Score:
        mean, scale = x.float().mean(0), x.float().std(0, correction=0)
        scale = torch.where(scale > 0, scale, torch.inf)
        known, y = (x.float() - mean) / scale, labels.float()

        def score(x: Tensor) -> dict[str, Tensor]:
            nearest = torch.cdist((x.float() - mean) / scale, known).topk(min(max(counts), len(known)), largest=False)
            votes = y[nearest.indices]  # [n, most, m]
            return {name: torch.stack([votes[:, :count].mean(1) for count in counts], dim=-1)}

        return score

    return _one_by_one(fitted)


def class_difference(acts: Tensor, labels: Tensor) -> Tensor:
    """[p, m]: |difference of class means| of latents [n, p], each divided by its mean active value."""
    acts, y = acts.float(), labels.to(acts.device, torch.float32)
    active = acts.sum(0) / (acts > 0).sum(0).clamp(min=1)
    means = [acts.mT @ side / side.sum(0).clamp(min=1) for side in (y, 1 - y)]
    return ((means[0] - means[1]).abs() / active.clamp(min=1e-30)[:, None]).where(active[:, None] > 0, 0)


def latents(names: Mapping[str, int], *, rank: Callable[[Tensor, Tensor], Tensor] = class_difference) -> Make:
    """Logistic regression (L1) on the latents that `rank` puts first on the fit rows, as many as each name asks for.

    Latents are divided by their standard deviation. All fits run at once, because their steps are many and small.
    """

    def make(x: Tensor, labels: Tensor, rows: Tensor) -> list[Score]:
        m = labels.shape[1]
        orders = [rank(x[own], labels[own]).sort(dim=0, descending=True, stable=True).indices for own in rows]  # [p, m]
        mine = rows.repeat_interleave(m, 0)  # [f m, n]
        fits: dict[str, list[tuple[Tensor, ...]]] = {}
        for name, count in names.items():
            chosen = torch.cat([order[:count].mT for order in orders])  # [f m, k]
            own = x[:, chosen].permute(1, 0, 2).float()  # [f m, n, k]
            inside = mine[:, :, None].to(own)
            mean = (own * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True)
            scale = (((own - mean) * inside).square().sum(1, keepdim=True) / inside.sum(1, keepdim=True)).sqrt()
            scale = torch.where(scale > 1e-6 * own.abs().amax(1, keepdim=True), scale, torch.inf)
            weight, bias = logistic_l1(own / scale, labels.repeat(1, len(rows)), rows=mine)
            fits[name] = list(zip(*(part.split(m) for part in (chosen, scale[:, 0], weight, bias)), strict=True))
        return [functools.partial(_scored, {name: own[fit] for name, own in fits.items()}) for fit in range(len(rows))]

    return make


def _scored(fits: Mapping[str, tuple[Tensor, ...]], x: Tensor) -> dict[str, Tensor]:
    return {
        name: torch.einsum("nmk,mkq->nmq", x[:, chosen].float() / scale, weight) + bias
        for name, (chosen, scale, weight, bias) in fits.items()
    }


def random_rank(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A control for `latents`: the latents that fire on the fit rows, in an order independent of the labels."""

    def rank(acts: Tensor, labels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(acts.shape[1], labels.shape[1], generator=generator).to(acts.device)
        return drawn.where((acts > 0).any(0)[:, None], -1)

    return rank


# ---- choice


class Arrow(NamedTuple):
    """A probe with its candidate chosen on the train side; one number per label vector, each [m]."""

    validation: Tensor  # AUC by which it was chosen
    test: Tensor


def validation_folds(labels: Tensor, *, seed: int) -> list[Tensor]:
    """The rows that each fold holds back, with every class spread evenly: pairs of both classes for up to 12 rows, FOLDS
    folds below 128, otherwise one part of 20 % (at most 100 rows).

    Raises InputError if all labels [n] are of one class.
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

    A fold that holds back only one class of a label vector does not count for it. Cost: one fit per fold, and one on all rows.
    """
    rows = torch.ones(len(folds) + 1, len(x), dtype=torch.bool)  # the last fit uses all
    for fold, held_back in enumerate(folds):
        rows[fold, held_back] = False
    *by_fold, last = make(x, labels, rows)
    found: dict[str, list[Tensor]] = {}
    for score, held_back in zip(by_fold, folds, strict=True):
        for name, scores in score(x[held_back]).items():
            found.setdefault(name, []).append(auc(scores, labels[held_back]))
    finished: dict[str, Arrow] = {}
    for name, scores in last(x_test).items():
        validation = torch.stack(found[name]).nanmean(0).nan_to_num(0.5)  # [m, q]
        best = validation.max(1)
        test = auc(scores, test_labels).gather(1, best.indices[:, None])[:, 0]
        finished[name] = Arrow(best.values, test)
    return finished


def quiver(validation: Tensor, test: Tensor) -> Tensor:
    """Test AUC [...] of the arrow with the best validation AUC among arrows [..., a]; the first of equal ones."""
    return test.gather(-1, validation.argmax(-1, keepdim=True))[..., 0]
