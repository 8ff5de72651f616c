"""Training SAEs as the papers write it: dense float64 arrays, autograd, torch's own Adam. The oracle of `training`."""

import dataclasses

import torch

from darkmatter_ext.training.trainer import ADAM_EPS, LEAST_COSINE, learning_rate_factor, start_weights


def planted(n=8000, d=16, features=20, active=3, seed=0):
    """Sparse sums of unit directions, with a mean and a scale that training must cope with; the directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, d, generator=generator), dim=1)
    chosen = torch.rand(n, features, generator=generator).topk(active).indices
    codes = torch.zeros(n, features).scatter(1, chosen, 1 + torch.rand(n, active, generator=generator))
    return 30 * (codes @ directions) + 5, directions


class DenseTrainer:
    """The same start, losses and rules as SaeTrainer, nothing sparse."""

    def __init__(self, config, mean):
        self.config = config
        self.weights = start_weights(dataclasses.replace(config, weights_dtype="float64"), mean)
        for weight in self.weights.values():
            weight.requires_grad_()
        self.start = self.weights["W_dec"].detach().clone()
        frozen = {"decoder": ["W_dec"], "encoder": ["W_enc", "b_enc"]}.get(config.freeze, [])
        self.trained = [weight for name, weight in self.weights.items() if name not in frozen]
        self.optimiser = torch.optim.Adam(
            [{"params": [weight]} for weight in self.trained], eps=ADAM_EPS, foreach=False
        )
        self.silent = torch.zeros(config.d_sae)
        self.steps_done = 0

    def step(self, x):
        """One step on x [N, d]; returns the loss."""
        config, own = self.config, self.weights
        x = x.double()
        scores = (x - own["b_dec"]) @ own["W_enc"].mT + own["b_enc"]
        if self.steps_done == 0 and config.architecture == "jumprelu":
            own["threshold"].data.fill_(scores.detach().relu().flatten().sort().values[-len(x) * config.k].item())
        acts, penalty = self._acts(scores)
        widths = config.prefixes
        x_hats = [acts[:, :width] @ own["W_dec"][:width] + own["b_dec"] for width in widths]
        loss = sum((x_hat - x).square().mean() for x_hat in x_hats) + penalty
        self.silent = torch.where((acts > 0).any(0), 0.0, self.silent + len(x))
        loss = loss + config.aux_coefficient * self._auxiliary(x, (x - x_hats[-1]).detach())
        loss = loss + config.pre_act_coefficient * self._below(x)
        self.optimiser.zero_grad()
        loss.backward()
        self._update()
        return loss.item()

    def _acts(self, scores):
        config, n = self.config, len(scores)
        relu, zero = scores.relu(), scores.new_zeros(())
        if config.architecture == "jumprelu":
            threshold = self.weights["threshold"]
            active = (scores > threshold).double()
            window = ((scores - threshold).abs() < config.bandwidth / 2).double()
            moved = window / config.bandwidth * (threshold - threshold.detach())  # 0, with the estimators' gradient
            l0 = (active - moved).sum(1)
            penalty = l0 if config.l0_penalty == "count" else (l0 / config.k - 1).square()
            return scores * active - threshold.detach() * moved, config.l0_coefficient * penalty.mean()
        if config.architecture == "topk":
            best = relu.topk(config.k)
            return torch.zeros_like(relu).scatter(1, best.indices, best.values), zero
        best = relu.flatten().topk(n * config.k)
        return torch.zeros_like(relu.flatten()).scatter(0, best.indices, best.values).unflatten(0, (n, -1)), zero

    def _auxiliary(self, x, error):
        own, dead = self.weights, self.silent > self.config.dead_after_tokens
        if self.config.aux_coefficient == 0 or not dead.any():
            return error.new_zeros(())
        scores = (x - own["b_dec"].detach()) @ own["W_enc"][dead].mT + own["b_enc"][dead]
        k = min(int(dead.sum()), self.config.aux_k or x.shape[1] // 2)
        best = scores.topk(k)
        acts = torch.zeros_like(scores).scatter(1, best.indices, best.values.relu())
        return (acts @ own["W_dec"][dead] - error).square().mean() / error.var()

    def _below(self, x):
        own, dead = self.weights, self.silent > self.config.dead_after_tokens
        if "threshold" not in own:
            return x.new_zeros(())
        scores = (x - own["b_dec"].detach()) @ own["W_enc"].mT + own["b_enc"]
        below = own["threshold"] - scores
        below = below * (below >= 0) * own["W_dec"].detach().norm(dim=1)  # at 0, where training starts, as below it
        return below[:, dead].sum(1).mean()

    @torch.no_grad()
    def _update(self):
        config, W_dec = self.config, self.weights["W_dec"]
        unit = config.decoder_norm == "unit" and config.freeze != "decoder"
        if unit:
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        if config.max_gradient_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.trained, config.max_gradient_norm)
        rate = config.learning_rate * learning_rate_factor(config, self.steps_done)
        for group in self.optimiser.param_groups:
            of_threshold = group["params"][0] is self.weights.get("threshold")
            group["lr"] = rate * (config.threshold_rate if of_threshold else 1)
        self.optimiser.step()
        self.steps_done += 1
        if unit:
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        if config.freeze == "soft-decoder":
            for row, first in zip(W_dec, self.start, strict=True):
                norm = row.norm()
                if row @ first < LEAST_COSINE * norm:
                    across = row - (row @ first) * first
                    row.copy_(norm * (LEAST_COSINE * first + 0.6 * across / across.norm()))
        if "threshold" in self.weights:
            self.weights["threshold"].clamp_(min=0)
