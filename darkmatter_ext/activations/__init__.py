"""From text to tokens to activations, and running a model on from changed activations."""
