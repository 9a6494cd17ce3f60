#!/usr/bin/env python
"""A run on one page: grpo_ds/commands/report.py, also as `grpo-ds report`."""

from grpo_ds.commands.report import main
from grpo_ds.errors import run_script

if __name__ == "__main__":
    run_script(main)
