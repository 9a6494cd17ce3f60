"""Output about a run for users: console, live view, metrics.jsonl, trackers, report page, model card."""
