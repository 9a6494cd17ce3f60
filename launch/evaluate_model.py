#!/usr/bin/env python
"""Grade a model's answers: the same as `grpo-ds eval`; see grpo_ds/commands/evaluate.py."""

from grpo_ds.commands.evaluate import main
from grpo_ds.system.script import run_script

if __name__ == "__main__":
    run_script(main)
