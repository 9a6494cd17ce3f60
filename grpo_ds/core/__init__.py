"""Tensors only: the algorithm as pure functions, without text, DeepSpeed or GPUs."""
