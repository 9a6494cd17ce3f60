"""The training loop and its parts, with the one door to DeepSpeed (engine.py)."""
