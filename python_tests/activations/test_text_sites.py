"""States of short texts: what is said of attention sinks among them. How texts are read: experiments/test_probing.py."""

import torch

from darkmatter_ext.activations.text_sites import TextSites


def test_attention_sinks_are_told():
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    sites = TextSites({"a": x.clone(), "b": x}, torch.arange(100), [[1]] * 100)
    sites.x["a"][[3, 50]] *= 40
    (note,) = sites.sink_notes("a", 10.0)
    assert "2 of 100 states of short texts have norms above 10 medians" in note
    assert sites.sink_notes("b", 10.0) == []
    assert sites.sink_notes("a", 0) == []  # no norm is unusual where the user says so
