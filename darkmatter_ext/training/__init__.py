"""Training SAEs at the cost of what is active: configuration, batches, the step, checkpoints, saving."""
