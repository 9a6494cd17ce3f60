"""Every flag, the command line, and the DeepSpeed JSON: read, checked and resolved."""
