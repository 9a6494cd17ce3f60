"""Models: presets, shapes, policy, reference, and both as functions from packed rows to log-probs."""
