"""A run as a tracker hears of it, without torch: some tests hear it in a process of its own."""

import json

from grpo_ds.report.reading import SUMMARY_FILE
from grpo_ds.report.trackers import make_trackers
from grpo_ds.run_folder.progress import Progress
from grpo_ds.settings.config import TrainConfig

ROWS = [
    {"question": "Is it? | so", "label": "yes", "completion": "<answer>yes</answer>", "reward": 2.0, "rewards/x": None},
    {"question": "Was it?", "label": "no", "completion": "# no\nidea", "reward": 0.0, "rewards/x": 0.5},
]


def track(folder, report_to, *, steps, progress=None, finish=True, offset=0.0):
    """Rewards step + offset for each of the steps, completions, and the end; what a checkpoint would keep of it."""
    progress = progress or Progress(max_steps=4)
    _, tracker = make_trackers(TrainConfig(model="qwen2.5-0.5b", report_to=report_to), folder, progress)
    for step in steps:
        tracker.log({"reward": step + offset, "kl": float("nan")}, step=step)
        tracker.completions(ROWS, step=step)
        progress.global_step = step
    said = tracker.finish(json.loads((folder / SUMMARY_FILE).read_text())) if finish else ""
    return progress, said
