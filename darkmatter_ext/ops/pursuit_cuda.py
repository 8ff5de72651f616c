"""Gradient pursuit on CUDA: two fused ops per step, no waiting for the device, one CUDA graph for chunks of one shape.

All tokens of a chunk go through all steps; the kernels skip a token that is done or has taken its own l0 steps. That
avoids asking the device which tokens those are. Residuals and weights are float64 and atoms are used as given, so the
choices are those of `reference.pursuit`, including ties up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from darkmatter_ext.ops.checks import call
from darkmatter_ext.ops.pursuit_choice import PreparedDictionary, noise_of
from darkmatter_ext.ops.pursuit_steps import Rules

_ops = torch.ops.darkmatter
GRAPH_CHUNKS = 3  # recording a graph pays from this many chunks of one shape


class _Chunk:
    """The state of one chunk's tokens, in buffers that are never moved."""

    def __init__(self, n: int, steps: int, dictionary: PreparedDictionary) -> None:
        rows, d = dictionary.rows, dictionary.rows.shape[1]
        self.dictionary, self.steps = dictionary, steps
        self.target = rows.new_empty(n, d, dtype=torch.float64)
        self.residual = torch.empty_like(self.target)
        self.l0 = rows.new_zeros(n, dtype=torch.int64)
        self.noise = self.target.new_empty(n)
        self.atoms = rows.new_zeros(n, steps, dtype=torch.int64)
        self.weights = self.target.new_zeros(n, steps)
        self.n_chosen = rows.new_zeros(n, dtype=torch.int64)
        self.done = rows.new_zeros(n, dtype=torch.int32)

    def run(self, rules: Rules) -> None:
        """Run all steps for self.target and self.l0."""
        self.residual.copy_(self.target)
        self.noise.copy_(noise_of(self.target, self.dictionary))
        self.done.copy_(self.noise == 0)  # nothing to explain, or nothing to explain it with
        for tensor in (self.atoms, self.weights, self.n_chosen):
            tensor.zero_()
        rows, packed = self.dictionary.rows, self.dictionary.packed
        state = (self.residual, self.atoms, self.weights, self.n_chosen, self.done)
        for step in range(self.steps):
            choice = call(
                _ops.pursuit_choose,
                self.residual,
                rows,
                packed.codes,
                packed.bounds,
                self.noise,
                self.l0,
                step,
                self.done,
            )
            call(
                _ops.pursuit_step,
                self.target,
                rows,
                choice,
                self.noise,
                self.l0,
                step,
                rules.keep_chosen,
                rules.residual_threshold,
                *state,
            )


def _recorded(chunk: _Chunk, rules: Rules) -> Callable[[], None]:
    """chunk.run as one CUDA graph. A first run loads kernels and sizes workspaces, which is not allowed in a graph."""
    side = torch.cuda.Stream(chunk.target.device)
    side.wait_stream(torch.cuda.current_stream(chunk.target.device))
    with torch.cuda.stream(side):
        chunk.run(rules)
    torch.cuda.current_stream(chunk.target.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # On the tensors' device, whichever is current; other threads may allocate meanwhile.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        chunk.run(rules)
    return graph.replay


def run_gradient_on_cuda(
    targets: Iterable[Tensor], steps: Sequence[Tensor], dictionary: PreparedDictionary, rules: Rules
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the number of tokens, atoms [n, s] and weights [n, s] of each chunk; s is the largest l0, read before the first.

    Memory: the state of one chunk, at least 24 (d + s) bytes per token, on top of what topk_encode needs.
    """
    most = max((int(own.max()) for own in steps if len(own)), default=0)
    full = sum(len(own) == len(steps[0]) for own in steps)
    chunk: _Chunk | None = None
    run: Callable[[], None] | None = None
    for target, own in zip(targets, steps, strict=True):
        if len(target) == 0:
            continue
        if chunk is None or len(chunk.target) != len(target):
            chunk, run = _Chunk(len(target), most, dictionary), None
        chunk.target.copy_(target)
        chunk.l0.copy_(own)
        if run is None and most and target.is_cuda and full >= GRAPH_CHUNKS and len(target) == len(steps[0]):
            run = _recorded(chunk, rules)
        if run is None:
            chunk.run(rules)
        else:
            run()
        yield len(target), chunk.atoms.clone(), chunk.weights.clone()
