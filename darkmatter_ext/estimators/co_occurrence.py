"""Which latents are active in the same chunks of text: streamed counts, and affinities computed from them.

Shapes: c chunks, F latents, z active entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.estimators.sums import Reduce
from darkmatter_ext.runtime.inputs import require_one_of

MEASURES = ("phi", "jaccard", "dice", "overlap", "simple")


@dataclass
class CoOccurrence:
    """Number of chunks in which latents are active together. Memory: 4 F^2 bytes, for any text; counts are exact to 2^24."""

    both: Tensor  # [F, F] float32; the diagonal counts each latent's chunks
    chunks: int = 0

    @classmethod
    def empty(cls, d_sae: int, device: torch.device | str = "cpu") -> CoOccurrence:
        return cls(torch.zeros(d_sae, d_sae, device=device))

    def add(self, present: Tensor) -> None:
        """Add complete chunks: present [c, F] bool. Cost: c F^2 multiply-adds."""
        own = present.to(self.both)
        self.both += own.mT @ own
        self.chunks += len(present)

    def merge(self, other: CoOccurrence) -> None:
        """Add the chunks of another part."""
        self.both += other.both
        self.chunks += other.chunks

    def reduced(self, reduce: Reduce) -> CoOccurrence:
        """The chunks of all processes."""
        n = reduce(torch.tensor([self.chunks], dtype=torch.float64, device=self.both.device))
        return CoOccurrence(reduce(self.both.clone()), int(n.item()))

    @property
    def counts(self) -> Tensor:
        """[F]: number of chunks in which each latent is active."""
        return self.both.diagonal()

    def often(self, least: int) -> Tensor:
        """Latents [n] that are present in at least `least` chunks, but not in all."""
        return ((self.counts >= least) & (self.counts < self.chunks)).nonzero().flatten()

    def of(self, latents: Tensor) -> CoOccurrence:
        """The same chunks, restricted to the given latents."""
        return CoOccurrence(self.both[latents][:, latents], self.chunks)

    def affinity(self, measure: str = "phi") -> Tensor:
        """[F, F] float64 for one of MEASURES; NaN if a latent is active in no chunk or, for phi, in all.

        phi, from -1 to 1, is the correlation of two latents' presence; the others, from 0 to 1, count shared chunks.
        """
        require_one_of("measure", MEASURES, measure)
        n, n11, a = self.chunks, self.both.double(), self.counts.double()
        either = a[:, None] + a
        if measure == "phi":
            spread = (a * (n - a)).sqrt()
            return (n * n11 - a[:, None] * a) / (spread[:, None] * spread)
        if measure == "jaccard":
            return n11 / (either - n11)
        if measure == "dice":
            return 2 * n11 / either
        if measure == "overlap":
            return n11 / torch.minimum(a[:, None], a)
        return (n - either + 2 * n11) / n


def present(chunks: Tensor, latents: Tensor, n_chunks: int, d_sae: int) -> Tensor:
    """[n_chunks, F] bool from active entries: chunk [z] and latent [z] of each."""
    found = torch.zeros(n_chunks, d_sae, dtype=torch.bool, device=latents.device)
    found[chunks, latents] = True
    return found


def unrelated(present: Tensor, generator: torch.Generator) -> Tensor:
    """A control: each latent is in as many of the chunks [c, F], but in randomly drawn ones, independently per latent."""
    order = torch.rand(present.shape, generator=generator).argsort(0).to(present.device)
    return present.gather(0, order)
