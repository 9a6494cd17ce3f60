"""Tensors only: the algorithm as pure functions. Knows nothing of text, DeepSpeed or GPUs."""
