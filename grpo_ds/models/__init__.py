"""Presets, the policy, its 8-bit reference, and both seen as functions from packed rows to log-probs."""
