"""A run as a tracker receives it, without torch: some tests do this in a process of its own."""

import json

from grpo_ds.report.trackers import make_trackers
from grpo_ds.run_folder.files import SUMMARY_FILE
from grpo_ds.run_folder.progress import Progress
from grpo_ds.settings.config import TrainConfig

ROWS = [
    {"question": "Is it? | so", "label": "yes", "completion": "<answer>yes</answer>", "reward": 2.0, "rewards/x": None},
    {"question": "Was it?", "label": "no", "completion": "# no\nidea", "reward": 0.0, "rewards/x": 0.5},
]


def track(folder, report_to, *, steps, progress=None, finish=True, offset=0.0):
    """Log a reward of step + offset for each step, completions, and the end; return progress and the last line."""
    progress = progress or Progress(max_steps=4)
    _, tracker = make_trackers(TrainConfig(model="qwen2.5-0.5b", report_to=report_to), folder, progress)
    for step in steps:
        tracker.log({"reward": step + offset, "kl": float("nan")}, step=step)
        tracker.completions(ROWS, step=step)
        progress.global_step = step
    said = tracker.finish(json.loads((folder / SUMMARY_FILE).read_text())) if finish else ""
    return progress, said
