"""The training loop and its parts; only engine.py and zero_staging.py use DeepSpeed."""
