"""What a person sees: console lines, metrics.jsonl, trackers."""
