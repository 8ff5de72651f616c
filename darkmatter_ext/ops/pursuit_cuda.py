"""Gradient pursuit on CUDA: two fused ops a step, no wait for the device, one CUDA graph for chunks of one shape.

All tokens of a chunk take all steps; a token that is done, or has had its own l0 steps, stays as it is inside the kernel.
That costs the screen of tokens already done, and saves asking the device which they are.

Residuals, weights and atoms are float64, so the choices are those of `reference.pursuit`, but for one thing: only equal
products tie, not those equal up to rounding (exact ties behind different arithmetic may go to the higher index).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from darkmatter_ext.ops.checks import call
from darkmatter_ext.ops.encode import topk_encode
from darkmatter_ext.ops.pursuit_choice import PreparedDictionary
from darkmatter_ext.ops.pursuit_steps import Rules
from darkmatter_ext.ops.reference import PURSUIT_NOISE

_ops = torch.ops.darkmatter
GRAPH_CHUNKS = 3  # chunks of one shape from which recording a graph pays


def pursuit_step(
    target: Tensor,
    dictionary: Tensor,
    choice: Tensor,
    l0: Tensor,
    step: int,
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    *,
    keep_chosen: bool,
    residual_threshold: float,
) -> None:
    """One step of gradient pursuit on CUDA, in place, after its atoms are chosen: see `ops/pursuit.py`.

    Args:
        target: [N, d] float32 or float64; dictionary [F, d]; choice, l0: [N] int64.
        step: from 0; tokens whose l0 is not above it stay as they are.
        state: residual [N, d], atoms [N, s] int64, weights [N, s], n_chosen [N] int64, done [N] int32; all contiguous.

    Cost: two reads of the rows of each token's atoms; nothing of size F, and nothing waits for the device.
    """
    call(_ops.pursuit_step, target, dictionary, choice, l0, step, keep_chosen, residual_threshold, *state)


class _Chunk:
    """The state of the tokens of one chunk, in buffers that stay where they are."""

    def __init__(self, n: int, steps: int, dictionary: PreparedDictionary) -> None:
        rows = dictionary.rows
        self.dictionary, self.steps = dictionary, steps
        self.target, self.residual = rows.new_empty(n, rows.shape[1]), rows.new_empty(n, rows.shape[1])
        self.l0 = rows.new_zeros(n, dtype=torch.int64)
        self.atoms = rows.new_zeros(n, steps, dtype=torch.int64)
        self.weights = rows.new_zeros(n, steps)
        self.n_chosen = rows.new_zeros(n, dtype=torch.int64)
        self.done = rows.new_zeros(n, dtype=torch.int32)

    def run(self, rules: Rules) -> None:
        """All steps for self.target and self.l0."""
        self.residual.copy_(self.target)
        for tensor in (self.atoms, self.weights, self.n_chosen, self.done):
            tensor.zero_()
        rows, no_bias, packed = self.dictionary.rows, self.dictionary.no_bias, self.dictionary.packed
        smallest = PURSUIT_NOISE * self.target.norm(dim=1)
        state = (self.residual, self.atoms, self.weights, self.n_chosen, self.done)
        for step in range(self.steps):
            choice = topk_encode(self.residual, rows.mT, no_bias, 1, prepared=packed).indices[:, 0].contiguous()
            pursuit_step(
                self.target,
                rows,
                choice,
                self.l0,
                step,
                state,
                keep_chosen=rules.keep_chosen,
                residual_threshold=rules.residual_threshold,
            )
            self.done |= self.residual.norm(dim=1) <= smallest  # no product can be more than rounding


def _recorded(chunk: _Chunk, rules: Rules) -> Callable[[], None]:
    """chunk.run as one CUDA graph. The run before recording loads kernels and sizes workspaces, which a graph may not."""
    side = torch.cuda.Stream(chunk.target.device)
    side.wait_stream(torch.cuda.current_stream(chunk.target.device))
    with torch.cuda.stream(side):
        chunk.run(rules)
    torch.cuda.current_stream(chunk.target.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chunk.run(rules)
    return graph.replay


def run_gradient_on_cuda(
    targets: Iterable[Tensor], steps: Sequence[Tensor], dictionary: PreparedDictionary, rules: Rules
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number of tokens, atoms [n, s] and weights [n, s] of each chunk; s is the largest l0 of all, asked of the device once.

    Memory: the state of one chunk, 24 (d + s) bytes a token and more, beside what topk_encode takes.
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
