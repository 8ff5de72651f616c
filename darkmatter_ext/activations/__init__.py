"""Text to tokens to activations, and a model run on from changed ones."""
