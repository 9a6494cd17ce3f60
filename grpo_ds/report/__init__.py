"""Everything that people read of a run: console, live view, metrics.jsonl, trackers, report page, model card."""
