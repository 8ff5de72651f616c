"""From activations and SAEs to sums, and from sums to numbers with intervals."""
