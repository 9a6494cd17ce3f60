#!/usr/bin/env python
"""Grade a model's answers: grpo_ds/commands/evaluate.py, also as `grpo-ds eval`."""

from grpo_ds.commands.evaluate import main
from grpo_ds.errors import run_script

if __name__ == "__main__":
    run_script(main)
