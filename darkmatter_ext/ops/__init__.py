"""Encode, decode and pursuit over the compiled kernels: the only caller of torch.ops.darkmatter."""
