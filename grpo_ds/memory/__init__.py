"""Memory of a run: bytes planned and measured, in GPU memory and in RAM, and what fits a machine."""
