"""The bits of every op are those written down here, on any machine (docs/reliability.md, "What stays the same")."""

from cases.golden import digests

GOLDEN = {
    "topk_encode": "f0e22faaad088fb1",
    "threshold_encode": "b540994f9b5ba226",
    "gradients of the encoders": "11a2e1892f4c21ea",
    "find_support": "b6217f542b1f60eb",
    "to_dense": "73f24fd8dbd05515",
    "sparse_decode": "759aad0c10bb7870",
    "gradients of sparse_decode": "ddc9e66e54b7ea93",
}


def test_every_op_answers_to_the_bit_as_ever():
    """A change of one of these is a change of what the package promises: it belongs in CHANGELOG.md."""
    assert digests() == GOLDEN
