"""Flags, command line and DeepSpeed JSON: read, checked and resolved."""
