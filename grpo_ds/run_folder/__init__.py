"""A run's files: checkpoints, lock, status, progress, and which checkpoint to resume."""
